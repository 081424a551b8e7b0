use std::{
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
    process::Command,
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Queue,
    testing::{Buffer, Ring, SIZE, memory, readable_within},
};

const REQUEST: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x18_0000;
const SECTORS: u64 = 64;
const DISK: usize = 64 * 512;

/// A guest with a disk of 64 sectors, of which the bytes tell where they are.
struct Guest {
    dir: tempfile::TempDir,
    memory: Memory,
    device: BlkQueue,
    ring: Ring,
    queue: Queue,
}

impl Guest {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), pattern(0, DISK)).unwrap();
        let file = open(&dir.path().join("image"));
        let mut config = Config { file, read_only: false, id: "disk-1".into(), queues: 1 };
        change(&mut config);
        let device = Blk::new(config).unwrap().split().remove(0);
        let (memory, ring) = (memory(), Ring::new(0x1_0000, 256));
        let queue = ring.queue();
        let mut guest = Self { dir, memory, device, ring, queue };
        guest.device.activate(guest.device.features());
        guest
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("image")).unwrap()
    }

    fn header(&self, kind: u32, sector: u64) -> Buffer {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        out(REQUEST, 16)
    }

    /// Sends a request with these data buffers; its status and the length that was used.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.memory.write_slice(&[0xff], GuestAddress(STATUS)).unwrap();
        let mut buffers = vec![self.header(kind, sector)];
        buffers.extend(data);
        buffers.push(room(STATUS, 1));
        self.ring.add(&self.memory, &buffers);
        self.run();
        let used = self.ring.take_used(&self.memory).unwrap().1;
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), used)
    }

    /// Sends ranges to discard or zero; the status.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.ask(kind, 0, &[out(DATA, u32::try_from(bytes.len()).unwrap())]).0
    }

    fn run(&mut self) -> Kicks {
        self.device.queue(0, &mut [Some(&mut self.queue)], &self.memory).unwrap()
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }

    fn mistakes(&self) -> u64 {
        self.device.mistakes.total()
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn out(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: false }
}

fn room(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: true }
}

fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|i| u8::try_from(i / 7 % 251 + 1).unwrap()).collect()
}

#[test]
fn sectors_are_read_and_written() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(IN, 3, &[room(DATA, 1024)]), (STATUS_OK, 1025));
    assert_eq!(guest.data(1024), pattern(3 * 512, 1024));
    // In pieces that have nothing to do with sectors.
    let pieces = [room(DATA, 100), room(DATA + 100, 0), room(DATA + 100, 411), room(DATA + 511, 1025)];
    assert_eq!(guest.ask(IN, 61, &pieces), (STATUS_OK, 1537));
    assert_eq!(guest.data(1536), pattern(61 * 512, 1536));

    guest.memory.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.ask(OUT, 10, &[out(DATA, 3), out(DATA + 3, 1021)]), (STATUS_OK, 1));
    let mut expected = pattern(0, DISK);
    expected[5120..6144].fill(7);
    assert!(guest.image() == expected);
    assert_eq!(guest.ask(FLUSH, 0, &[]), (STATUS_OK, 1));
    assert_eq!(guest.mistakes(), 0);
}

#[test]
fn header_and_status_may_lie_in_any_buffers() {
    let mut guest = Guest::new();
    guest.header(OUT, 1);
    guest.memory.write_slice(&[9; 512], GuestAddress(REQUEST + 16)).unwrap();
    guest.ring.add(&guest.memory, &[out(REQUEST, 5), out(REQUEST + 5, 523), room(STATUS, 1)]);
    guest.run();
    assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 1);
    assert_eq!(guest.image()[512..1024], [9; 512]);
    // Data and status in one buffer, from an indirect table.
    let header = guest.header(IN, 1);
    guest.ring.add_indirect(&guest.memory, 0x30_0000, &[header, room(DATA, 513)]);
    guest.run();
    assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 513);
    assert_eq!(guest.data(513), [vec![9; 512], vec![STATUS_OK]].concat());
}

#[test]
fn more_pieces_than_a_call_takes() {
    let mut guest = Guest::new();
    let mut buffers = vec![guest.header(IN, 0)];
    buffers.extend((0..3072).map(|i| room(DATA + 4 * i, 4)));
    buffers.push(room(STATUS, 1));
    guest.ring.add_indirect(&guest.memory, 0x40_0000, &buffers);
    guest.run();
    assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 12289);
    assert_eq!(guest.data(12288), pattern(0, 12288));
}

