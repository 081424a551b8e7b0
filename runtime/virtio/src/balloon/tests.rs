use std::{fs::File, os::unix::fs::MetadataExt};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use crate::{
    Queue,
    testing::{Buffer, Ring, SIZE, memory, readable_within},
};

const LIST: u64 = 0x10_0000;
/// Pages from here on are filled.
const PAGES: u64 = 0x20_0000;
const REPORT: usize = 2;

struct Guest {
    memory: Memory,
    device: Balloon,
    handle: Handle,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
}

impl Guest {
    fn new() -> Self {
        Self::with(memory())
    }

    fn with(memory: Memory) -> Self {
        let (mut device, handle) = Balloon::new().unwrap();
        device.activate(device.features());
        let rings: Vec<_> = (0..5).map(|i| Ring::new(0x1_0000 + 0x8000 * i, 1024)).collect();
        let queues = rings.iter().map(Ring::queue).collect();
        memory.write_slice(&vec![7; 64 * 4096], GuestAddress(PAGES)).unwrap();
        Self { memory, device, handle, rings, queues }
    }

    fn run(&mut self) -> Kicks {
        let mut queues: Vec<_> = self.queues.iter_mut().map(Some).collect();
        self.device.source(0, &mut queues, &self.memory).unwrap()
    }

    /// Sends one chain and expects it back.
    fn send(&mut self, queue: usize, buffers: &[Buffer]) {
        self.rings[queue].add(&self.memory, buffers);
        assert!(self.run().contains(queue));
        assert_eq!(self.rings[queue].take_used(&self.memory).unwrap().1, 0);
    }

    /// Inflates by these pages.
    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        self.send(INFLATE, &[Buffer { address: LIST, len: u32::try_from(bytes.len()).unwrap(), writable: false }]);
    }

    /// Which of the filled pages are zeros.
    fn gone(&self) -> Vec<u64> {
        let mut page = [0; 4096];
        let gone = |i: &u64| {
            self.memory.read_slice(&mut page, GuestAddress(PAGES + i * PAGE)).unwrap();
            page.iter().all(|byte| *byte == 0)
        };
        (0..64).filter(gone).collect()
    }
}

/// Number of one of the filled pages.
fn page(i: u64) -> u32 {
    u32::try_from((PAGES / PAGE) + i).unwrap()
}

fn range(address: u64, len: u64) -> Buffer {
    Buffer { address, len: u32::try_from(len).unwrap(), writable: true }
}

#[test]
fn pages_in_the_balloon_are_given_back() {
    let mut guest = Guest::new();
    guest.inflate(&[page(9), page(3), page(4), page(5), page(4)]);
    assert_eq!(guest.gone(), [3, 4, 5, 9]);
    assert_eq!(guest.handle.stats(), Stats { actual: 0, returned: 4 * PAGE, refused: 0 });
    guest.device.write_config(4, &4u32.to_le_bytes());
    assert_eq!(guest.handle.stats().actual, 4 * PAGE);
    // Taking them out needs nothing but an answer.
    guest.send(DEFLATE, &[Buffer { address: LIST, len: 16, writable: false }]);
    guest.memory.write_slice(b"used again", GuestAddress(PAGES + 3 * PAGE)).unwrap();
    assert_eq!(guest.gone(), [4, 5, 9]);
}

#[test]
fn reported_ranges_are_given_back() {
    for queue in [REPORT, 4] {
        let mut guest = Guest::new();
        guest.send(queue, &[range(PAGES + 8 * PAGE, 8 * PAGE), range(PAGES, PAGE), range(PAGES + PAGE, PAGE)]);
        assert_eq!(guest.gone(), [0, 1, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(guest.handle.stats().returned, 10 * PAGE);
        assert_eq!(guest.device.mistakes.total(), 0);
    }
}

#[test]
fn poisoned_pages_are_left_alone() {
    let mut guest = Guest::new();
    guest.device.write_config(12, &0xaa_u32.to_le_bytes());
    guest.send(REPORT, &[range(PAGES, PAGE)]);
    assert!(guest.gone().is_empty());
    guest.device.reset();
    guest.device.activate(REPORTING);
    guest.send(REPORT, &[range(PAGES, PAGE)]);
    assert_eq!(guest.gone(), [0]);
}

#[test]
fn shared_memory_gets_holes() {
    let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(SIZE.try_into().unwrap()).unwrap();
    let backing = FileOffset::new(file.try_clone().unwrap(), 0);
    let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), SIZE, Some(backing))]).unwrap();
    let mut guest = Guest::with(memory);
    let blocks = || file.metadata().unwrap().blocks();
    // The first round fills the rings' pages.
    guest.inflate(&[page(10)]);
    guest.send(REPORT, &[range(PAGES + 10 * PAGE, PAGE)]);
    let before = blocks();
    guest.inflate(&[page(0), page(1)]);
    guest.send(REPORT, &[range(PAGES + 4 * PAGE, 4 * PAGE)]);
    assert_eq!(before - blocks(), 6 * 8);
    assert_eq!(guest.gone(), [0, 1, 4, 5, 6, 7, 10]);
}

