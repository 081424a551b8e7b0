//! Descriptors that the runtime waits on.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a value with the runtime that owns one descriptor for as long as it lives.
#[expect(deprecated, reason = "its successor is unsafe; AsFd says what that asks for: the same open descriptor")]
pub fn watch<T: AsFd + AsRawFd>(value: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(value)
}

/// Registers a value for events that are no data, of which a file in /proc tells so that it has changed.
#[expect(deprecated, reason = "as for `watch`")]
pub fn watch_changes<T: AsFd + AsRawFd>(value: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(value, Interest::PRIORITY)
}
