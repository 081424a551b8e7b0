//! The registers of a virtio-mmio device (virtio 1.3, section 4.2.2), version 2.
//!
//! Threat: every access is the guest's, in any order and from any vCPU. The state machine below decides what an access
//! may do at which time; what it may not do is ignored, as a PC's hardware would.

use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vz_sys::sync::lock;
use vz_virtio::Memory;

use crate::{
    device::Device,
    register::{self, status},
};

/// Values of registers that never change.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"vz  ");
/// There is no shared memory region: its length reads as -1.
const NO_REGION: u32 = u32::MAX;

/// Registers of one queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

/// What the guest has written.
#[derive(Debug, Default)]
struct State {
    status: u32,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

/// The registers of one device.
#[derive(Debug)]
pub(crate) struct Registers {
    device: Arc<Device>,
    memory: Memory,
    features: u64,
    state: Mutex<State>,
}

impl Registers {
    pub(crate) fn new(device: Arc<Device>, memory: Memory) -> Self {
        let features =
            device.features | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        let queues = vec![QueueRegisters::default(); device.queue_sizes.len()];
        let state = State { queues, ..State::default() };
        let page = &device.page;
        for (register, value) in [
            (register::MAGIC, MAGIC),
            (register::VERSION, VERSION),
            (register::DEVICE_ID, device.kind as u32),
            (register::VENDOR_ID, VENDOR),
        ] {
            page.set(register, value);
        }
        for register in (register::SHM_LEN_LOW..register::SHM_END).step_by(4) {
            page.set(register, NO_REGION);
        }
        let registers = Self { device, memory, features, state: Mutex::new(state) };
        registers.show(&registers.state());
        registers
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A read of the guest, where KVM does not answer it itself.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.device.page.read(offset, bytes);
    }

    /// Shows what a write may have changed.
    fn show(&self, state: &State) {
        let selected = usize::try_from(state.queue_select).unwrap_or(usize::MAX);
        let page = &self.device.page;
        page.set(register::DEVICE_FEATURES, half(self.features, state.features_select));
        page.set(register::QUEUE_SIZE_MAX, self.device.queue_sizes.get(selected).copied().unwrap_or(0).into());
        page.set(register::QUEUE_READY, state.queues.get(selected).is_some_and(|queue| queue.ready).into());
        self.device.set_status(state.status);
    }

    /// A write of the guest.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if self.state().status & status::DRIVER != 0 {
                self.device.write_config(offset, bytes);
            }
            return;
        }
        if let Ok(bytes) = <&[u8; 4]>::try_from(bytes) {
            self.set_register(offset, u32::from_le_bytes(*bytes));
        }
    }

    fn set_register(&self, offset: u64, value: u32) {
        let mut state = self.state();
        match offset {
            register::DEVICE_FEATURES_SEL => state.features_select = value,
            register::DRIVER_FEATURES if state.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER => {
                let shift = match state.driver_features_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                let kept = state.driver_features & !(u64::from(u32::MAX) << shift);
                state.driver_features = kept | u64::from(value) << shift;
            }
            register::DRIVER_FEATURES_SEL => state.driver_features_select = value,
            register::QUEUE_SEL => state.queue_select = value,
            register::QUEUE_SIZE | register::QUEUE_READY | register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => {
                self.set_queue_register(&mut state, offset, value);
            }
            // Notifications go to ioeventfds and never reach this write.
            register::QUEUE_NOTIFY => {}
            register::INTERRUPT_ACK => self.device.interrupt.acknowledge(value),
            register::STATUS => self.set_status(&mut state, value),
            _ => {}
        }
        self.show(&state);
    }

    fn set_queue_register(&self, state: &mut State, offset: u64, value: u32) {
        // A ring's place is agreed on between the features and the driver's readiness, and not afterwards.
        if state.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return;
        }
        let selected = usize::try_from(state.queue_select).unwrap_or(usize::MAX);
        let Some(queue) = state.queues.get_mut(selected) else { return };
        if queue.ready && offset != register::QUEUE_READY {
            return;
        }
        match offset {
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// Status bits are only added, each after the ones before it; 0 resets.
    fn set_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            if state.status & status::DRIVER_OK != 0 {
                self.device.reset();
            }
            let queues = vec![QueueRegisters::default(); state.queues.len()];
            *state = State { queues, ..State::default() };
            return;
        }
        if value & status::FAILED != 0 {
            tracing::warn!(device = ?self.device.kind, "guest's driver gave up");
        }
        let new = value & !state.status;
        if state.status & !value & !status::FAILED != 0 {
            // Taking back what was said is a reset only.
            return;
        }
        if new & status::FEATURES_OK != 0 && !self.features_fit(state.driver_features) {
            // Not set, by which the driver knows.
            state.status |= value & !status::FEATURES_OK & !status::DRIVER_OK & !status::NEEDS_RESET;
            return;
        }
        if new & status::DRIVER_OK != 0 && value & status::FEATURES_OK == 0 {
            return;
        }
        state.status = value & !status::NEEDS_RESET;
        if new & status::DRIVER_OK != 0 {
            self.activate(state);
        }
    }

    fn features_fit(&self, driver: u64) -> bool {
        driver & !self.features == 0 && driver >> VIRTIO_F_VERSION_1 & 1 == 1
    }

    fn activate(&self, state: &State) {
        let event_idx = state.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let queues = state.queues.iter().zip(&self.device.queue_sizes).enumerate();
        let queues = queues.map(|(index, (registers, max))| {
            let queue = registers.ready.then(|| queue(registers, *max, event_idx, &self.memory)).flatten();
            if registers.ready && queue.is_none() {
                tracing::warn!(device = ?self.device.kind, index, "guest's queue is not in its memory; it is not served");
            }
            queue
        });
        self.device.activate(state.driver_features, queues.collect());
    }
}

/// A queue as the guest described it; `None` where that is nonsense.
fn queue(registers: &QueueRegisters, max: u16, event_idx: bool, memory: &Memory) -> Option<Queue> {
    let mut queue = Queue::new(max).ok()?;
    queue.try_set_size(registers.size).ok()?;
    queue.try_set_desc_table_address(GuestAddress(registers.descriptors)).ok()?;
    queue.try_set_avail_ring_address(GuestAddress(registers.available)).ok()?;
    queue.try_set_used_ring_address(GuestAddress(registers.used)).ok()?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue.is_valid(memory).then_some(queue)
}

/// The half of 64 bits that a select register names; others are empty.
fn half(value: u64, select: u32) -> u32 {
    let bits = match select {
        0 => value,
        1 => value >> 32,
        _ => 0,
    };
    // The low half.
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(0)
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
