//! A message channel between two processes: whole messages, each with file descriptors.
//!
//! `SOCK_SEQPACKET` keeps message boundaries, and its end of file is how either side learns that the other died.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    cmsg_space,
    io::{Errno, ioctl_fionread},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};

/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors in one message.
pub const MAX_FDS: usize = 64;
/// Bytes of the control message that carries them.
const CONTROL: usize = cmsg_space!(ScmRights(MAX_FDS));

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
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
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
        let mut space = [MaybeUninit::uninit(); CONTROL];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        loop {
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
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
        let mut space = [MaybeUninit::uninit(); CONTROL];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let (len, cut) = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => {
                    break (message.bytes, message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC));
                }
                Err(Errno::INTR) => {}
                // A peer that died with our messages unread.
                Err(Errno::CONNRESET) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        };
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds: Vec<OwnedFd> = rights.flatten().collect();
        // The control message has some room to spare, for its alignment.
        if cut || fds.len() > MAX_FDS {
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
    Ok(usize::try_from(ioctl_fionread(fd)?).unwrap_or(0))
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
    fn as_many_descriptors_as_there_may_be_arrive_and_no_more() {
        let (a, b) = Channel::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let most = [file.as_fd(); MAX_FDS];
        a.send(b"x", &most).unwrap();
        assert_eq!(b.recv().unwrap().unwrap().fds.len(), MAX_FDS);
        // What a peer that does not use `send` can do.
        for extra in 1..4 {
            let too_many = vec![file.as_fd(); MAX_FDS + extra];
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS + 4))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&too_many)));
            sendmsg(&a, &[IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL).unwrap();
            assert_eq!(b.recv().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_nonblocking_end_does_not_wait() {
        let (a, _b) = Channel::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        assert_eq!(a.recv().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
