//! A split virtqueue in guest memory, as its driver sees it.

use std::{collections::HashMap, ops::Range};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Descriptors of a ring.
pub(crate) const SIZE: u16 = 16;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Bytes of guest memory for each.
pub(crate) const RING: u64 = 0x400;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One queue, from both sides.
pub(crate) struct Ring {
    pub(crate) index: u64,
    pub(crate) queue: Queue,
    pub(crate) next_descriptor: u16,
    pub(crate) available: u16,
    pub(crate) used: u16,
    /// Chains that were made available, by their head: how many, and the most that the device may write to one.
    pub(crate) published: HashMap<u16, (usize, u64)>,
    /// Descriptors that were written since all chains were back; more than there are have overwritten some.
    pub(crate) written: u16,
    /// Chains are no longer what they were when they were published, so their lengths tell nothing.
    pub(crate) mixed: bool,
    /// The ring tells of chains that were not published.
    pub(crate) lies: bool,
    /// It is beyond use until the device is reset.
    pub(crate) broken: bool,
}

impl Ring {
    pub(crate) fn new(index: u64) -> Self {
        let mut ring = Self {
            index,
            queue: Queue::new(SIZE).unwrap(),
            next_descriptor: 0,
            available: 0,
            used: 0,
            published: HashMap::new(),
            written: 0,
            mixed: false,
            lies: false,
            broken: false,
        };
        ring.set_up(false);
        ring
    }

    pub(crate) fn base(&self) -> u64 {
        self.index * RING
    }

    pub(crate) fn avail(&self) -> u64 {
        self.base() + 0x100
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base() + 0x200
    }

    pub(crate) fn set_up(&mut self, event_idx: bool) {
        self.queue.reset();
        self.queue.try_set_desc_table_address(GuestAddress(self.base())).unwrap();
        self.queue.try_set_avail_ring_address(GuestAddress(self.avail())).unwrap();
        self.queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        self.queue.set_event_idx(event_idx);
        self.queue.set_ready(true);
        (self.next_descriptor, self.available, self.used) = (0, 0, 0);
        self.published.clear();
        (self.written, self.mixed, self.lies, self.broken) = (0, false, false, false);
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.published.values().map(|(count, _)| count).sum()
    }

    /// The part that the device writes.
    pub(crate) fn device_part(&self) -> Range<u64> {
        self.used_ring()..self.base() + RING
    }
}
