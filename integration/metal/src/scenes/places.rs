//! Queues in places and of sizes that are none, notifications of nothing, status bits in any order. A machine may end a
//! VM for it.

use crate::{
    Guest,
    machine::{MEMORY, MEMORY_END, poke, say},
    scenes::chains::{NOWHERE, honest, pause},
    virtio::{Device, LARGEST, QUEUE_BYTES, register},
};

pub fn play(guest: &Guest<'_>) {
    for device in guest.devices() {
        notifications(device);
        flags(device);
        sizes(device);
        places(device);
        say!("fine device {} after all places", device.kind);
    }
}

/// Queues that are not in memory.
fn places(device: Device) {
    let good = [MEMORY, MEMORY + 0x8000, MEMORY + 0xa000];
    for which in 0..3 {
        for address in NOWHERE.into_iter().chain([1, 0, MEMORY_END + 1, 0xffff_fff0, 0x1_0000_0000 - 64]) {
            if !device.begin(0) {
                continue;
            }
            let mut places = good;
            places[which] = address;
            for number in 0..8 {
                let size = device.largest(number);
                if size > 0 {
                    device.place(number, size.into(), places);
                }
            }
            device.ready();
            (0..8).for_each(|number| device.write(register::NOTIFY, number));
            pause();
        }
    }
    // All in one place.
    if device.begin(0) {
        for number in 0..8 {
            let size = device.largest(number);
            if size > 0 {
                device.place(number, size.into(), [MEMORY; 3]);
            }
        }
        poke(MEMORY + 2, 100u16);
        device.ready();
        (0..8).for_each(|number| device.write(register::NOTIFY, number));
        pause();
    }
    honest(device, "queues elsewhere");
}

/// Queues of sizes that are none.
fn sizes(device: Device) {
    for size in [0, 3, 7, u32::from(LARGEST) + 1, 2048, 0x8000, 0xffff, 0x1_0000, u32::MAX] {
        if !device.begin(0) {
            continue;
        }
        for number in 0..8 {
            let at = MEMORY + u64::from(number) * QUEUE_BYTES;
            device.place(number, size, [at, at + 0x8000, at + 0xa000]);
        }
        device.ready();
        (0..8).for_each(|number| device.write(register::NOTIFY, number));
        pause();
    }
    honest(device, "sizes of queues");
}

/// Notifications of queues that are not there, or not yet.
fn notifications(device: Device) {
    device.reset();
    for number in (0..16).chain([0x7fff_ffff, u32::MAX]) {
        device.write(register::NOTIFY, number);
    }
    if device.begin(0) {
        (0..16).for_each(|number| device.write(register::NOTIFY, number));
        device.ready();
        for number in (0..16).chain([0x7fff_ffff, u32::MAX]) {
            device.write(register::NOTIFY, number);
        }
    }
    honest(device, "notifications of nothing");
}

/// Status bits in any order, and resets in between.
fn flags(device: Device) {
    for value in 0..=255 {
        device.write(register::STATUS, value);
        device.write(register::NOTIFY, 0);
        if value % 16 == 0 {
            device.reset();
        }
    }
    honest(device, "status bits");
}
