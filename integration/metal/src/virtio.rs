//! A driver of virtio-mmio devices (virtio 1.2, section 4.2) with split queues (2.7), which says what it is told to.

use crate::machine::{self, cycles, fence, peek, poke};

/// Registers, by their offsets.
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const DEVICE: u64 = 0x08;
    pub const FEATURES: u64 = 0x10;
    pub const FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const NOTIFY: u64 = 0x50;
    pub const STATUS: u64 = 0x70;
    pub const DESCRIPTORS: u64 = 0x80;
    pub const AVAILABLE: u64 = 0x90;
    pub const USED: u64 = 0xa0;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const SEEN: u32 = 1;
const DRIVER: u32 = 2;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
/// Of the upper half of the features: VERSION_1.
const VERSION_1: u32 = 1;
/// Of the lower half.
pub const INDIRECT: u32 = 1 << 28;

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE: u16 = 4;

/// virtio's numbers of devices.
pub const FS: u32 = 26;
const VSOCK: u32 = 19;
const BLOCK: u32 = 2;

/// The machine that we wrote puts its devices here, a page each; ACPI says so to those who read it.
const BUILT_IN: u64 = 0xd000_0000;
const BUILT_IN_SIZE: u64 = 0x1000;
const BUILT_IN_MOST: u64 = 19;
/// Most devices that are looked at.
pub const MOST: usize = 20;
/// Most queues that a device is given.
pub const QUEUES: usize = 8;
/// Bytes of memory that a queue has, and the size of the largest that fits: descriptors, then the rings.
pub const QUEUE_BYTES: u64 = 0x1_0000;
const AVAILABLE_AT: u64 = 0x8000;
const USED_AT: u64 = 0xa000;
pub const LARGEST: u16 = 1024;
/// How long something that has to come is waited for: some seconds, and longer where the counter is the host's and we
/// are emulated.
const PATIENCE: u64 = 40_000_000_000;

/// A device.
#[derive(Clone, Copy)]
pub struct Device {
    pub base: u64,
    pub kind: u32,
}

impl Device {
    pub fn read(self, register: u64) -> u32 {
        peek(self.base + register)
    }

    pub fn write(self, register: u64, value: u32) {
        poke(self.base + register, value);
    }

    /// Whether it is served by the vmm: all but those that QEMU has itself.
    pub fn is_ours(self) -> bool {
        matches!(self.kind, FS | VSOCK | BLOCK) || self.base < BUILT_IN + BUILT_IN_MOST * BUILT_IN_SIZE
    }

    pub fn reset(self) {
        self.write(register::STATUS, 0);
        while self.read(register::STATUS) != 0 {}
    }

    /// Resets it and agrees on features: VERSION_1, and of the lower half those that it has of these.
    pub fn begin(self, features: u32) -> bool {
        self.reset();
        self.write(register::STATUS, SEEN);
        self.write(register::STATUS, SEEN | DRIVER);
        self.write(register::FEATURES_SELECT, 0);
        let low = self.read(register::FEATURES) & features;
        for (half, value) in [(0, low), (1, VERSION_1)] {
            self.write(register::DRIVER_FEATURES_SELECT, half);
            self.write(register::DRIVER_FEATURES, value);
        }
        self.write(register::STATUS, SEEN | DRIVER | FEATURES_OK);
        self.read(register::STATUS) & FEATURES_OK != 0
    }

    /// Whether it has this queue, and how large it may be.
    pub fn largest(self, queue: u32) -> u16 {
        self.write(register::QUEUE_SELECT, queue);
        u16::try_from(self.read(register::QUEUE_SIZE_MAX)).unwrap_or(0)
    }

    /// Tells it where a queue is.
    pub fn place(self, queue: u32, size: u32, places: [u64; 3]) {
        self.write(register::QUEUE_SELECT, queue);
        self.write(register::QUEUE_SIZE, size);
        let registers = [register::DESCRIPTORS, register::AVAILABLE, register::USED];
        for (register, place) in registers.into_iter().zip(places) {
            for (at, half) in [(register, place), (register + 4, place >> 32)] {
                self.write(at, u32::try_from(half & 0xffff_ffff).unwrap_or(0));
            }
        }
        self.write(register::QUEUE_READY, 1);
    }

