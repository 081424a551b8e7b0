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
        let (uptime_ns, tsc) = uptime();
        Self { uptime_ns, tsc, cpu_ns: now(ClockId::CLOCK_PROCESS_CPUTIME_ID) }
    }
}

/// CPU time in nanoseconds that PID 1 has used since its first line, and the calling process since its start.
pub fn agent_cpu_ns(first: &Moment) -> u64 {
    let init = clock_getcpuclockid(Pid::from_raw(1)).map_or(0, now);
    init.saturating_sub(first.cpu_ns).saturating_add(now(ClockId::CLOCK_PROCESS_CPUTIME_ID))
}

/// Nanoseconds since the kernel's start, and the time-stamp counter at the same moment. Whoever learns the counter's
/// rate from two of these stretches it over the whole boot, and with it each time that the processor was away between
/// the readings: they are the closest of several.
pub fn uptime() -> (u64, u64) {
    vz_sys::tsc::Sample::take().map_or((0, 0), |sample| (sample.nanos, sample.count))
}

/// Nanoseconds since the Unix epoch, by the guest's wall clock.
pub fn realtime_ns() -> u64 {
    now(ClockId::CLOCK_REALTIME)
}

/// Sets the wall clock, in nanoseconds since the Unix epoch.
pub fn set_realtime(ns: u64) -> nix::Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, Duration::from_nanos(ns).into())
}

// The clocks exist in every kernel that this runs on; a clock that cannot be read is worth a zero, not an end.
fn now(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| u64::try_from(Duration::from(t).as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_rate_is_the_same_over_every_stretch() {
        let moments: Vec<_> = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(5));
            uptime()
        })
        .take(40)
        .collect();
        let rate = |from: &(u64, u64), to: &(u64, u64)| (to.1 - from.1) as f64 / (to.0 - from.0) as f64;
        let whole = rate(&moments[0], &moments[39]);
        for pair in moments.windows(2) {
            let part = rate(&pair[0], &pair[1]);
            assert!((part / whole - 1.0).abs() < 0.01, "{part} counts in a nanosecond instead of {whole}");
        }
    }
}
