//! Flags of open descriptors.

use std::{io, os::fd::AsFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Sets or clears O_NONBLOCK, for all who share the open file description.
pub fn set_nonblocking(fd: impl AsFd, on: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, on);
    fcntl(&fd, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_that_is_not_blocking_says_so() {
        let (read, _write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let is_set = || OFlag::from_bits_retain(fcntl(&read, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK);
        assert!(!is_set());
        set_nonblocking(&read, true).unwrap();
        assert!(is_set());
        assert_eq!(nix::unistd::read(&read, &mut [0]), Err(nix::errno::Errno::EAGAIN));
        set_nonblocking(&read, false).unwrap();
        assert!(!is_set());
    }
}
