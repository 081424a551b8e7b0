//! Requests whose lengths are lies: of the header, of the chain, of the room for the reply, of what they ask for.

use crate::{
    Guest,
    fuse::{Answer, BUFFER, Fuse, HEADER, ROOT, op},
    machine::{MEMORY, clear, poke, say},
    virtio::{FS, NEXT, Queue, WRITE},
};

/// What a header says of its request's length; 0 stands for what is there.
const CLAIMS: [u32; 9] = [0, 1, 39, 40, 56, 1 << 20, (1 << 20) + 4096, (1 << 20) + 4097, u32::MAX];
/// What the chain has of it.
const BYTES: [u32; 6] = [1, 39, 40, 41, 104, 4096];
/// Room for the reply.
const ROOM: [u32; 6] = [0, 1, 15, 16, 17, 4096];
/// Opcodes that do not exist, after those that may.
const LAST: u32 = 64;
const UNKNOWN: [u32; 4] = [4096, 1 << 20, 1 << 31, u32::MAX];
/// Requests of a storm, and chains that are on their way at a time: two descriptors each.
const STORM: u32 = 50_000;
const BATCH: u16 = 64;
const SLOT: u64 = 0x4000;
/// A gigantic reply's room: so many descriptors of the same memory.
const PIECES: u16 = 200;
const PIECE: u32 = 1 << 20;

pub fn play(guest: &Guest<'_>) {
    let Some(device) = guest.device(FS) else { return say!("WRONG: no share") };
    let queues = device.start(0, u16::MAX, MEMORY);
    // The first is for what has to be fast, the others are for requests: all are asked everything.
    for queue in queues.iter().flatten() {
        lengths(*queue);
    }
    // A session from the start, as the lies may have ended the one before.
    let Some(mut fuse) = Fuse::start(device, 0, MEMORY) else { return };
    // A file is made where the guest may make one.
    let Some(home) = fuse.home(guest.own) else { return };
    gigantic(&mut fuse, home.rootfs);
    forgets(&mut fuse);
    if let Some(mut fuse) = Fuse::start(device, 0, MEMORY) {
        report(fuse.alive(), "honest requests after all of it");
    }
}

fn report(fine: bool, what: &str) {
    match fine {
        true => say!("fine {what}"),
        false => say!("WRONG: {what}"),
    }
}

/// Every opcode with every lie about lengths.
fn lengths(queue: Queue) {
    let mut fuse = Fuse::on(queue, MEMORY + 0x10_0000);
    // Of what is served while the next ones are written, each has its place in memory.
    for at in (0..u64::from(BATCH)).map(|slot| fuse.request + slot * SLOT) {
        (at..at + 4096).step_by(8).for_each(|field| poke(field, 0x0061_0062_0063_0064u64));
    }
    let mut sent = 0u32;
    let mut on_the_way = 0u16;
    for opcode in (0..=LAST).chain(UNKNOWN) {
        for claim in CLAIMS {
            for bytes in BYTES {
                for room in ROOM {
                    let at = fuse.request + u64::from(on_the_way) * SLOT;
                    let reply = at + SLOT / 2;
                    fuse.head(at, if claim == 0 { bytes } else { claim }, opcode, ROOT);
                    let head = on_the_way * 2;
                    fuse.queue.describe(head, at, bytes, if room > 0 { NEXT } else { 0 }, head + 1);
                    fuse.queue.describe(head + 1, reply, room, WRITE, 0);
                    fuse.queue.offer(head);
                    on_the_way += 1;
                    sent += 1;
                    if on_the_way == BATCH {
                        fuse.queue.notify();
                        if !collect(&mut fuse, on_the_way) {
                            return say!(
                                "WRONG: silence after {sent} requests, opcode {opcode} of queue {}",
                                queue.number
                            );
                        }
                        on_the_way = 0;
                    }
                }
            }
        }
    }
    fuse.queue.notify();
    report(collect(&mut fuse, on_the_way), "lies about lengths");
    say!("queue {} took {sent} requests", queue.number);
    report(fuse.init() && fuse.alive(), "honest requests after lies about lengths");
}

/// Waits for so many chains.
fn collect(fuse: &mut Fuse, count: u16) -> bool {
    (0..count).all(|_| fuse.queue.wait().is_some())
}

