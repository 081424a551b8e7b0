use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Queue,
    testing::{Buffer, Ring, SIZE, memory, readable_within},
};

const DATA: u64 = 0x10_0000;

struct Guest {
    memory: Memory,
    device: Console,
    reader: io::PipeReader,
    tx: Ring,
    rx_queue: Queue,
    tx_queue: Queue,
}

impl Guest {
    fn new() -> Self {
        let (reader, writer) = io::pipe().unwrap();
        let device = Console::new(writer.into()).unwrap();
        let (rx, tx) = (Ring::new(0x1_0000, 64), Ring::new(0x2_0000, 256));
        let (rx_queue, tx_queue) = (rx.queue(), tx.queue());
        Self { memory: memory(), device, reader, tx, rx_queue, tx_queue }
    }

    fn run(&mut self) -> Kicks {
        let mut queues = [Some(&mut self.rx_queue), Some(&mut self.tx_queue)];
        self.device.queue(1, &mut queues, &self.memory).unwrap()
    }

    fn readable(address: u64, len: u32) -> Buffer {
        Buffer { address, len, writable: false }
    }

    fn print(&mut self, text: &[u8]) {
        self.memory.write_slice(text, GuestAddress(DATA)).unwrap();
        self.tx.add(&self.memory, &[Self::readable(DATA, u32::try_from(text.len()).unwrap())]);
        assert!(self.run().contains(TX));
        assert_eq!(self.tx.take_used(&self.memory).unwrap().1, 0);
    }

    /// What is in the pipe, which is less than it can hold.
    fn output(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut part = [0; 4096];
        while readable_within(&self.reader, 0) {
            let count = self.reader.read(&mut part).unwrap();
            if count == 0 {
                break;
            }
            bytes.extend(&part[..count]);
        }
        bytes
    }
}

#[test]
fn output_arrives() {
    let mut guest = Guest::new();
    guest.print(b"hello ");
    guest.memory.write_slice(b"worldxx!\n", GuestAddress(DATA)).unwrap();
    let parts = [Guest::readable(DATA, 5), Guest::readable(DATA + 7, 0), Guest::readable(DATA + 7, 2)];
    guest.tx.add(&guest.memory, &parts);
    guest.run();
    assert_eq!(guest.output(), b"hello world!\n");
    assert_eq!((guest.device.dropped().bytes(), guest.device.mistakes.total()), (0, 0));
}

#[test]
fn a_slow_reader_loses_output_and_stops_nobody() {
    let mut guest = Guest::new();
    let dropped = guest.device.dropped();
    let page = [b'x'; 4096];
    for _ in 0..100 {
        guest.print(&page);
    }
    let arrived = u64::try_from(guest.output().len()).unwrap();
    assert!(arrived >= 4096, "{arrived}");
    assert_eq!(arrived + dropped.bytes(), 100 * 4096);
    guest.print(b"later");
    assert_eq!(guest.output(), b"later");
}

#[test]
fn a_reader_that_is_gone_stops_nobody() {
    let mut guest = Guest::new();
    let (reader, _) = io::pipe().unwrap();
    drop(std::mem::replace(&mut guest.reader, reader));
    guest.print(b"nobody");
    guest.print(b"there");
    assert_eq!(guest.device.dropped().bytes(), 11);
}

#[test]
fn a_socket_will_do() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut guest = Guest { device: Console::new(ours.into()).unwrap(), ..Guest::new() };
    guest.print(b"socket");
    let mut bytes = [0; 6];
    theirs.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"socket");
    // What comes from there is input, of which there is none.
    theirs.write_all(b"input").unwrap();
    guest.run();
}

#[test]
fn malformed_chains_are_counted_and_returned() {
    let mut guest = Guest::new();
    let size = u64::try_from(SIZE).unwrap();
    let bad = [
        vec![Buffer { address: DATA, len: 8, writable: true }],
        vec![Guest::readable(DATA, 0)],
        vec![Guest::readable(size - 4, 8)],
        vec![Guest::readable(size, 8)],
        vec![Guest::readable(u64::MAX - 3, 8)],
        vec![Guest::readable(DATA, 8), Guest::readable(size << 8, 1)],
    ];
    for (i, chain) in bad.iter().enumerate() {
        guest.tx.add(&guest.memory, chain);
        assert!(guest.run().contains(TX));
        assert_eq!(guest.tx.take_used(&guest.memory).unwrap().1, 0);
        assert_eq!(guest.device.mistakes.total(), u64::try_from(i + 1).unwrap(), "{chain:?}");
    }
    assert_eq!(guest.output(), b"");
    guest.print(b"fine");
    assert_eq!(guest.output(), b"fine");
}

#[test]
fn endless_and_huge_chains_end() {
    let mut guest = Guest::new();
    guest.tx.add_endless(&guest.memory, &[Guest::readable(DATA, 1), Guest::readable(DATA, 2)]);
    guest.run();
    // As many buffers as the queue is long.
    assert_eq!(guest.output().len(), 128 + 256);
    guest.tx.add(&guest.memory, &[Guest::readable(0, 32 << 20)]);
    guest.run();
    assert_eq!(guest.device.mistakes.total(), 1);
    assert!(guest.output().len() <= CHAIN);
    let many = vec![Guest::readable(DATA, 1); 4000];
    guest.tx.add_indirect(&guest.memory, 0x100_0000, &many);
    guest.run();
    assert_eq!(guest.output().len(), 4000);
}

#[test]
fn a_flood_is_served_in_portions() {
    let mut guest = Guest::new();
    for _ in 0..200 {
        guest.tx.add(&guest.memory, &[Guest::readable(DATA, 1)]);
    }
    guest.run();
    assert_eq!(guest.output().len(), BATCH);
    for left in [200 - 2 * BATCH, 200 - 3 * BATCH, 0] {
        assert!(readable_within(&guest.device.wake, 0));
        let mut queues = [Some(&mut guest.rx_queue), Some(&mut guest.tx_queue)];
        guest.device.source(0, &mut queues, &guest.memory).unwrap();
        let done = guest.output().len();
        assert!(done == BATCH || left == 0);
    }
    assert!(!readable_within(&guest.device.wake, 0));
    while guest.tx.take_used(&guest.memory).is_some() {}
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.tx.set_index(&guest.memory, 2000);
    let mut queues = [Some(&mut guest.rx_queue), Some(&mut guest.tx_queue)];
    assert!(matches!(guest.device.queue(1, &mut queues, &guest.memory), Err(Error::Ring(_))));
    assert!(guest.device.queue(1, &mut [None, None], &guest.memory).unwrap().is_empty());
    assert!(guest.device.queue(1, &mut [], &guest.memory).unwrap().is_empty());
}
