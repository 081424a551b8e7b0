//! Times.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime, clock_settime};

/// Nanoseconds since the kernel's start.
pub fn uptime_ns() -> u64 {
    now(ClockId::CLOCK_BOOTTIME)
}

/// Nanoseconds since the Unix epoch, by the guest's wall clock.
pub fn realtime_ns() -> u64 {
    now(ClockId::CLOCK_REALTIME)
}

/// Sets the wall clock, in nanoseconds since the Unix epoch.
pub fn set_realtime(ns: u64) -> nix::Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, Duration::from_nanos(ns).into())
}

// Both clocks exist in every kernel that this runs on; a clock that cannot be read is worth a zero, not an end.
fn now(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| u64::try_from(Duration::from(t).as_nanos()).unwrap_or(u64::MAX))
}