#[test]
fn what_is_not_on_the_disk_is_refused() {
    let mut guest = Guest::new();
    for (sector, len) in
        [(SECTORS, 512), (63, 1024), (0, 65 * 512), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512)]
    {
        assert_eq!(guest.ask(IN, sector, &[room(DATA, len)]), (STATUS_IOERR, 1), "{sector} {len}");
        assert_eq!(guest.ask(OUT, sector, &[out(DATA, len)]), (STATUS_IOERR, 1), "{sector} {len}");
    }
    for len in [0, 1, 511, 513] {
        assert_eq!(guest.ask(IN, 0, &[room(DATA, len)]).0, STATUS_IOERR, "{len}");
        assert_eq!(guest.ask(OUT, 0, &[out(DATA, len)]).0, STATUS_IOERR, "{len}");
    }
    assert_eq!(guest.mistakes(), 20);
    assert!(guest.image() == pattern(0, DISK));
    // More than a request may move, were the disk long enough.
    let mut guest = Guest::with(|config| config.file.set_len(1 << 30).unwrap());
    let huge = [room(0x40_0000, 32 << 20), room(0x40_0000, 32 << 20), room(0x40_0000, 512)];
    assert_eq!(guest.ask(IN, 0, &huge), (STATUS_IOERR, 1));
    assert_eq!(guest.ask(IN, 0, &huge[..2]), (STATUS_OK, (64 << 20) + 1));
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut guest = Guest::new();
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 1 << 31, u32::MAX] {
        assert_eq!(guest.ask(kind, 0, &[room(DATA, 512)]), (STATUS_UNSUPP, 1));
    }
}

#[test]
fn a_disk_has_a_name() {
    let mut guest = Guest::new();
    guest.memory.write_slice(&[1; 32], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.ask(GET_ID, 0, &[room(DATA, 20)]), (STATUS_OK, 21));
    assert_eq!(guest.data(21), [&b"disk-1"[..], &[0; 14], &[1]].concat());
    assert_eq!(guest.ask(GET_ID, 0, &[room(DATA, 4)]), (STATUS_OK, 5));
    assert_eq!(guest.ask(GET_ID, 0, &[room(DATA, 32)]), (STATUS_OK, 21));
}

#[test]
fn discarded_ranges_become_holes() {
    let mut guest = Guest::with(|config| config.file.write_all_at(&vec![1; 1 << 20], 0).unwrap());
    guest.device.shared.disk.flush().unwrap();
    let blocks = |guest: &Guest| std::fs::metadata(guest.dir.path().join("image")).unwrap().blocks();
    let before = blocks(&guest);
    assert_eq!(guest.ranges(DISCARD, &[(0, 256, 0), (1024, 128, 0)]), STATUS_OK);
    let image = guest.image();
    assert_eq!(image.len(), 1 << 20);
    assert!(
        image[..256 * 512].iter().all(|byte| *byte == 0) && image[256 * 512..1024 * 512].iter().all(|byte| *byte == 1)
    );
    assert!(image[1024 * 512..1152 * 512].iter().all(|byte| *byte == 0));
    assert!(before - blocks(&guest) >= 384, "the room was not given back");

    // One bad range, and none is touched.
    for bad in [(2048, 1, 0), (0, 0, 0), (2047, 2, 0), (u64::MAX, 1, 0), (0, MAX_DISCARD + 1, 0)] {
        assert_eq!(guest.ranges(DISCARD, &[(512, 1, 0), bad]), STATUS_IOERR, "{bad:?}");
    }
    assert_eq!(guest.ranges(DISCARD, &[(512, 1, 0), (513, 1, UNMAP)]), STATUS_UNSUPP);
    assert_eq!(guest.ranges(DISCARD, &[(512, 1, 0); 17]), STATUS_IOERR);
    assert_eq!(guest.ranges(DISCARD, &[]), STATUS_IOERR);
    assert_eq!(guest.ask(DISCARD, 0, &[out(DATA, 15)]).0, STATUS_IOERR);
    assert_eq!(guest.image()[512 * 512..514 * 512], [1; 1024]);
}

