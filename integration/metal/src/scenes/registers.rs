//! Registers that are read and written at random: every offset, every width, in any order.

use crate::{
    Guest,
    fuse::Fuse,
    machine::{MEMORY, peek, poke, say},
    virtio::{Device, FS},
};

/// Accesses to each device.
const ACCESSES: u32 = 20_000;
/// Bytes of a device's registers and configuration that are tried: QEMU's devices have 512 each.
const BYTES: u64 = 0x200;
/// Values that mean something to somebody.
const VALUES: [u64; 12] = [0, 1, 2, 3, 7, 8, 15, 1 << 15, 1 << 31, 0xffff_ffff, MEMORY, u64::MAX];

/// A generator of numbers that are the same each time (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}

pub fn play(guest: &Guest<'_>) {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for device in guest.devices() {
        every(device);
        random(device, &mut numbers);
        device.reset();
        if device.kind == FS
            && let Some(mut fuse) = Fuse::start(device, 0, MEMORY)
            && !fuse.alive()
        {
            say!("WRONG: no answer after random registers");
        }
        device.reset();
        say!("fine device {} after random registers", device.kind);
    }
}

/// Reads each offset in each width, and writes back what it was.
fn every(device: Device) {
    for offset in 0..BYTES - 8 {
        let at = device.base + offset;
        poke(at, peek::<u8>(at));
        poke(at, peek::<u16>(at));
        poke(at, peek::<u32>(at));
        poke(at, peek::<u64>(at));
    }
}

fn random(device: Device, numbers: &mut Numbers) {
    for _ in 0..ACCESSES {
        let any = numbers.below(BYTES - 8);
        // Most are where a register is.
        let at = device.base + if numbers.below(4) > 0 { any & !3 } else { any };
        let chosen = usize::try_from(numbers.below(VALUES.len() as u64)).ok().and_then(|n| VALUES.get(n));
        let value = if numbers.below(4) > 0 { chosen.copied().unwrap_or(0) } else { numbers.next() };
        let half = u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        match numbers.below(16) {
            0 => _ = peek::<u8>(at),
            1 => _ = peek::<u16>(at),
            2 => _ = peek::<u32>(at),
            3 => _ = peek::<u64>(at),
            4 => poke(at, half.to_le_bytes()[0]),
            5 => poke(at, u16::try_from(half & 0xffff).unwrap_or(0)),
            6 => poke(at, value),
            _ => poke(at, half),
        }
    }
}
