//! Sockets of families that the standard library does not know.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::errno::Errno;

/// Accepts a connection: close-on-exec and non-blocking. The listener should be non-blocking too.
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null pointers ask for no address; the result is a new descriptor or an error.
    #[allow(unsafe_code)]
    unsafe {
        let raw = libc::accept4(listener.as_fd().as_raw_fd(), ptr::null_mut(), ptr::null_mut(), flags);
        Ok(OwnedFd::from_raw_fd(Errno::result(raw)?))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connections_are_taken_one_by_one() {
        let dir = tempfile_dir();
        let path = dir.join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert_eq!(accept(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let _near = UnixStream::connect(&path).unwrap();
        accept(&listener).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }

    fn tempfile_dir() -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("vz-sys-accept-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        dir
    }
}