#[test]
fn ranges_are_made_zeros() {
    for flags in [0, UNMAP] {
        let mut guest = Guest::new();
        assert_eq!(guest.ranges(WRITE_ZEROES, &[(2, 3, flags)]), STATUS_OK);
        let mut expected = pattern(0, DISK);
        expected[1024..2560].fill(0);
        assert!(guest.image() == expected);
        for bad in [(63, 2, flags), (0, 0, flags), (0, MAX_ZEROES + 1, flags)] {
            assert_eq!(guest.ranges(WRITE_ZEROES, &[bad]), STATUS_IOERR);
        }
        assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 1, 2 | flags)]), STATUS_UNSUPP);
        assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 1, flags); 2]), STATUS_IOERR);
        assert!(guest.image() == expected);
    }
    // Where the file system cannot do it, as a tmpfs and a memfd.
    let mut guest = Guest::with(|config| {
        let file = nix::sys::memfd::memfd_create("disk", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        config.file = file.into();
        config.file.write_all_at(&vec![1; 1 << 20], 0).unwrap();
    });
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(1, 1000, 0)]), STATUS_OK);
    assert_eq!(guest.ask(IN, 0, &[room(DATA, 1002 * 512)]).0, STATUS_OK);
    let data = guest.data(1002 * 512);
    assert!(data[..512].iter().chain(&data[1001 * 512..]).all(|byte| *byte == 1));
    assert!(data[512..1001 * 512].iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut guest = Guest::with(|config| config.read_only = true);
    assert_eq!(guest.device.features() & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES), feature::RO);
    assert_eq!(guest.ask(OUT, 0, &[out(DATA, 512)]), (STATUS_IOERR, 1));
    assert_eq!(guest.ranges(DISCARD, &[(0, 1, 0)]), STATUS_IOERR);
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(0, 1, 0)]), STATUS_IOERR);
    assert_eq!(guest.ask(IN, 0, &[room(DATA, 512)]), (STATUS_OK, 513));
    assert!(guest.image() == pattern(0, DISK));
}

#[test]
fn a_driver_that_cannot_flush_is_served_too() {
    let mut guest = Guest::new();
    guest.device.activate(0);
    guest.memory.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.ask(OUT, 0, &[out(DATA, 512)]), (STATUS_OK, 1));
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(1, 1, 0)]), STATUS_OK);
    assert_eq!(guest.image()[..1024], [[7; 512], [0; 512]].concat());
}

#[test]
fn what_the_host_cannot_do_is_an_error_of_the_disk() {
    let mut guest = Guest::new();
    // Somebody cuts the file off.
    open(&guest.dir.path().join("image")).set_len(512).unwrap();
    assert_eq!(guest.ask(IN, 1, &[room(DATA, 512)]), (STATUS_IOERR, 1));
    assert_eq!(guest.ask(IN, 0, &[room(DATA, 1024)]), (STATUS_IOERR, 1));
    assert_eq!(guest.ask(IN, 0, &[room(DATA, 512)]), (STATUS_OK, 513));
    assert_eq!(guest.mistakes(), 0);
}

#[test]
fn malformed_chains_are_counted_and_returned() {
    let mut guest = Guest::new();
    let header = guest.header(IN, 0);
    let size = u64::try_from(SIZE).unwrap();
    // Nowhere to put a status.
    let unanswerable = [
        vec![header],
        vec![header, out(DATA, 512), out(STATUS, 1)],
        vec![header, room(DATA, 512), room(size, 1)],
        vec![header, room(u64::MAX, 512), room(STATUS, 1)],
        vec![header, room(STATUS, 0)],
    ];
    for (i, chain) in unanswerable.iter().enumerate() {
        guest.ring.add(&guest.memory, chain);
        guest.run();
        assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 0, "{chain:?}");
        assert_eq!(guest.mistakes(), u64::try_from(i + 1).unwrap(), "{chain:?}");
    }
    // A status there is, and nothing else.
    for chain in [
        vec![room(STATUS, 1)],
        vec![out(REQUEST, 15), room(STATUS, 1)],
        vec![out(size - 8, 16), room(STATUS, 1)],
        vec![room(REQUEST, 16), room(STATUS, 1)],
    ] {
        guest.ring.add(&guest.memory, &chain);
        guest.run();
        assert_eq!(guest.ring.take_used(&guest.memory).unwrap().1, 1, "{chain:?}");
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), STATUS_IOERR);
    }
    guest.header(IN, 0);
    guest.ring.add_endless(&guest.memory, &[header, room(DATA, 512), room(STATUS, 1)]);
    guest.run();
    assert!(guest.ring.take_used(&guest.memory).is_some());
    guest.header(IN, 0);
    assert_eq!(guest.ask(IN, 0, &[room(DATA, 512)]), (STATUS_OK, 513));
}

#[test]
fn a_flood_is_served_in_portions() {
    let mut guest = Guest::new();
    let header = guest.header(IN, 0);
    for _ in 0..40 {
        guest.ring.add(&guest.memory, &[header, room(DATA, 512), room(STATUS, 1)]);
    }
    for portion in [16, 16, 8] {
        guest.device.source(0, &mut [Some(&mut guest.queue)], &guest.memory).unwrap();
        assert_eq!(std::iter::from_fn(|| guest.ring.take_used(&guest.memory)).count(), portion);
        assert_eq!(readable_within(&guest.device.wake, 0), portion == 16);
    }
}

