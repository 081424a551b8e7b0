//! A guest's driver for tests: rings in guest memory, written by hand.

use std::collections::HashMap;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Memory;

/// Bytes of guest memory.
pub(crate) const SIZE: usize = 64 << 20;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

pub(crate) fn memory() -> Memory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap()
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// One split virtqueue. Descriptors are used once around, like a driver with free ones only.
pub(crate) struct Ring {
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    chains: HashMap<u16, Vec<Buffer>>,
}

impl Ring {
    /// A ring whose tables start at `base`, 64 KiB long at most.
    pub(crate) fn new(base: u64, size: u16) -> Self {
        Self { base, size, next_descriptor: 0, available: 0, used: 0, chains: HashMap::new() }
    }

    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's side.
    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.avail())).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.used_ring())).unwrap();
        queue.set_ready(true);
        queue
    }

    /// Makes a chain available.
    pub(crate) fn add(&mut self, memory: &Memory, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let last = i + 1 == buffers.len();
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let at = GuestAddress(self.base + 16 * u64::from(index));
            memory.write_obj(buffer.address, at).unwrap();
            memory.write_obj(buffer.len, GuestAddress(at.0 + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            memory.write_obj(self.next_descriptor, GuestAddress(at.0 + 14)).unwrap();
        }
        self.chains.insert(head, buffers.to_vec());
        self.publish(memory, head);
        head
    }

    /// Puts a head into the ring, whatever it is.
    pub(crate) fn publish(&mut self, memory: &Memory, head: u16) {
        let slot = self.avail() + 4 + 2 * u64::from(self.available % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_index(memory, self.available);
    }

    /// Sets the ring's index, whatever it is.
    pub(crate) fn set_index(&mut self, memory: &Memory, index: u16) {
        memory.write_obj(index, GuestAddress(self.avail() + 2)).unwrap();
    }

    /// The next chain that the device is done with, and how much it wrote.
    pub(crate) fn take_used(&mut self, memory: &Memory) -> Option<(Vec<Buffer>, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let entry = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((self.chains.remove(&u16::try_from(head).unwrap()).unwrap_or_default(), len))
    }
}