#[test]
fn ranges_may_span_regions_but_not_holes() {
    let regions = [(GuestAddress(0), 1 << 22), (GuestAddress(1 << 22), 1 << 22), (GuestAddress(3 << 22), 1 << 22)];
    let mut guest = Guest::with(GuestMemoryMmap::from_ranges(&regions).unwrap());
    let seam = 1u64 << 22;
    guest.memory.write_slice(&[7; 8192], GuestAddress(seam - PAGE)).unwrap();
    guest.send(REPORT, &[range(seam - PAGE, 2 * PAGE)]);
    let mut bytes = [7; 8192];
    guest.memory.read_slice(&mut bytes, GuestAddress(seam - PAGE)).unwrap();
    assert_eq!(bytes, [0; 8192]);
    // Up to the hole, into it, and over it.
    guest.send(REPORT, &[range(2 * seam - PAGE, PAGE)]);
    assert_eq!(guest.handle.stats().refused, 0);
    guest.send(REPORT, &[range(2 * seam - PAGE, 2 * PAGE), range(2 * seam, PAGE), range(seam, 2 * seam + PAGE)]);
    assert_eq!(guest.handle.stats().refused, 3);
    let in_hole = u32::try_from(2 * seam / PAGE).unwrap();
    guest.inflate(&[in_hole - 1, in_hole, in_hole + 1]);
    assert_eq!(guest.handle.stats().refused, 5);
}

#[test]
fn lies_are_refused_and_counted() {
    let mut guest = Guest::new();
    let size = u64::try_from(SIZE).unwrap();
    let lies = [
        range(PAGES + 1, PAGE),
        range(PAGES, PAGE - 1),
        range(PAGES, 0),
        range(size, PAGE),
        range(size - PAGE, 2 * PAGE),
        range(u64::MAX - 4095, PAGE),
        range(u64::MAX - 4095, 2 * PAGE),
    ];
    for (i, lie) in lies.iter().enumerate() {
        guest.send(REPORT, &[*lie]);
        assert_eq!(guest.handle.stats().refused, u64::try_from(i + 1).unwrap(), "{lie:?}");
    }
    guest.inflate(&[u32::MAX, u32::try_from(size / PAGE).unwrap()]);
    assert_eq!(guest.handle.stats(), Stats { actual: 0, returned: 0, refused: 9 });
    assert!(guest.gone().is_empty());
    // The truth beside a lie is still the truth.
    guest.send(REPORT, &[range(PAGES, PAGE), range(size, PAGE)]);
    assert_eq!(guest.gone(), [0]);
}

#[test]
fn malformed_chains_are_counted_and_returned() {
    let mut guest = Guest::new();
    let readable = |address, len| Buffer { address, len, writable: false };
    for (queue, buffer) in [
        (INFLATE, range(PAGES, PAGE)),
        (INFLATE, readable(LIST, 3)),
        (INFLATE, readable(LIST, 0)),
        (INFLATE, readable(u64::MAX, 4)),
        (REPORT, readable(PAGES, 4096)),
    ] {
        let before = guest.device.mistakes.total();
        guest.send(queue, &[buffer]);
        assert_eq!(guest.device.mistakes.total(), before + 1, "{queue} {buffer:?}");
    }
    assert!(guest.gone().is_empty());
    // Half a number at the end is none.
    guest.memory.write_slice(&page(1).to_le_bytes(), GuestAddress(LIST)).unwrap();
    guest.memory.write_slice(&page(2).to_le_bytes(), GuestAddress(LIST + 4)).unwrap();
    guest.send(INFLATE, &[readable(LIST, 2), readable(LIST + 2, 5)]);
    assert_eq!(guest.gone(), [1]);
}