#[test]
fn a_disk_says_what_it_is() {
    let guest = Guest::with(|config| config.queues = 4);
    let space = guest.device.config();
    let field = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!((space.len(), field(0), field(4)), (60, 64, 0));
    assert_eq!((field(12), field(20)), (SEG_MAX, 512));
    // Eight sectors are a physical block.
    assert_eq!(space[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!(space[34..36], [4, 0]);
    assert_eq!([36, 40, 44, 48, 52].map(field), [MAX_DISCARD, MAX_SEGMENTS, 8, MAX_ZEROES, 1]);
    assert_ne!(guest.device.features() & feature::MQ, 0);
    assert_eq!(Guest::new().device.features() & feature::MQ, 0);
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, [0; 511]).unwrap();
    let make = |file: File, read_only| {
        Blk::new(Config { file, read_only, id: String::new(), queues: 1 }).map_err(|e| match e {
            BlkError::Disk(e) => e.to_string(),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(make(open(&path), false).unwrap_err(), "disk of 511 bytes is too small");
    std::fs::write(&path, [0; 1024]).unwrap();
    assert_eq!(make(File::open(&path).unwrap(), false).unwrap_err(), "disk is not open for writing");
    make(File::open(&path).unwrap(), true).unwrap();
    assert_eq!(make(File::open(dir.path()).unwrap(), true).unwrap_err(), "disk is neither a file nor a block device");
    let write_only = File::options().write(true).open(&path).unwrap();
    assert_eq!(make(write_only, false).unwrap_err(), "disk is not open for reading");
    let appending = File::options().read(true).append(true).open(&path).unwrap();
    assert_eq!(make(appending, false).unwrap_err(), "disk is not open for writing anywhere");
    if let Ok(direct) = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path) {
        assert_eq!(make(direct, false).unwrap_err(), "disk is not open for buffered access");
    }
    let config = |id: &str, queues| Config { file: open(&path), read_only: false, id: id.into(), queues };
    assert!(matches!(Blk::new(config("", 0)), Err(BlkError::Queues(0))));
    assert!(matches!(Blk::new(config("", 65)), Err(BlkError::Queues(65))));
    assert!(matches!(Blk::new(config(&"x".repeat(21), 1)), Err(BlkError::Id(_))));
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.ring.set_index(&guest.memory, 2000);
    let run = guest.device.queue(0, &mut [Some(&mut guest.queue)], &guest.memory);
    assert!(matches!(run, Err(Error::Ring(_))));
    assert!(guest.device.queue(0, &mut [None], &guest.memory).unwrap().is_empty());
    assert!(guest.device.queue(0, &mut [], &guest.memory).unwrap().is_empty());
}

/// A loop device, as long as it is there.
struct Loop(String);

impl Loop {
    fn new(image: &Path) -> io::Result<Self> {
        let made = Command::new("losetup").args(["--find", "--show", "--sector-size", "4096"]).arg(image).output()?;
        if !made.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&made.stderr).trim().to_owned()));
        }
        Ok(Self(String::from_utf8(made.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.0]).status().unwrap();
    }
}

#[test]
fn a_block_device_of_the_host_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![1; 1 << 20]).unwrap();
    let device = match Loop::new(&image) {
        Ok(device) => device,
        Err(e) => {
            vz_tally::skip!("cannot make a loop device: {e}");
            return;
        }
    };
    let mut guest = Guest::with(|config| config.file = open(Path::new(&device.0)));
    let space = guest.device.config();
    assert_eq!(space[..8], 2048u64.to_le_bytes());
    assert_eq!(space[20..24], 4096u32.to_le_bytes());
    guest.memory.write_slice(&[7; 4096], GuestAddress(DATA)).unwrap();
    assert_eq!(guest.ask(OUT, 8, &[out(DATA, 4096)]), (STATUS_OK, 1));
    assert_eq!(guest.ranges(WRITE_ZEROES, &[(16, 8, 0)]), STATUS_OK);
    assert_eq!(guest.ranges(DISCARD, &[(24, 8, 0)]), STATUS_OK);
    assert_eq!(guest.ask(FLUSH, 0, &[]), (STATUS_OK, 1));
    let image = std::fs::read(&image).unwrap();
    assert!(image[4096..8192].iter().all(|byte| *byte == 7));
    assert!(image[8192..16384].iter().all(|byte| *byte == 0));
    assert!(image[16384..].iter().all(|byte| *byte == 1));
    assert_eq!(guest.ask(IN, 2048, &[room(DATA, 512)]), (STATUS_IOERR, 1));
}
