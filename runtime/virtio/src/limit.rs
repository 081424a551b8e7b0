//! Logging of what a guest brings about, at a bounded rate.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// Lines in one [`WINDOW`].
const LINES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// Counts mistakes, and logs the first few lines of each window.
#[derive(Debug)]
pub(crate) struct Mistakes {
    device: &'static str,
    total: u64,
    window: Instant,
    lines: u32,
}

impl Mistakes {
    pub(crate) fn new(device: &'static str) -> Self {
        Self { device, total: 0, window: Instant::now(), lines: 0 }
    }

    /// Notes one.
    pub(crate) fn note(&mut self, what: &dyn Display) {
        self.total = self.total.saturating_add(1);
        if self.may_log() {
            tracing::warn!(device = self.device, total = self.total, "guest mistake: {what}");
        }
    }

    /// Logs what failed on the host while it did what the guest asked for, which is no mistake of the guest's.
    pub(crate) fn fault(&mut self, what: &dyn Display) {
        if self.may_log() {
            tracing::warn!(device = self.device, "host fault: {what}");
        }
    }

    fn may_log(&mut self) -> bool {
        if self.window.elapsed() >= WINDOW {
            self.window = Instant::now();
            self.lines = 0;
        }
        let may = self.lines < LINES;
        if may {
            self.lines = self.lines.saturating_add(1);
        }
        may
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}
