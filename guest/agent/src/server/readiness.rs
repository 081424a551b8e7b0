//! Descriptors in tokio's event loop.

use std::{io, os::fd::AsRawFd};

use tokio::io::unix::AsyncFd;

/// Watches a non-blocking descriptor.
///
/// `T`'s descriptor must be the same for as long as it lives, which it is for everything that owns or borrows one.
pub fn register<T: AsRawFd>(fd: T) -> io::Result<AsyncFd<T>> {
    // Deprecated in favour of an unsafe function, because a type may lie about its descriptor. Ours do not.
    #[allow(deprecated)]
    AsyncFd::new(fd)
}
