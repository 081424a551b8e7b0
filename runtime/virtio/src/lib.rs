//! Virtio device backends. They know no transport: the same backend is served over virtio-mmio in process and over
//! vhost-user to another VMM.
//!
//! The transport owns queues, notifications and interrupts. It lends a backend the queues for the length of a call
//! and signals those that the backend names in [`Kicks`].
//!
//! Threat: everything in guest memory is hostile, and changes while it is read. A backend copies what it decides on
//! before it decides, bounds what it allocates by constants, answers a malformed chain with a used length of 0, counts
//! it, and logs it at a limited rate. It never panics and never exits because of what a guest wrote.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]
#![cfg_attr(test, allow(clippy::arithmetic_side_effects))]

use std::{io, os::fd::RawFd};

use vhost_user_backend::bitmap::BitmapMmapRegion;
pub use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

pub mod balloon;
pub mod blk;
mod chain;
pub mod console;
pub mod fs;
mod mistakes;
pub mod net;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod vsock;
mod wake;
mod worker;

pub use worker::Worker;

// Wire formats are little-endian; their structures here have the host's numbers.
const _: () = assert!(cfg!(target_endian = "little"));

/// Guest memory. Its bitmap type is what virtiofsd's reader and writer are fixed to.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// Which device a backend is, by its virtio id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// virtio-net.
    Net = 1,
    /// virtio-blk.
    Block = 2,
    /// virtio-console.
    Console = 3,
    /// virtio-rng.
    Rng = 4,
    /// virtio-balloon.
    Balloon = 5,
    /// virtio-vsock.
    Vsock = 19,
    /// virtio-fs.
    Fs = 26,
}

/// What the guest is to be interrupted for: a set of queues, by index, to which a backend returned buffers, and whether
/// its configuration space changed.
///
/// The transport interrupts the guest for each queue unless the guest asked not to be (EVENT_IDX), and always for a
/// change of the configuration space, of which it also changes the generation.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Kicks {
    queues: u64,
    config: bool,
}

impl Kicks {
    /// Nothing.
    pub const NONE: Self = Self { queues: 0, config: false };

    /// Adds a queue; indices over 63 do not exist.
    pub fn insert(&mut self, queue: usize) {
        if let Ok(shift) = u32::try_from(queue) {
            self.queues |= 1u64.checked_shl(shift).unwrap_or(0);
        }
    }

    /// Whether the queue is in the set.
    pub fn contains(self, queue: usize) -> bool {
        u32::try_from(queue).ok().and_then(|shift| self.queues.checked_shr(shift)).is_some_and(|bits| bits & 1 == 1)
    }

    /// Adds the configuration space: [`Backend::config`] is no longer what it was.
    pub fn insert_config(&mut self) {
        self.config = true;
    }

    /// Whether the configuration space changed.
    pub fn config_changed(self) -> bool {
        self.config
    }

    /// Whether there is nothing to interrupt for.
    pub fn is_empty(self) -> bool {
        self == Self::NONE
    }
}

/// What makes a device useless until the guest resets it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A ring cannot be read or written where the guest said that it is.
    #[error("access virtqueue")]
    Ring(#[source] virtio_queue::Error),
    /// A system call of the backend failed.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
}

/// A descriptor that a backend wants to be called for.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Polled for readability. It lives as long as the backend.
    pub fd: RawFd,
    /// Passed to [`Backend::source`].
    pub token: u16,
}

/// Queues that are lent to a backend, by index; `None` is one that the guest has not set up.
pub type Queues<'a, 'b> = &'a mut [Option<&'b mut Queue>];

/// One device, or those of its queues that one thread serves.
///
/// All calls after [`Backend::enter_thread`] come from one thread.
pub trait Backend: Send {
    /// Which device it is.
    fn kind(&self) -> Kind;
    /// Feature bits of the device type; those of rings and transport are the transport's.
    fn features(&self) -> u64 {
        0
    }
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The device's configuration space.
    fn config(&self) -> &[u8];
    /// The guest's driver wrote to the configuration space, of which most devices have nothing that can be written.
    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}
    /// Called once, by the thread that serves it, before anything else.
    fn enter_thread(&mut self) -> Result<(), Error> {
        Ok(())
    }
    /// The guest's driver is ready and accepted these features.
    fn activate(&mut self, _acked: u64) {}
    /// Descriptors that it wants to be called for.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    /// Serves all queues as far as it can now. Where it stops before that, one of its sources becomes readable.
    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error>;
    /// The guest made buffers available in a queue.
    fn queue(&mut self, _index: u16, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        self.run(queues, memory)
    }
    /// Takes note of what makes a source readable, so that it is not any more.
    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        Ok(())
    }
    /// A source is readable.
    fn source(&mut self, token: u16, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        self.clear(token)?;
        self.run(queues, memory)
    }
    /// The guest reset the device.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_hold_what_was_inserted() {
        let mut kicks = Kicks::default();
        assert!(kicks.is_empty());
        kicks.insert(0);
        kicks.insert(63);
        kicks.insert(64);
        assert!(!kicks.config_changed());
        assert!(kicks.contains(0) && kicks.contains(63) && !kicks.contains(1) && !kicks.contains(64));
        let mut kicks = Kicks::NONE;
        kicks.insert_config();
        assert!(kicks.config_changed() && !kicks.is_empty() && !kicks.contains(0));
    }
}
