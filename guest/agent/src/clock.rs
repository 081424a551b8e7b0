//! Times.

use std::time::Duration;

use nix::{
    time::{ClockId, clock_getcpuclockid, clock_gettime, clock_settime},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// PID 1's first line, by every clock there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Nanoseconds since the kernel's start.
    pub uptime_ns: u64,
    /// The time-stamp counter.
    pub tsc: u64,
    /// CPU time of PID 1 until then, in nanoseconds: it has been a thread of the kernel before.
    pub cpu_ns: u64,
}

impl Moment {
    /// Now, in the calling process.
    pub fn now() -> Self {
        Self { uptime_ns: uptime_ns(), tsc: vz_sys::tsc::count(), cpu_ns: now(ClockId::CLOCK_PROCESS_CPUTIME_ID) }
    }
}

/// CPU time in nanoseconds that PID 1 has used since its first line, and the calling process since its start.
pub fn agent_cpu_ns(first: &Moment) -> u64 {
    let init = clock_getcpuclockid(Pid::from_raw(1)).map_or(0, now);
    init.saturating_sub(first.cpu_ns).saturating_add(now(ClockId::CLOCK_PROCESS_CPUTIME_ID))
}

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