/// READ, READDIR and lists of attributes of 4 GiB, with room for much of it.
fn gigantic(fuse: &mut Fuse, dir: u64) {
    let make = [2u32 | 0o100, 0o100_666, 0, 0].map(u32::to_le_bytes);
    if !matches!(fuse.call(op::CREATE, dir, &[make.as_flattened(), b"large\0"]), Answer::Done(_)) {
        return say!("WRONG: no file");
    }
    let (file, handle) = (fuse.field(0), fuse.field(128));
    // A file of 1 TiB, which has nothing in it.
    let mut size = [0; 88];
    size[0] = 1 << 3;
    size[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    if !matches!(fuse.call(op::SETATTR, file, &[&size]), Answer::Done(_)) {
        say!("refused a file of 1 TiB");
    }
    if !matches!(fuse.call(op::OPENDIR, ROOT, &[&[0; 8]]), Answer::Done(_)) {
        return say!("WRONG: no directory");
    }
    let directory = fuse.field(0);
    for size in [1 << 20, (1 << 20) + 1, 64 << 20, u32::MAX] {
        for (opcode, node, handle) in
            [(op::READ, file, handle), (op::READDIR, ROOT, directory), (op::READDIRPLUS, ROOT, directory)]
        {
            let mut body = [0; 40];
            body[..8].copy_from_slice(&handle.to_le_bytes());
            body[16..20].copy_from_slice(&size.to_le_bytes());
            let length = fuse.prepare(opcode, node, &[&body]);
            wide(fuse, length, opcode, size);
        }
        for opcode in [op::LISTXATTR, op::GETXATTR] {
            let length = fuse.prepare(opcode, file, &[&u64::from(size).to_le_bytes(), b"user.x\0"]);
            wide(fuse, length, opcode, size);
        }
        // A request that is said to be followed by as much, and is not.
        let mut body = [0; 40];
        body[..8].copy_from_slice(&handle.to_le_bytes());
        body[16..20].copy_from_slice(&size.to_le_bytes());
        let length = fuse.prepare(op::WRITE, file, &[&body]);
        wide(fuse, length, op::WRITE, size);
        let length = fuse.prepare(op::BATCH_FORGET, ROOT, &[&size.to_le_bytes(), &[0; 4]]);
        wide(fuse, length, op::BATCH_FORGET, size);
    }
    // More than any file system has in one file: none of the host's disk is taken for it.
    let mut body = [0; 32];
    body[..8].copy_from_slice(&handle.to_le_bytes());
    body[16..24].copy_from_slice(&(1u64 << 62).to_le_bytes());
    let answer = fuse.call(op::FALLOCATE, file, &[&body]);
    report(matches!(answer, Answer::Refused(_)), "4 EiB are not to be had");
    report(fuse.alive(), "honest requests after gigantic ones");
}

/// Sends the request with room for 200 MiB, all of it the same one.
fn wide(fuse: &mut Fuse, length: u32, opcode: u32, size: u32) {
    fuse.queue.describe(0, fuse.request, length, NEXT, 1);
    fuse.queue.describe(1, fuse.reply, BUFFER, WRITE | NEXT, 2);
    for index in 2..PIECES {
        let flags = if index + 1 < PIECES { WRITE | NEXT } else { WRITE };
        fuse.queue.describe(index, MEMORY + 0x20_0000, PIECE, flags, index + 1);
    }
    fuse.queue.offer(0);
    fuse.queue.notify();
    match fuse.answer() {
        Answer::Done(bytes) => say!("fine opcode {opcode} of {size} bytes has {bytes}"),
        Answer::Refused(error) => say!("refused opcode {opcode} of {size} bytes {error}"),
        Answer::Dropped => say!("dropped opcode {opcode} of {size} bytes"),
        Answer::Silence => say!("WRONG: silence: opcode {opcode} of {size} bytes"),
    }
}

/// Forgets what it does not know, more often than it knew it.
fn forgets(fuse: &mut Fuse) {
    let mut sent = 0;
    while sent < STORM {
        for index in 0..BATCH {
            let at = fuse.request + u64::from(index) * 0x100;
            let node = match sent % 4 {
                0 => ROOT,
                1 => u64::from(sent),
                2 => u64::MAX - u64::from(sent),
                _ => 2,
            };
            fuse.head(at, HEADER + 8, op::FORGET, node);
            poke(at + 40, if sent.is_multiple_of(3) { u64::MAX } else { 1 });
            fuse.queue.describe(index, at, HEADER + 8, 0, 0);
            fuse.queue.offer(index);
            sent += 1;
        }
        fuse.queue.notify();
        if !collect(fuse, BATCH) {
            return say!("WRONG: silence after {sent} forgotten inodes");
        }
    }
    say!("fine {sent} forgotten inodes");
    // As many as fit, in one request, and as many as are claimed.
    clear(fuse.request, u64::from(BUFFER));
    for count in [0u32, 1, 4096, 65536, 65537, 1 << 28, u32::MAX] {
        fuse.prepare(op::BATCH_FORGET, ROOT, &[&count.to_le_bytes(), &[0; 4]]);
        let answer = fuse.send(BUFFER, 16);
        report(answer != Answer::Silence, "inodes forgotten together");
    }
    fuse.queue.describe(0, fuse.request, BUFFER, 0, 0);
    fuse.queue.offer(0);
    fuse.queue.notify();
    report(fuse.queue.wait().is_some(), "inodes forgotten together without room");
    // The root itself was forgotten, which only a new session undoes.
    match fuse.call(op::GETATTR, ROOT, &[&[0; 16]]) {
        Answer::Silence => say!("WRONG: silence after the root was forgotten"),
        _ => say!("fine the root was forgotten"),
    }
}
