//! virtio-rng (virtio 1.3, section 5.4): random bytes of the host's kernel.
//!
//! Bounds: [`REQUEST`] bytes for one request, and [`BUDGET`] bytes in a [`PERIOD`], of which every request costs at
//! least [`COST`]. A guest that asks for more waits for the next period, whatever the transport calls meanwhile.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
};

/// Bytes that one request gets; the rest of its buffers stays as it is.
const REQUEST: usize = 4096;
/// Bytes that there are in a period: 640 KiB a second, far more than a kernel that seeds itself asks for.
const BUDGET: usize = 64 << 10;
const PERIOD: Duration = Duration::from_millis(100);
/// What a request costs however little it asks for.
const COST: usize = 64;
const QUEUE_SIZES: [u16; 1] = [64];
const REQUESTS: usize = 0;

#[derive(Debug, thiserror::Error)]
enum BadRequest {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("request without room")]
    NoRoom,
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    /// What is left of the period's bytes; the timer runs where it is not all.
    budget: usize,
    timer: TimerFd,
    mistakes: Mistakes,
}

impl Rng {
    /// A device with the first period's bytes.
    pub fn new() -> io::Result<Self> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        Ok(Self { budget: BUDGET, timer, mistakes: Mistakes::new("rng") })
    }

    /// Takes a request's bytes, at least its cost, off the budget.
    fn charge(&mut self, bytes: usize) -> Result<(), Error> {
        if self.budget == BUDGET {
            let once = Expiration::OneShot(TimeSpec::from_duration(PERIOD));
            self.timer.set(once, TimerSetTimeFlags::empty()).map_err(|e| Error::System("set timer", e.into()))?;
        }
        self.budget = self.budget.saturating_sub(bytes.max(COST));
        Ok(())
    }

    /// Fills one request; the number of bytes.
    fn fill(&mut self, memory: &Memory, chain: Chain<'_>) -> Result<usize, Error> {
        let room = Buffers::writable(memory, chain).map_err(BadRequest::from);
        let mut room = match room {
            Ok(room) if room.len() > 0 => room,
            Ok(_) => return self.refuse(&BadRequest::NoRoom),
            Err(e) => return self.refuse(&e),
        };
        let mut bytes = [0; REQUEST];
        let len = room.len().min(REQUEST).min(self.budget);
        self.charge(len)?;
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        vz_sys::random::fill(bytes).map_err(|e| Error::System("read random numbers", e))?;
        Ok(room.copy_from(bytes))
    }

    fn refuse(&mut self, why: &BadRequest) -> Result<usize, Error> {
        self.mistakes.note(why);
        self.charge(0)?;
        Ok(0)
    }
}

impl Backend for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.timer.as_fd().as_raw_fd(), token: 0 }]
    }

    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let Some(Some(queue)) = queues.get_mut(REQUESTS) else { return Ok(kicks) };
        let mut failed = Ok(());
        // Ends with the budget, if not before.
        let (used, _) = serve(queue, memory, usize::MAX, |chain| {
            if self.budget == 0 || failed.is_err() {
                return Served::NotNow;
            }
            match self.fill(memory, chain) {
                Ok(len) => Served::Used(u32::try_from(len).unwrap_or(0)),
                Err(e) => {
                    failed = Err(e);
                    Served::NotNow
                }
            }
        })?;
        failed?;
        if used {
            kicks.insert(REQUESTS);
        }
        Ok(kicks)
    }

    /// A period is over.
    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        // Fails where it was not over after all.
        if self.timer.wait().is_ok() {
            self.budget = BUDGET;
        }
        Ok(())
    }

    // A reset leaves the budget alone: it would be the way around it.
}

#[cfg(test)]
mod tests;
