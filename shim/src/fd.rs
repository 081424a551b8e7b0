//! Descriptors that the runtime waits on.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use tokio::io::unix::AsyncFd;

/// Registers a value with the runtime that owns one descriptor for as long as it lives.
#[expect(deprecated, reason = "its successor is unsafe; AsFd says what that asks for: the same open descriptor")]
pub fn watch<T: AsFd + AsRawFd>(value: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(value)
}
