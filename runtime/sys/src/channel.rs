//! A message channel between two processes: whole messages, each with file descriptors.
//!
//! `SOCK_SEQPACKET` keeps message boundaries, and its end of file is how either side learns that the other died.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
    },
};

/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors in one message.
pub const MAX_FDS: usize = 64;

/// One end of the channel.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// What was sent.
    pub bytes: Vec<u8>,
    /// The descriptors that came along, close-on-exec, in the order in which they were sent.
    pub fds: Vec<OwnedFd>,
}

impl Channel {
    /// A connected pair of blocking ends, both close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// Takes over a descriptor that is one end of [`Channel::pair`].
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends one message. Blocks while the peer's queue is full, unless the descriptor is non-blocking.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() || bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives one message; `None` where the peer has closed its end.
    ///
    /// Blocks, or fails with `WouldBlock` where the descriptor is non-blocking. A message that was cut off, because it
    /// is larger than [`MAX_MESSAGE`] or carried more than [`MAX_FDS`], is `InvalidData`.
    pub fn recv(&self) -> io::Result<Option<Message>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut control = cmsg_space!([RawFd; MAX_FDS]);
        let (len, fds, cut) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => {
                    let mut fds = Vec::new();
                    for c in message.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(raw) = c {
                            fds.extend(raw.into_iter().map(|fd| {
                                // SAFETY: the kernel has just installed this descriptor for us, nobody else knows it.
                                #[allow(unsafe_code)]
                                unsafe {
                                    OwnedFd::from_raw_fd(fd)
                                }
                            }));
                        }
                    }
                    let cut = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                    break (message.bytes, fds, cut);
                }
                Err(Errno::EINTR) => {}
                // A peer that died with our messages unread.
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        };
        if cut {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "message was cut off"));
        }
        if len == 0 {
            return Ok(None);
        }
        bytes.truncate(len);
        bytes.shrink_to_fit();
        Ok(Some(Message { bytes, fds }))
    }

    /// Sets whether `send` and `recv` fail with `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        crate::fd::set_nonblocking(&self.0, on)
    }
}

/// Bytes that a pipe or fifo holds and nobody has read yet.
pub fn unread(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int at the address, which is valid for the call.
    #[allow(unsafe_code)]
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(bytes).unwrap_or(0)) }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, io::Write, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn messages_keep_their_bounds_and_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        a.send(b"one", &[far.as_fd()]).unwrap();
        a.send(b"two", &[]).unwrap();
        drop((a, far));
        let one = b.recv().unwrap().unwrap();
        assert_eq!((one.bytes.as_slice(), one.fds.len()), (b"one".as_slice(), 1));
        let mut passed = File::from(one.fds.into_iter().next().unwrap());
        near.write_all(b"x").unwrap();
        let mut byte = [0];
        passed.read_exact(&mut byte).unwrap();
        assert_eq!(b.recv().unwrap().unwrap().bytes, b"two");
        assert!(b.recv().unwrap().is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, _b) = Channel::pair().unwrap();
        assert_eq!(a.send(&vec![0; MAX_MESSAGE + 1], &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(a.send(b"", &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_nonblocking_end_does_not_wait() {
        let (a, _b) = Channel::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        assert_eq!(a.recv().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