    pub fn ready(self) {
        self.write(register::STATUS, SEEN | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Begins, and makes all its queues, of at most `size`; their memory is at `memory`.
    pub fn start(self, features: u32, size: u16, memory: u64) -> [Option<Queue>; QUEUES] {
        let mut queues = [None; QUEUES];
        if !self.begin(features) {
            machine::say!("device {} refuses features", self.kind);
            return queues;
        }
        for ((number, queue), at) in (0..).zip(&mut queues).zip((memory..).step_by(0x1_0000)) {
            let size = self.largest(number).min(size).min(LARGEST);
            if size == 0 {
                continue;
            }
            machine::clear(at, QUEUE_BYTES);
            let made = Queue { device: self, number, size, memory: at, offered: 0, seen: 0 };
            self.place(number, size.into(), made.places());
            *queue = Some(made);
        }
        self.ready();
        queues
    }
}

/// A queue, as an honest driver has it; everything can be forged.
#[derive(Clone, Copy)]
pub struct Queue {
    pub device: Device,
    pub number: u32,
    pub size: u16,
    memory: u64,
    /// What the available ring's index is next.
    pub offered: u16,
    seen: u16,
}

impl Queue {
    /// Where its descriptors and rings are.
    pub fn places(self) -> [u64; 3] {
        [self.memory, self.memory + AVAILABLE_AT, self.memory + USED_AT]
    }

    /// Writes a descriptor.
    pub fn describe(self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        describe(self.memory + 16 * u64::from(index), address, length, flags, next);
    }

    /// Makes a chain available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.size);
        poke(self.memory + AVAILABLE_AT + 4 + 2 * slot, head);
        self.publish(self.offered.wrapping_add(1));
    }

    /// Moves the available ring's index.
    pub fn publish(&mut self, index: u16) {
        self.offered = index;
        fence();
        poke(self.memory + AVAILABLE_AT + 2, index);
        fence();
    }

    pub fn notify(self) {
        self.device.write(register::NOTIFY, self.number);
    }

    /// The next chain that came back, and the bytes that were written to it.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        fence();
        if peek::<u16>(self.memory + USED_AT + 2) == self.seen {
            return None;
        }
        fence();
        let at = self.memory + USED_AT + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((peek(at), peek(at + 4)))
    }

    /// Waits for it. `None` after a long time.
    pub fn wait(&mut self) -> Option<(u32, u32)> {
        let begun = cycles();
        loop {
            if let Some(used) = self.take() {
                return Some(used);
            }
            if cycles().wrapping_sub(begun) > PATIENCE {
                return None;
            }
            core::hint::spin_loop();
        }
    }
}

/// Writes a descriptor anywhere.
pub fn describe(at: u64, address: u64, length: u32, flags: u16, next: u16) {
    poke(at, address);
    poke(at + 8, length);
    poke(at + 12, flags);
    poke(at + 14, next);
}

/// The devices: QEMU names them on the command line (`virtio_mmio.device=512@0xfeb00000:5`), the built-in machine's are
/// where they always are.
pub fn devices(command_line: &str) -> [Option<Device>; MOST] {
    let mut found = [None; MOST];
    let mut slots = found.iter_mut();
    let mut add = |base: u64| {
        let device = Device { base, kind: peek(base + register::DEVICE) };
        if peek::<u32>(base + register::MAGIC) == MAGIC
            && device.kind != 0
            && let Some(slot) = slots.next()
        {
            *slot = Some(device);
        }
    };
    let mut named = false;
    for word in command_line.split_whitespace() {
        let place = word.strip_prefix("virtio_mmio.device=").and_then(|rest| rest.split_once("@0x"));
        let base = place.and_then(|(_, rest)| rest.split(':').next()).and_then(|hex| u64::from_str_radix(hex, 16).ok());
        if let Some(base) = base.filter(|base| (machine::DEVICES..machine::DEVICES_END - 0x1000).contains(base)) {
            named = true;
            add(base);
        }
    }
    if !named {
        (0..BUILT_IN_MOST).for_each(|slot| add(BUILT_IN + slot * BUILT_IN_SIZE));
    }
    found
}