#[test]
fn a_chain_gives_back_so_many_pages() {
    let mut guest = Guest::new();
    guest.rings[REPORT].add_endless(&guest.memory, &[range(PAGES, PAGE)]);
    guest.run();
    assert_eq!(guest.handle.stats().returned, PAGE);
    let many = vec![range(PAGES, PAGE); 5000];
    guest.rings[REPORT].add_indirect(&guest.memory, 0x80_0000, &many);
    // The guest's whole memory, as page numbers.
    guest.rings[INFLATE].add(&guest.memory, &[Buffer { address: 0, len: 32 << 20, writable: false }]);
    let before = guest.device.mistakes.total();
    guest.run();
    assert_eq!(guest.device.mistakes.total() - before, 2);
}

#[test]
fn a_flood_is_served_in_portions() {
    let mut guest = Guest::new();
    for _ in 0..100 {
        guest.rings[REPORT].add(&guest.memory, &[range(PAGES, PAGE)]);
    }
    for portion in [16, 16, 16, 16, 16, 16, 4] {
        guest.run();
        let used = std::iter::from_fn(|| guest.rings[REPORT].take_used(&guest.memory)).count();
        assert_eq!(used, portion);
        assert_eq!(readable_within(&guest.device.shared.wake, 0), portion == 16);
    }
}

#[test]
fn the_guest_is_told_of_a_target_once() {
    let mut guest = Guest::new();
    guest.handle.set_target(10 * PAGE + 1);
    assert!(readable_within(&guest.device.shared.wake, 0));
    assert!(guest.run().config_changed());
    assert_eq!(guest.device.config()[..4], [10, 0, 0, 0]);
    assert!(!guest.run().config_changed());
    guest.handle.set_target(u64::MAX);
    guest.run();
    assert_eq!(guest.device.config()[..4], [0xff; 4]);
    // It survives a reset; what the guest said does not.
    guest.device.write_config(4, &[1, 1, 1, 1]);
    guest.device.reset();
    assert_eq!(guest.device.config()[..8], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    assert_eq!(guest.handle.stats().actual, 0);
}

#[test]
fn a_driver_that_comes_later_hears_of_the_target() {
    let mut guest = Guest::new();
    guest.device.reset();
    guest.handle.set_target(10 * PAGE);
    guest.device.source(0, &mut [], &guest.memory).unwrap();
    guest.device.activate(REPORTING);
    let mut queues: Vec<_> = guest.queues.iter_mut().map(Some).collect();
    assert!(guest.device.queue(0, &mut queues, &guest.memory).unwrap().config_changed());
    assert_eq!(guest.device.config()[..4], [10, 0, 0, 0]);
}

#[test]
fn only_the_guests_own_fields_can_be_written() {
    let (mut device, _handle) = Balloon::new().unwrap();
    device.write_config(0, &[1; 32]);
    assert_eq!(device.config(), [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]);
    device.write_config(6, &[2; 8]);
    assert_eq!(device.config(), [0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 2, 2, 1, 1]);
    for offset in [15, 16, 17, u64::MAX] {
        device.write_config(offset, &[3; 8]);
    }
    assert_eq!(device.config(), [0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 2, 2, 1, 3]);
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.rings[DEFLATE].set_index(&guest.memory, 2000);
    let mut queues: Vec<_> = guest.queues.iter_mut().map(Some).collect();
    assert!(matches!(guest.device.queue(1, &mut queues, &guest.memory), Err(Error::Ring(_))));
}

#[test]
fn a_private_mapping_of_a_file_cannot_be_given_back() {
    let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(SIZE.try_into().unwrap()).unwrap();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region = MmapRegion::build(Some(FileOffset::new(file, 0)), SIZE, protection, libc::MAP_PRIVATE).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let mut guest = Guest::with(Memory::from_regions(vec![region]).unwrap());
    guest.rings[REPORT].add(&guest.memory, &[range(PAGES, PAGE)]);
    let mut queues: Vec<_> = guest.queues.iter_mut().map(Some).collect();
    assert!(matches!(guest.device.queue(2, &mut queues, &guest.memory), Err(Error::System(_, _))));
    assert!(guest.gone().is_empty());
}
