//! Sockets of families that the standard library does not know.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::net::{SocketFlags, accept_with};

/// Accepts a connection: close-on-exec and non-blocking. The listener should be non-blocking too.
pub fn accept(listener: impl AsFd) -> io::Result<OwnedFd> {
    Ok(accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?)
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
