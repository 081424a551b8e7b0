//! The control queue: how many queue pairs the guest uses (virtio 1.3, section 5.1.6.5.6).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_queue::Queue;

use super::port::Port;
use crate::{
    Error, Memory,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

/// Commands that are served in one call.
const BATCH: usize = 16;
/// Class and command.
const SET_PAIRS: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;
/// Changes that can be made at once, and the time after which one more can: each stops the whole host's network
/// configuration for a moment.
const CHANGES: u32 = 8;
const CHANGE_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
enum BadCommand {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("control command without room for an answer")]
    NoRoom,
    #[error("control command of {0} bytes")]
    Short(usize),
    #[error("control command {1} of class {0}")]
    Unknown(u8, u8),
    #[error("{0} queue pairs")]
    Pairs(u16),
    #[error("number of queue pairs changed too often")]
    Often,
}

/// A queue pair, as the others see it.
#[derive(Debug)]
pub(super) struct Peer<P> {
    pub(super) port: P,
    /// Its thread looks for frames.
    pub(super) wake: Wake,
}

/// Who decides which ports get frames.
#[derive(Debug)]
pub(super) struct Control<P> {
    peers: Arc<[Peer<P>]>,
    /// The first so many get frames.
    enabled: usize,
    changes: u32,
    since: Instant,
}

impl<P: Port> Control<P> {
    /// All ports get frames, as those of a new tap do.
    pub(super) fn new(peers: Arc<[Peer<P>]>) -> Self {
        let enabled = peers.len();
        Self { peers, enabled, changes: CHANGES, since: Instant::now() }
    }

    fn may_change(&mut self) -> bool {
        let passed = self.since.elapsed().as_secs().checked_div(CHANGE_EVERY.as_secs()).unwrap_or(0);
        if passed > 0 {
            self.since = Instant::now();
            self.changes = self.changes.saturating_add(u32::try_from(passed).unwrap_or(u32::MAX)).min(CHANGES);
        }
        match self.changes.checked_sub(1) {
            Some(left) => {
                self.changes = left;
                true
            }
            None => false,
        }
    }

    /// Lets the first `count` ports get frames; whether it did.
    pub(super) fn enable(&mut self, count: usize) -> Result<bool, Error> {
        if count == self.enabled {
            return Ok(true);
        }
        if !self.may_change() {
            return Ok(false);
        }
        for (index, peer) in self.peers.iter().enumerate() {
            let (was, will) = (index < self.enabled, index < count);
            if was != will {
                peer.port.enable(will).map_err(|e| Error::System("attach or detach queue of tap", e))?;
                peer.wake.signal();
            }
        }
        self.enabled = count;
        Ok(true)
    }

    /// Serves commands; whether any were, and whether there are more.
    pub(super) fn run(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        mistakes: &mut Mistakes,
    ) -> Result<(bool, bool), Error> {
        let mut failed = Ok(());
        let served = serve(queue, memory, BATCH, |chain| {
            if failed.is_err() {
                return Served::NotNow;
            }
            let mut answer = match Buffers::writable(memory, chain.clone()) {
                Ok(answer) if answer.len() > 0 => answer,
                Ok(_) => {
                    mistakes.note(&BadCommand::NoRoom);
                    return Served::Used(0);
                }
                Err(e) => {
                    mistakes.note(&e);
                    return Served::Used(0);
                }
            };
            let code = match self.command(memory, chain) {
                Ok(Ok(())) => OK,
                Ok(Err(e)) => {
                    mistakes.note(&e);
                    ERR
                }
                Err(e) => {
                    failed = Err(e);
                    ERR
                }
            };
            answer.copy_from(&[code]);
            Served::Used(1)
        })?;
        failed?;
        Ok(served)
    }

    fn command(&mut self, memory: &Memory, chain: Chain<'_>) -> Result<Result<(), BadCommand>, Error> {
        let mut data = match Buffers::readable(memory, chain) {
            Ok(data) => data,
            Err(e) => return Ok(Err(e.into())),
        };
        let mut command = [0; 4];
        let present = data.copy_to(&mut command);
        if present < SET_PAIRS.len() {
            return Ok(Err(BadCommand::Short(present)));
        }
        let [class, number, low, high] = command;
        if [class, number] != SET_PAIRS {
            return Ok(Err(BadCommand::Unknown(class, number)));
        }
        if present < command.len() {
            return Ok(Err(BadCommand::Short(present)));
        }
        let pairs = u16::from_le_bytes([low, high]);
        if pairs == 0 || usize::from(pairs) > self.peers.len() {
            return Ok(Err(BadCommand::Pairs(pairs)));
        }
        Ok(if self.enable(pairs.into())? { Ok(()) } else { Err(BadCommand::Often) })
    }
}
