//! Chains as no driver makes them, on every device. After each the device is reset; a share then serves honest requests
//! again.

use crate::{
    Guest,
    fuse::Fuse,
    machine::{MEMORY, cycles, say},
    virtio::{Device, FS, INDIRECT, NEXT, QUEUES, Queue, TABLE, WRITE, describe},
};

/// Memory beside the queues': buffers, tables.
const BUFFER: u64 = MEMORY + 0x20_0000;
const TABLE_AT: u64 = MEMORY + 0x30_0000;
/// How long a device may take for a trick before it is reset: it need not do anything.
const PAUSE: u64 = 20_000_000;
/// Where neither machine has memory: the last bytes of the address space, what has devices, what nobody has.
pub const NOWHERE: [u64; 7] =
    [u64::MAX, u64::MAX - 4095, 1 << 63, 0xd000_0000, 0xfee0_0000, 0x00ff_ffff_f000, 0x7fff_ffff_f000];

type Trick = fn(&mut Queue);

const TRICKS: [(&str, Trick); 20] = [
    ("a descriptor that is its own next", itself),
    ("a circle of descriptors", circle),
    ("a circle of what is written", written_circle),
    ("a chain beyond the table", beyond),
    ("a head beyond the table", head_beyond),
    ("buffers where no memory is", nowhere),
    ("buffers that wrap around", wrapping),
    ("buffers across the end of memory", across),
    ("buffers of several GiB", vast),
    ("empty buffers", empty),
    ("nothing to read", unreadable),
    ("nothing to write", unwritable),
    ("written before read", backwards),
    ("a table in a table", nested),
    ("a table that is its own", own_table),
    ("a table of odd size", odd_table),
    ("a table of 4 GiB", vast_table),
    ("a table where no memory is", lost_table),
    ("tables with circles", circular_table),
    ("an index that jumps", jump),
];

/// Waits a while, without a clock.
pub fn pause() {
    let begun = cycles();
    while cycles().wrapping_sub(begun) < PAUSE {
        core::hint::spin_loop();
    }
}

pub fn play(guest: &Guest<'_>) {
    for device in guest.devices() {
        for (what, trick) in TRICKS {
            for number in 0..QUEUES {
                for features in [0, INDIRECT] {
                    let queues = device.start(features, 256, MEMORY);
                    if let Some(Some(mut queue)) = queues.get(number).copied() {
                        trick(&mut queue);
                        queue.notify();
                        pause();
                    }
                }
            }
            honest(device, what);
        }
    }
    say!("fine all devices");
}

/// The device can be used as ever.
pub fn honest(device: Device, what: &str) {
    device.reset();
    if device.kind == FS
        && let Some(mut fuse) = Fuse::start(device, 0, MEMORY)
        && !fuse.alive()
    {
        say!("WRONG: no answer after {what}");
    }
    device.reset();
    say!("fine device {} after {what}", device.kind);
}

fn itself(queue: &mut Queue) {
    queue.describe(0, BUFFER, 64, NEXT, 0);
    queue.offer(0);
    queue.describe(1, BUFFER, 64, NEXT | WRITE, 1);
    queue.offer(1);
}

fn circle(queue: &mut Queue) {
    for index in 0..queue.size {
        queue.describe(index, BUFFER, 16, NEXT, (index + 1) % queue.size);
    }
    (0..queue.size).for_each(|head| queue.offer(head));
}

fn written_circle(queue: &mut Queue) {
    for index in 0..queue.size {
        queue.describe(index, BUFFER, 16, NEXT | WRITE, (index + 1) % queue.size);
    }
    (0..queue.size).for_each(|head| queue.offer(head));
}

fn beyond(queue: &mut Queue) {
    for (head, next) in (0..).zip([queue.size, queue.size + 1, u16::MAX]) {
        queue.describe(head, BUFFER, 64, NEXT, next);
        queue.offer(head);
    }
}

fn head_beyond(queue: &mut Queue) {
    for head in [queue.size, queue.size + 1, 0x8000, u16::MAX] {
        queue.offer(head);
    }
}

/// A chain of something to read and something to write.
fn pair(queue: &mut Queue, address: u64, length: u32) {
    let head = queue.offered * 2 % queue.size;
    queue.describe(head, address, length, NEXT, head + 1);
    queue.describe(head + 1, address, length, WRITE, 0);
    queue.offer(head);
}

fn nowhere(queue: &mut Queue) {
    for address in NOWHERE {
        for length in [1, 64, 4096] {
            pair(queue, address, length);
        }
    }
}

fn wrapping(queue: &mut Queue) {
    for address in [u64::MAX, u64::MAX - 15, u64::MAX - 0xffff_fffe, BUFFER] {
        pair(queue, address, u32::MAX);
    }
}

