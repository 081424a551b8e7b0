//! virtio-console (virtio 1.3, section 5.3): the guest's hvc0, output only.
//!
//! What the guest writes goes to one pipe or socket. Where its reader is slow, or gone, output is dropped and counted:
//! neither the guest nor its device thread ever waits for it. Input does not exist; the receive queue is not touched.
//!
//! Bounds: [`CHAIN`] bytes of one buffer and [`BATCH`] buffers in one call; nothing is stored here.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use vz_sys::fd::set_nonblocking;

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

/// Bytes of one buffer that are written; drivers send a page or less.
const CHAIN: usize = 64 << 10;
/// Buffers that are written in one call.
const BATCH: usize = 64;
/// Receive and transmit queue. A driver keeps a page in every place of the first, and little is ever typed.
const QUEUE_SIZES: [u16; 2] = [8, 256];
const TX: usize = 1;

/// Why output was not written as it was.
#[derive(Debug, thiserror::Error)]
enum BadOutput {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("output buffer without bytes")]
    Empty,
    #[error("output buffer of {0} bytes, cut to {CHAIN}")]
    TooLong(usize),
}

/// Bytes of output that nobody read, as far as the console knows.
#[derive(Debug, Clone, Default)]
pub struct Dropped(Arc<AtomicU64>);

impl Dropped {
    /// How many, since the console was made.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// The device.
#[derive(Debug)]
pub struct Console {
    /// `None` once the reader is gone.
    output: Option<File>,
    dropped: Dropped,
    wake: Wake,
    mistakes: Mistakes,
}

impl Console {
    /// A console that writes to a pipe or socket, which is made non-blocking for all who share its description.
    ///
    /// The process must ignore SIGPIPE, as programs in Rust do.
    pub fn new(output: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&output, true)?;
        Ok(Self {
            output: Some(File::from(output)),
            dropped: Dropped::default(),
            wake: Wake::new()?,
            mistakes: Mistakes::new("console"),
        })
    }

    /// The count of what was dropped, to look at from elsewhere.
    pub fn dropped(&self) -> Dropped {
        self.dropped.clone()
    }

    fn print(&mut self, memory: &Memory, chain: Chain<'_>) -> Result<(), BadOutput> {
        let mut data = Buffers::readable(memory, chain)?;
        let len = data.len();
        if len == 0 {
            return Err(BadOutput::Empty);
        }
        data.truncate(CHAIN);
        let written = match &mut self.output {
            Some(output) => {
                let (written, result) = data.drain_to(output);
                match result {
                    Err(e) if e.kind() != io::ErrorKind::WouldBlock => {
                        tracing::info!("console output goes nowhere from here on: {e}");
                        self.output = None;
                    }
                    _ => {}
                }
                written
            }
            None => 0,
        };
        self.dropped.add(len.saturating_sub(written));
        if len > CHAIN { Err(BadOutput::TooLong(len)) } else { Ok(()) }
    }
}

impl Backend for Console {
    fn kind(&self) -> Kind {
        Kind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// Every field belongs to a feature that is not offered.
    fn config(&self) -> &[u8] {
        &[]
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.wake.source(0)]
    }

    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let Some(Some(tx)) = queues.get_mut(TX) else { return Ok(kicks) };
        let (used, more) = serve(tx, memory, BATCH, |chain| {
            if let Err(e) = self.print(memory, chain) {
                self.mistakes.note(&e);
            }
            Served::Used(0)
        })?;
        if used {
            kicks.insert(TX);
        }
        if more {
            self.wake.signal();
        }
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.wake.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
