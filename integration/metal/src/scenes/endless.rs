//! Requests and notifications without an end: what is valid, what is not, and for every device.

use crate::{
    Guest,
    fuse::{BUFFER, Fuse, HEADER, ROOT, op},
    machine::{MEMORY, poke, say},
    virtio::{FS, NEXT, QUEUES, Queue, WRITE},
};

/// Chains that are on their way at a time.
const BATCH: u16 = 100;

pub fn play(guest: &Guest<'_>) {
    let mut others: [Option<Queue>; 4 * QUEUES] = [None; 4 * QUEUES];
    let mut slots = others.iter_mut();
    let elsewhere = guest.devices().filter(|device| device.kind != FS);
    for (device, memory) in elsewhere.take(4).zip((MEMORY + 0x100_0000..).step_by(0x10_0000)) {
        for queue in device.start(0, 128, memory).into_iter().flatten() {
            if let Some(slot) = slots.next() {
                *slot = Some(queue);
            }
        }
    }
    let Some(mut fuse) = guest.device(FS).and_then(|device| Fuse::start(device, 0, MEMORY)) else {
        return say!("WRONG: no share");
    };
    say!("endless");
    let mut round = 0u32;
    loop {
        for index in 0..BATCH {
            let at = fuse.request + u64::from(index) * 0x100;
            // One in ten is a mistake, which the host may log.
            let opcode = if index % 10 == 0 { op::LOOKUP } else { op::GETATTR };
            fuse.head(at, HEADER + 16, opcode, ROOT);
            poke(at + 40, u64::MAX);
            poke(at + 48, u64::MAX);
            fuse.queue.describe(2 * index, at, HEADER + 16, NEXT, 2 * index + 1);
            fuse.queue.describe(2 * index + 1, fuse.reply, BUFFER, WRITE, 0);
            fuse.queue.offer(2 * index);
            fuse.queue.notify();
        }
        for queue in others.iter_mut().flatten() {
            let buffer = MEMORY + 0x200_0000;
            let head = queue.offered % 64 * 2;
            queue.describe(head, buffer, 64, NEXT, head + 1);
            queue.describe(head + 1, buffer + 4096, 4096, WRITE, 0);
            queue.offer(head);
            queue.notify();
            while queue.take().is_some() {}
        }
        for _ in 0..BATCH {
            if fuse.queue.wait().is_none() {
                say!("WRONG: silence in round {round}");
            }
        }
        round = round.wrapping_add(1);
        if round.is_multiple_of(100) {
            say!("round {round}");
        }
    }
}
