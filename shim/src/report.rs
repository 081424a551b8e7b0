//! What a daemon tells whoever has started it, over the pipe that it has as stdout.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    sync::Mutex,
};

use vz_sys::sync::lock;

/// What the daemon reports after [`vz_state::READY`], once containerd has called: from then on containerd cleans up if
/// the daemon dies.
pub const KNOWN: &str = "known\n";

/// The pipe to `start`, and to the watcher after it.
#[derive(Debug)]
pub struct Report(Mutex<Option<File>>);

impl Report {
    /// Reports into `pipe`.
    pub fn new(pipe: OwnedFd) -> Self {
        Self(Mutex::new(Some(pipe.into())))
    }

    /// Tells the watcher that containerd has called, the first time.
    pub fn known(&self) {
        self.say(KNOWN);
        *lock(&self.0) = None;
    }

    /// Tells a line. Nobody may be listening: `start` has been killed, or the caller watches over the daemon in a way
    /// of its own.
    pub fn say(&self, line: &str) {
        if let Some(pipe) = lock(&self.0).as_mut()
            && let Err(error) = pipe.write_all(line.as_bytes())
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            tracing::error!(%error, line, "report");
        }
    }
}
