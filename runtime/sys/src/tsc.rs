//! The processor's time-stamp counter, and its frequency, which an emulated processor takes over.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__cpuid, _rdtsc};
use std::{io, time::Duration};

use nix::time::{ClockId, clock_gettime};

/// kHz as the processor or the hypervisor below us states it; `None` where neither does.
#[cfg(not(target_arch = "x86_64"))]
pub fn stated_khz() -> Option<u32> {
    None
}

/// kHz as the processor or the hypervisor below us states it; `None` where neither does.
#[cfg(target_arch = "x86_64")]
pub fn stated_khz() -> Option<u32> {
    let leaf = |number| {
        // Unsafe where a processor has no CPUID, which no x86-64 is.
        #[allow(unsafe_code, unused_unsafe)]
        // SAFETY: as above.
        unsafe {
            __cpuid(number)
        }
    };
    // The leaf that KVM and VMware use for it.
    let under_hypervisor = leaf(1).ecx & 1 << 31 != 0;
    if under_hypervisor && leaf(0x4000_0000).eax >= 0x4000_0010 {
        let khz = leaf(0x4000_0010).eax;
        if khz != 0 {
            return Some(khz);
        }
    }
    // Intel: crystal clock and its ratio to the counter.
    if leaf(0).eax >= 0x15 {
        let ratio = leaf(0x15);
        let hz = u64::from(ratio.ecx).checked_mul(ratio.ebx.into())?.checked_div(ratio.eax.into()).unwrap_or(0);
        return u32::try_from(hz / 1000).ok().filter(|khz| *khz != 0);
    }
    None
}

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// The counter.
    pub count: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub nanos: u64,
}

impl Sample {
    /// Reads both, as close together as can be had.
    pub fn take() -> io::Result<Self> {
        let mut best: Option<(u64, Self)> = None;
        for _ in 0..5 {
            let before = count();
            let time = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
            let apart = count().wrapping_sub(before);
            let nanos = u64::try_from(time.as_nanos()).map_err(io::Error::other)?;
            if best.is_none_or(|(least, _)| apart < least) {
                best = Some((apart, Self { count: before.wrapping_add(apart / 2), nanos }));
            }
        }
        best.map(|(_, sample)| sample).ok_or_else(|| io::ErrorKind::Other.into())
    }

    /// kHz of the counter from this sample to a later one; `None` where that is not later, or the counter was set back.
    pub fn khz_until(&self, later: &Self) -> Option<u32> {
        let nanos = u128::from(later.nanos.checked_sub(self.nanos).filter(|nanos| *nanos > 0)?);
        let counted = u128::from(later.count.checked_sub(self.count)?);
        u32::try_from((counted * 1_000_000 + nanos / 2) / nanos).ok().filter(|khz| *khz > 0)
    }
}

/// The counter of the processor that this runs on, which has none: 0.
#[cfg(not(target_arch = "x86_64"))]
pub fn count() -> u64 {
    0
}

/// The counter of the processor that this runs on. It starts at 0 with the machine, real or not.
#[cfg(target_arch = "x86_64")]
pub fn count() -> u64 {
    // SAFETY: every x86-64 has the instruction, and a kernel that forbids it would forbid its own vDSO.
    #[allow(unsafe_code)]
    unsafe {
        _rdtsc()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stated_is_what_is_measured() {
        let start = Sample::take().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let measured = start.khz_until(&Sample::take().unwrap()).unwrap();
        assert!(measured > 100_000);
        if let Some(stated) = stated_khz() {
            let off = stated.abs_diff(measured);
            assert!(off < stated / 500, "stated {stated} kHz, measured {measured} kHz");
        }
    }

    #[test]
    fn clocks_that_go_back_tell_nothing() {
        let early = Sample { count: 1000, nanos: 1000 };
        let late = Sample { count: 3_001_000, nanos: 1_001_000 };
        assert_eq!(early.khz_until(&late), Some(3_000_000));
        assert_eq!(late.khz_until(&early), None);
        assert_eq!(early.khz_until(&early), None);
        assert_eq!(early.khz_until(&Sample { count: 0, nanos: 2000 }), None);
        assert_eq!(early.khz_until(&Sample { count: u64::MAX, nanos: 1001 }), None);
    }
}