fn across(queue: &mut Queue) {
    // Low memory's end, at the sizes that VMs have; and the hole's on both machines.
    for end in (6..32).map(|n| 1u64 << n << 20).chain([0xc000_0000, 0x1_0000_0000]) {
        pair(queue, end - 8, 64);
        queue.notify();
    }
}

fn vast(queue: &mut Queue) {
    // QEMU's own devices take their time for it, in which QEMU does nothing else: minutes for a balloon's pages.
    let length = if queue.device.is_ours() { 0x0300_0000 } else { 0x4000 };
    for index in 0..queue.size {
        let flags = if index + 1 < queue.size { NEXT } else { 0 };
        queue.describe(index, BUFFER, length, flags | if index >= queue.size / 2 { WRITE } else { 0 }, index + 1);
    }
    queue.offer(0);
}

fn empty(queue: &mut Queue) {
    pair(queue, BUFFER, 0);
    pair(queue, 0, 0);
    pair(queue, u64::MAX, 0);
    for index in 8..queue.size {
        queue.describe(index, BUFFER, 0, if index + 1 < queue.size { NEXT } else { 0 }, index + 1);
    }
    queue.offer(8);
}

fn unreadable(queue: &mut Queue) {
    for length in [1, 15, 16, 64, 65536] {
        let head = queue.offered % queue.size;
        queue.describe(head, BUFFER, length, WRITE, 0);
        queue.offer(head);
    }
}

fn unwritable(queue: &mut Queue) {
    for length in [1, 15, 16, 44, 64, 65536] {
        let head = queue.offered % queue.size;
        queue.describe(head, BUFFER, length, 0, 0);
        queue.offer(head);
    }
}

fn backwards(queue: &mut Queue) {
    queue.describe(0, BUFFER, 64, NEXT | WRITE, 1);
    queue.describe(1, BUFFER, 64, NEXT, 2);
    queue.describe(2, BUFFER, 64, WRITE, 0);
    queue.offer(0);
}

/// Offers a table.
fn table(queue: &mut Queue, address: u64, length: u32, flags: u16) {
    let head = queue.offered % queue.size;
    queue.describe(head, address, length, TABLE | flags, (head + 1) % queue.size);
    queue.offer(head);
}

fn nested(queue: &mut Queue) {
    describe(TABLE_AT, TABLE_AT + 4096, 32, TABLE, 0);
    describe(TABLE_AT + 4096, BUFFER, 64, NEXT, 1);
    describe(TABLE_AT + 4112, BUFFER, 64, WRITE, 0);
    table(queue, TABLE_AT, 16, 0);
    table(queue, TABLE_AT, 16, NEXT);
    table(queue, TABLE_AT, 16, WRITE);
}

fn own_table(queue: &mut Queue) {
    describe(TABLE_AT, TABLE_AT, 16, TABLE | NEXT, 0);
    table(queue, TABLE_AT, 16, 0);
    // And the queue's own descriptors.
    let [descriptors, ..] = queue.places();
    table(queue, descriptors, 16 * u32::from(queue.size), 0);
}

fn odd_table(queue: &mut Queue) {
    describe(TABLE_AT, BUFFER, 64, 0, 0);
    for length in [0, 1, 15, 17, 31] {
        table(queue, TABLE_AT, length, 0);
    }
    for shift in [1, 3, 8] {
        table(queue, TABLE_AT + shift, 16, 0);
    }
}

fn vast_table(queue: &mut Queue) {
    for index in 0..0x1_0000u64 {
        let next = u16::try_from((index + 1) % 0x1_0000).unwrap_or(0);
        describe(TABLE_AT + 16 * index, BUFFER, 16, NEXT, next);
    }
    for length in [16 * 0x1_0000, 16 * 0x1_0001, 0xffff_fff0] {
        table(queue, TABLE_AT, length, 0);
    }
}

fn lost_table(queue: &mut Queue) {
    for address in NOWHERE {
        table(queue, address, 64, 0);
    }
}

fn circular_table(queue: &mut Queue) {
    for (at, index) in (0..4).map(|index| (TABLE_AT + 16 * u64::from(index), index)) {
        describe(at, BUFFER, 16, NEXT | if index > 1 { WRITE } else { 0 }, (index + 1) % 4);
    }
    table(queue, TABLE_AT, 64, 0);
    describe(TABLE_AT + 16, BUFFER, 16, NEXT, u16::MAX);
    table(queue, TABLE_AT, 64, 0);
}

fn jump(queue: &mut Queue) {
    queue.describe(0, BUFFER, 64, WRITE, 0);
    for index in [queue.size + 1, 0x8000, u16::MAX, 0, 1] {
        queue.publish(index);
        queue.notify();
    }
}
