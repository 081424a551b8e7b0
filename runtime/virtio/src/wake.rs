//! How a device asks to be called again.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::Source;

/// A descriptor that a device makes readable for itself: with work left over, or from another thread.
#[derive(Debug)]
pub(crate) struct Wake(EventFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Makes it readable. It cannot be full, and it cannot be closed.
    pub(crate) fn signal(&self) {
        let _ = self.0.write(1);
    }

    /// Makes it no longer readable. Done before looking at what it was signalled for, so that nothing is missed.
    pub(crate) fn clear(&self) {
        let _ = self.0.read();
    }

    pub(crate) fn source(&self, token: u16) -> Source {
        Source { fd: self.0.as_raw_fd(), token }
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
