//! A guest's driver for tests: rings in guest memory, written by hand.

use std::{collections::HashMap, os::fd::AsFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Memory;

/// Bytes of guest memory.
pub(crate) const SIZE: usize = 64 << 20;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

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

/// Writes one descriptor.
fn describe(memory: &Memory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// Whether a descriptor is readable within the time.
pub(crate) fn readable_within(fd: impl AsFd, milliseconds: u16) -> bool {
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(milliseconds)).unwrap() > 0
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
            let at = self.base + 16 * u64::from(index);
            describe(memory, at, buffer.address, buffer.len, flags, self.next_descriptor);
        }
        self.chains.insert(head, buffers.to_vec());
        self.publish(memory, head);
        head
    }

    /// Makes a chain available that never ends: its last buffer leads back to the first.
    pub(crate) fn add_endless(&mut self, memory: &Memory, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let next = if i + 1 == buffers.len() { head } else { self.next_descriptor };
            let flags = if buffer.writable { WRITE } else { 0 } | NEXT;
            describe(memory, self.base + 16 * u64::from(index), buffer.address, buffer.len, flags, next);
        }
        self.publish(memory, head);
        head
    }

    /// Makes a chain available whose buffers are in a table of their own, at `table`.
    pub(crate) fn add_indirect(&mut self, memory: &Memory, table: u64, buffers: &[Buffer]) {
        for (i, buffer) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let next = u16::try_from(i + 1).unwrap();
            describe(memory, table + 16 * u64::try_from(i).unwrap(), buffer.address, buffer.len, flags, next);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let len = u32::try_from(16 * buffers.len()).unwrap();
        describe(memory, self.base + 16 * u64::from(head), table, len, INDIRECT, 0);
        self.chains.insert(head, buffers.to_vec());
        self.publish(memory, head);
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

    /// Asks, with EVENT_IDX, to be notified when the entry with this index is used.
    pub(crate) fn set_used_event(&self, memory: &Memory, index: u16) {
        memory.write_obj(index, GuestAddress(self.avail() + 4 + 2 * u64::from(self.size))).unwrap();
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
