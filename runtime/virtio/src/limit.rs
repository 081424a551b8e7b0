//! Logging of a guest's mistakes at a bounded rate.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// Lines in one [`WINDOW`].
const LINES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// Counts mistakes and logs the first few of each window.
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
        if self.window.elapsed() >= WINDOW {
            self.window = Instant::now();
            self.lines = 0;
        }
        if self.lines < LINES {
            self.lines = self.lines.saturating_add(1);
            tracing::warn!(device = self.device, total = self.total, "guest mistake: {what}");
        }
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}
