use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Queue,
    testing::{Buffer, Ring, SIZE, memory, readable_within},
};

const ROOM: u64 = 0x10_0000;

struct Guest {
    memory: Memory,
    device: Rng,
    ring: Ring,
    queue: Queue,
}

impl Guest {
    fn new() -> Self {
        let ring = Ring::new(0x1_0000, 1024);
        let queue = ring.queue();
        Self { memory: memory(), device: Rng::new().unwrap(), ring, queue }
    }

    fn run(&mut self) -> Kicks {
        self.device.queue(0, &mut [Some(&mut self.queue)], &self.memory).unwrap()
    }

    fn ask(&mut self, buffers: &[Buffer]) -> u32 {
        self.ring.add(&self.memory, buffers);
        assert!(self.run().contains(REQUESTS));
        self.ring.take_used(&self.memory).unwrap().1
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(ROOM)).unwrap();
        bytes
    }
}

fn room(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: true }
}

#[test]
fn requests_are_filled_with_bytes_that_differ() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(&[room(ROOM, 64)]), 64);
    let first = guest.bytes(64);
    assert_eq!(guest.ask(&[room(ROOM, 10), room(ROOM + 10, 0), room(ROOM + 10, 54)]), 64);
    assert_ne!(guest.bytes(64), first);
    assert_eq!(guest.bytes(65)[64], 0);
    assert_eq!(guest.device.mistakes.total(), 0);
}

#[test]
fn a_request_gets_so_much() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(&[room(ROOM, 1 << 20)]), 4096);
    assert_eq!(guest.bytes(1 << 20)[4096..], vec![0; (1 << 20) - 4096]);
}

#[test]
fn a_flood_waits_for_the_next_period() {
    let mut guest = Guest::new();
    for _ in 0..100 {
        guest.ring.add(&guest.memory, &[room(ROOM, 4096)]);
    }
    guest.run();
    // Asking again does not help, nor does a reset.
    guest.device.reset();
    guest.run();
    let mut used = || std::iter::from_fn(|| guest.ring.take_used(&guest.memory)).count();
    assert_eq!(used(), 16);
    assert!(readable_within(&guest.device.timer, 10_000));
    guest.device.source(0, &mut [Some(&mut guest.queue)], &guest.memory).unwrap();
    assert_eq!(used(), 16);
}

#[test]
fn small_and_bad_requests_use_the_budget_up_too() {
    for buffer in [room(ROOM, 1), room(ROOM, 0), room(u64::MAX, 1), Buffer { writable: false, ..room(ROOM, 1) }] {
        let mut guest = Guest::new();
        let mut count = 0;
        for _ in 0..4 {
            for _ in 0..1000 {
                guest.ring.add(&guest.memory, &[buffer]);
            }
            guest.device.queue(0, &mut [Some(&mut guest.queue)], &guest.memory).unwrap();
            let used = std::iter::from_fn(|| guest.ring.take_used(&guest.memory)).count();
            count += used;
            if used < 1000 {
                break;
            }
        }
        assert_eq!(count, BUDGET / COST, "{buffer:?}");
    }
}

#[test]
fn malformed_chains_are_counted_and_returned() {
    let mut guest = Guest::new();
    let size = u64::try_from(SIZE).unwrap();
    let bad = [
        Buffer { writable: false, ..room(ROOM, 64) },
        room(ROOM, 0),
        room(size - 8, 16),
        room(size, 1),
        room(u64::MAX, 1),
    ];
    for (i, buffer) in bad.iter().enumerate() {
        assert_eq!(guest.ask(&[*buffer]), 0);
        assert_eq!(guest.device.mistakes.total(), u64::try_from(i + 1).unwrap(), "{buffer:?}");
    }
    guest.ring.add_endless(&guest.memory, &[room(ROOM, 1)]);
    guest.run();
    assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 1024);
    assert_eq!(guest.ask(&[room(ROOM, 8)]), 8);
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.ring.set_index(&guest.memory, 2000);
    let run = guest.device.queue(0, &mut [Some(&mut guest.queue)], &guest.memory);
    assert!(matches!(run, Err(Error::Ring(_))));
    assert!(guest.device.queue(0, &mut [None], &guest.memory).unwrap().is_empty());
}
