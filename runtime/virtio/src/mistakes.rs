//! Mistakes of a guest: counted, and logged at a bounded rate.

use std::fmt::Display;

use vz_sys::rate::Limit;

/// Lines in ten seconds.
const LINES: u32 = 5;

/// Counts mistakes, and logs the first few lines of each window.
#[derive(Debug)]
pub(crate) struct Mistakes {
    device: &'static str,
    total: u64,
    limit: Limit,
}

impl Mistakes {
    pub(crate) fn new(device: &'static str) -> Self {
        Self { device, total: 0, limit: Limit::new(LINES) }
    }

    /// Notes one.
    pub(crate) fn note(&mut self, what: &dyn Display) {
        self.total = self.total.saturating_add(1);
        if self.limit.admit().is_some() {
            tracing::warn!(device = self.device, total = self.total, "guest mistake: {what}");
        }
    }

    /// Logs what failed on the host while it did what the guest asked for, which is no mistake of the guest's.
    pub(crate) fn fault(&mut self, what: &dyn Display) {
        if self.limit.admit().is_some() {
            tracing::warn!(device = self.device, "host fault: {what}");
        }
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}
