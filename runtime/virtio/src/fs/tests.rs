use std::{
    ffi::CString,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    Queue,
    testing::{Buffer, Ring, memory},
};

const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
const ROOT: u64 = 1;

const LOOKUP: u32 = 1;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const RENAME2: u32 = 45;
const TMPFILE: u32 = 51;

/// A share with a directory and a secret beside it, and a guest that writes its own requests.
struct Guest {
    dir: Arc<tempfile::TempDir>,
    memory: Memory,
    device: FsQueue,
    ring: Ring,
    queue: Queue,
}

impl Guest {
    fn new() -> Self {
        Self::pair().0
    }

    /// Two that share a device, with a request queue each.
    fn pair() -> (Self, Self) {
        Self::pair_that_believes(Duration::ZERO)
    }

    fn pair_that_believes(cache: Duration) -> (Self, Self) {
        let [first, second, _] = Self::queues(cache, 1000);
        (first, second)
    }

    /// One with few descriptors.
    fn with_descriptors(fd_limit: u64) -> Self {
        let [first, ..] = Self::queues(Duration::ZERO, fd_limit);
        first
    }

    /// Both request queues and the one of high priority.
    fn queues(cache: Duration, fd_limit: u64) -> [Self; 3] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("share");
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join("file"), "inside").unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        let device = Fs::new(Config {
            root: root.to_str().unwrap().into(),
            tag: "vz".into(),
            request_queues: 2,
            proc_self_fd: None,
            cache,
            fd_limit,
            lock_threads: Threads::new(|work| std::thread::Builder::new().spawn(work).map(drop)),
        });
        let mut queues = device.unwrap().split();
        assert_eq!(queues.len(), 3);
        let dir = Arc::new(dir);
        let guest = |device| {
            let (memory, ring) = (memory(), Ring::new(0x1_0000, 1024));
            let queue = ring.queue();
            Self { dir: Arc::clone(&dir), memory, device, ring, queue }
        };
        let (second, mut first) = (guest(queues.swap_remove(2)), guest(queues.swap_remove(1)));
        first.init();
        [first, second, guest(queues.swap_remove(0))]
    }

    fn init(&mut self) {
        assert_eq!(self.ask(INIT, 0, &names(&[7, 38, 0, 0], &[])), 0);
    }

    fn outside(&self) -> &Path {
        self.dir.path()
    }

    fn share(&self) -> std::path::PathBuf {
        self.dir.path().join("share")
    }

    fn run(&mut self) -> Result<Kicks, Error> {
        self.device.queue(0, &mut [Some(&mut self.queue)], &self.memory)
    }

    /// Sends a request with room for a reply; the length that was used.
    fn send(&mut self, request: &[u8], room: u32) -> u32 {
        self.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let mut buffers =
            vec![Buffer { address: REQUEST, len: u32::try_from(request.len()).unwrap(), writable: false }];
        if room > 0 {
            buffers.push(Buffer { address: REPLY, len: room, writable: true });
        }
        self.ring.add(&self.memory, &buffers);
        assert!(self.run().unwrap().contains(0));
        self.ring.take_used(&self.memory).unwrap().1
    }

    /// Sends a request; the error of its reply, as a positive number.
    fn ask(&mut self, opcode: u32, inode: u64, body: &[u8]) -> i32 {
        let used = self.send(&request(opcode, inode, body), 65536);
        assert!(used >= 16, "no reply");
        let error: i32 = self.memory.read_obj(GuestAddress(REPLY + 4)).unwrap();
        -error
    }

    /// The inode that a lookup's reply tells.
    fn lookup(&mut self, name: &str) -> u64 {
        assert_eq!(self.ask(LOOKUP, ROOT, &names(&[], &[name])), 0);
        self.replied()
    }

    /// The first field of a reply: an inode, or an open file.
    fn replied(&self) -> u64 {
        self.memory.read_obj(GuestAddress(REPLY + 16)).unwrap()
    }

    /// What is beside the share, and what is in the secret, by name.
    fn outside_is_untouched(&self) {
        let mut outside: Vec<_> =
            fs::read_dir(self.outside()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        outside.sort();
        assert_eq!(outside, ["secret", "share"]);
        let secret = self.outside().join("secret");
        assert_eq!(fs::read_to_string(&secret).unwrap(), "outside");
        assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
    }
}

fn request(opcode: u32, inode: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(u32::try_from(40 + body.len()).unwrap().to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(77u64.to_le_bytes());
    bytes.extend(inode.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Fixed fields, then names.
fn names(fields: &[u32], names: &[&str]) -> Vec<u8> {
    let mut body: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
    for name in names {
        body.extend(CString::new(*name).unwrap().into_bytes_with_nul());
    }
    body
}

#[test]
fn names_that_lead_out_are_refused_in_every_request_that_has_one() {
    let mut guest = Guest::new();
    let file = guest.lookup("file");
    let (low, high) = (u32::try_from(file).unwrap(), 0);
    for bad in ["../x", "/tmp/x", "dir/x", "./x", "..", ".", "", "x/", "//"] {
        let asked = [
            (SYMLINK, ROOT, names(&[], &[bad, "target"])),
            (MKNOD, ROOT, names(&[0o100_644, 0, 0, 0], &[bad])),
            (MKDIR, ROOT, names(&[0o755, 0], &[bad])),
            (UNLINK, ROOT, names(&[], &[bad])),
            (RMDIR, ROOT, names(&[], &[bad])),
            (RENAME, ROOT, names(&[1, 0], &["file", bad])),
            (RENAME, ROOT, names(&[1, 0], &[bad, "stolen"])),
            (RENAME2, ROOT, names(&[1, 0, 0, 0], &[bad, "stolen"])),
            (RENAME2, ROOT, names(&[1, 0, 0, 0], &["file", bad])),
            (LINK, ROOT, names(&[low, high], &[bad])),
            (CREATE, ROOT, names(&[1, 0o644, 0, 0], &[bad])),
        ];
        for (opcode, inode, body) in asked {
            assert_eq!(guest.ask(opcode, inode, &body), libc::EINVAL, "opcode {opcode}, name {bad:?}");
        }
        if !matches!(bad, "." | "..") {
            assert_eq!(guest.ask(LOOKUP, ROOT, &names(&[], &[bad])), libc::EINVAL, "{bad:?}");
        }
    }
    let secret = names(&[1, 0], &["../secret", "stolen"]);
    assert_eq!(guest.ask(RENAME, ROOT, &secret), libc::EINVAL);
    let mut outside: Vec<_> =
        fs::read_dir(guest.outside()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    outside.sort();
    assert_eq!(outside, ["secret", "share"]);
    assert_eq!(fs::read_dir(guest.share()).unwrap().count(), 2);
}

#[test]
fn what_is_not_there_may_be_remembered_for_a_while_only() {
    let mut guest = Guest::pair_that_believes(Duration::from_millis(100)).0;
    assert_eq!(guest.ask(LOOKUP, ROOT, &names(&[], &["absent"])), 0);
    // struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid (seconds), then the nanoseconds of both.
    let field = |at| guest.memory.read_obj::<u64>(GuestAddress(REPLY + 16 + at)).unwrap();
    assert_eq!((field(0), field(16), field(24)), (0, 0, 0));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(REPLY + 16 + 32)).unwrap(), 100_000_000);
    // Asked again, it is looked up again.
    fs::write(guest.share().join("absent"), "").unwrap();
    assert_ne!(guest.lookup("absent"), 0);
    let mut guest = Guest::new();
    assert_eq!(guest.ask(LOOKUP, ROOT, &names(&[], &["absent"])), libc::ENOENT);
}

#[test]
fn dots_look_up_nothing_outside() {
    let mut guest = Guest::new();
    let root = fs::metadata(guest.share()).unwrap().ino();
    for _ in 0..2 {
        assert_eq!(guest.ask(LOOKUP, ROOT, &names(&[], &[".."])), 0);
        // The attributes' inode number comes after the node's 40 bytes.
        let ino: u64 = guest.memory.read_obj(GuestAddress(REPLY + 16 + 40)).unwrap();
        assert_eq!(ino, root);
    }
}

#[test]
fn links_that_lead_out_are_followed_by_nobody() {
    let mut guest = Guest::new();
    let (up, secret) = (guest.outside().to_str().unwrap().to_owned(), guest.outside().join("secret"));
    let secret = secret.to_str().unwrap().to_owned();
    for (name, target) in [("up", up.as_str()), ("up2", ".."), ("key", &secret), ("key2", "../secret")] {
        assert_eq!(guest.ask(SYMLINK, ROOT, &names(&[], &[name, target])), 0);
    }
    for name in ["up", "up2", "key", "key2"] {
        let link = guest.lookup(name);
        let (low, high) = (u32::try_from(link).unwrap(), 0);
        // As a directory, or as a file, that it is not.
        let asked = [
            (LOOKUP, link, names(&[], &["secret"])),
            (CREATE, link, names(&[2, 0o644, 0, 0], &["planted"])),
            (MKDIR, link, names(&[0o755, 0], &["planted"])),
            (MKNOD, link, names(&[0o100_644, 0, 0, 0], &["planted"])),
            (SYMLINK, link, names(&[], &["planted", "target"])),
            (UNLINK, link, names(&[], &["secret"])),
            (RENAME, link, names(&[1, 0], &["secret", "stolen"])),
            (RENAME, ROOT, names(&[low, high], &["file", "planted"])),
            (RENAME2, ROOT, names(&[low, high, 0, 0], &["file", "secret"])),
            (OPEN, link, names(&[2, 0], &[])),
            (READDIR, link, names(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0], &[])),
            // The size, to nothing.
            (SETATTR, link, names(&[1 << 3, 0], &[]).into_iter().chain([0; 80]).collect()),
            (SETXATTR, link, names(&[1, 0], &["user.planted", ""])),
        ];
        for (opcode, inode, body) in asked {
            assert_ne!(guest.ask(opcode, inode, &body), 0, "opcode {opcode} by {name}");
        }
        // Opened for the guest by its name, with O_CREAT in it: a link in its place is no file of that name.
        assert_ne!(guest.ask(CREATE, ROOT, &names(&[2, 0o644, 0, 0], &[name])), 0, "created by {name}");
        // A second name for the link itself is no way out either.
        let hard = format!("{name}-too");
        guest.ask(LINK, ROOT, &names(&[low, high], &[&hard]));
        guest.outside_is_untouched();
    }
}

#[test]
fn a_directory_that_turns_into_a_link_leads_nowhere() {
    const EXCHANGE: u32 = 2;
    const RACE: Duration = Duration::from_secs(60);
    /// Ends the other thread however this one ends.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (mut guest, mut other) = Guest::pair();
    let up = guest.outside().to_str().unwrap().to_owned();
    assert_eq!(guest.ask(SYMLINK, ROOT, &names(&[], &["link", &up])), 0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(other.ask(RENAME2, ROOT, &names(&[1, 0, EXCHANGE, 0], &["dir", "link"])), 0);
            }
        });
        let over = Over(&done);
        // Until both have come first often enough to have met each other.
        let (mut created, mut refused) = (0, 0);
        let begun = Instant::now();
        while created < 100 || refused < 100 {
            assert!(begun.elapsed() < RACE, "the directory was {created} times one, and {refused} times none");
            let dir = guest.lookup("dir");
            assert_ne!(guest.ask(LOOKUP, dir, &names(&[], &["secret"])), 0);
            assert_ne!(guest.ask(UNLINK, dir, &names(&[], &["secret"])), 0);
            assert_ne!(guest.ask(RENAME, dir, &names(&[1, 0], &["secret", "stolen"])), 0);
            if guest.ask(CREATE, dir, &names(&[2, 0o644, 0, 0], &["planted"])) == 0 {
                created += 1;
                let file = guest.replied();
                // The open file comes after the entry's 128 bytes; it is written to, then removed.
                let handle: u64 = guest.memory.read_obj(GuestAddress(REPLY + 16 + 128)).unwrap();
                let mut write = handle.to_le_bytes().to_vec();
                write.extend([0; 8]);
                write.extend(1u32.to_le_bytes());
                write.extend([0; 20]);
                write.push(b'x');
                assert_eq!(guest.ask(WRITE, file, &write), 0);
                assert_eq!(guest.ask(UNLINK, dir, &names(&[], &["planted"])), 0);
            } else {
                refused += 1;
            }
        }
        drop(over);
    });
    guest.outside_is_untouched();
}

#[test]
fn plain_names_work() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(MKDIR, ROOT, &names(&[0o755, 0], &["new"])), 0);
    assert_eq!(guest.ask(SYMLINK, ROOT, &names(&[], &["link", "../../anywhere"])), 0);
    assert_eq!(guest.ask(RENAME, ROOT, &names(&[1, 0], &["file", "moved"])), 0);
    assert_eq!(fs::read_to_string(guest.share().join("moved")).unwrap(), "inside");
    assert!(guest.share().join("new").is_dir());
    assert_eq!(fs::read_link(guest.share().join("link")).unwrap(), Path::new("../../anywhere"));
}

#[test]
fn malformed_requests_are_counted_and_returned_with_nothing() {
    let mut guest = Guest::new();
    let before = guest.device.mistakes.total();
    assert_eq!(guest.send(&request(LOOKUP, ROOT, b"file\0")[..39], 65536), 0);
    // Claims more than there is.
    let mut long = request(LOOKUP, ROOT, b"file\0");
    long[0] = 200;
    assert_eq!(guest.send(&long, 65536), 0);
    // Claims less than a header.
    let mut short = request(LOOKUP, ROOT, b"file\0");
    short[0] = 10;
    assert_eq!(guest.send(&short, 65536), 0);
    // A name without an end.
    assert_eq!(guest.send(&request(LOOKUP, ROOT, b"file"), 65536), 0);
    assert_eq!(guest.device.mistakes.total(), before + 4);
    assert_eq!(guest.ask(LOOKUP, ROOT, b"file\0"), 0);
}

#[test]
fn no_room_for_a_reply_is_no_reason_to_panic() {
    let mut guest = Guest::new();
    for opcode in 0..64 {
        for room in [0, 1, 15] {
            guest.send(&request(opcode, ROOT, &[0; 64]), room);
        }
    }
    // A reply's header exactly.
    for opcode in (0..64).filter(|opcode| *opcode != INIT) {
        guest.send(&request(opcode, ROOT, &[0; 64]), 16);
    }
    for opcode in [READ, READDIR, TMPFILE] {
        guest.send(&request(opcode, ROOT, &[0xff; 64]), 16);
        guest.send(&request(opcode, ROOT, &[0xff; 64]), 17);
    }
    // One of them was the end of the session.
    guest.init();
    assert_eq!(guest.ask(LOOKUP, ROOT, b"file\0"), 0);
}

#[test]
fn forgetting_ends_with_the_request() {
    let mut guest = Guest::new();
    let file = guest.lookup("file");
    let mut many = Vec::new();
    many.extend(u32::MAX.to_le_bytes());
    many.extend([0; 4]);
    many.extend(file.to_le_bytes());
    many.extend(1u64.to_le_bytes());
    let before = guest.device.mistakes.total();
    guest.send(&request(BATCH_FORGET, 0, &many), 0);
    assert_eq!(guest.device.mistakes.total(), before + 1);
    // It is forgotten: its number means nothing now.
    const GETATTR: u32 = 3;
    assert_eq!(guest.ask(GETATTR, file, &[0; 16]), libc::EBADF);
    // Forgetting more than was known, and what was never known.
    for inode in [ROOT, file, 12345, u64::MAX] {
        guest.send(&request(FORGET, inode, &u64::MAX.to_le_bytes()), 0);
    }
    guest.send(&request(FORGET, file, &[0; 7]), 0);
    guest.send(&request(INTERRUPT, 0, &[0; 8]), 0);
}

#[test]
fn every_opcode_with_nonsense_is_survived() {
    let mut guest = Guest::new();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut byte = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    for round in 0..3000 {
        let opcode = u32::from(byte()) % 56;
        let len = usize::from(byte());
        let body: Vec<u8> = (0..len).map(|_| if byte() < 128 { 0 } else { byte() }).collect();
        let inode = if round % 3 == 0 { ROOT } else { u64::from(byte()) };
        guest.send(&request(opcode, inode, &body), 4096);
    }
    let mut outside: Vec<_> =
        fs::read_dir(guest.outside()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    outside.sort();
    assert_eq!(outside, ["secret", "share"]);
}

#[test]
fn places_that_no_file_has_are_refused() {
    let mut guest = Guest::new();
    fs::write(guest.share().join("file"), "text").unwrap();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    for offset in [1 << 63, u64::MAX] {
        let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend([4_u32, 0, 0, 0, 0, 0].iter().flat_map(|field| field.to_le_bytes()));
        assert_eq!(guest.ask(READ, file, &body), libc::EINVAL);
        body.extend(b"more");
        assert_eq!(guest.ask(WRITE, file, &body), libc::EINVAL);
    }
    assert_eq!(fs::read_to_string(guest.share().join("file")).unwrap(), "text");
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.ring.set_index(&guest.memory, 20000);
    assert!(matches!(guest.run(), Err(Error::Ring(_))));
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let config = |tag: &str, request_queues| Config {
        root: "/".into(),
        tag: tag.into(),
        request_queues,
        proc_self_fd: None,
        cache: Duration::ZERO,
        fd_limit: 10,
        lock_threads: Threads::new(|_| Err(io::ErrorKind::Unsupported.into())),
    };
    assert!(matches!(Fs::new(config("", 1)), Err(ConfigError::Tag(_))));
    assert!(matches!(Fs::new(config(&"x".repeat(37), 1)), Err(ConfigError::Tag(_))));
    assert!(matches!(Fs::new(config("x", 0)), Err(ConfigError::Queues)));
    let queues = Fs::new(config("vz", 3)).unwrap().split();
    assert_eq!(queues[0].config()[..4], *b"vz\0\0");
    assert_eq!(queues[0].config()[36..], [3, 0, 0, 0]);
}

const GETATTR: u32 = 3;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const RDLCK: u32 = 0;
const WRLCK: u32 = 1;
const UNLCK: u32 = 2;

/// A lock request's body.
fn lk(handle: u64, owner: u64, range: (u64, u64), kind: u32, flags: u32) -> Vec<u8> {
    let mut body: Vec<u8> = [handle, owner, range.0, range.1].iter().flat_map(|field| field.to_le_bytes()).collect();
    // The process that asks, as the guest numbers it.
    body.extend([kind, 1234, flags, 0].iter().flat_map(|field| field.to_le_bytes()));
    body
}

const ALL: (u64, u64) = (0, i64::MAX as u64);

impl Guest {
    /// Opens a file: its handle.
    fn open(&mut self, inode: u64, flags: i32) -> u64 {
        assert_eq!(self.ask(OPEN, inode, &names(&[flags.cast_unsigned(), 0], &[])), 0);
        self.replied()
    }

    fn close(&mut self, inode: u64, handle: u64) {
        let body = [handle.to_le_bytes(), [0; 8], [0; 8]].concat();
        assert_eq!(self.ask(RELEASE, inode, &body), 0);
    }

    fn flush(&mut self, inode: u64, handle: u64, owner: u64) {
        let body = [handle.to_le_bytes(), [0; 8], owner.to_le_bytes()].concat();
        assert_eq!(self.ask(FLUSH, inode, &body), 0);
    }

    /// Sends a request that may be answered later, which has a place of its own for the answer.
    fn post(&mut self, unique: u64, opcode: u32, inode: u64, body: &[u8]) {
        let mut request = request(opcode, inode, body);
        request[8..16].copy_from_slice(&unique.to_le_bytes());
        let address = REQUEST + unique * 256;
        self.memory.write_slice(&request, GuestAddress(address)).unwrap();
        self.memory.write_slice(&[0xff; 16], GuestAddress(REPLY + unique * 256)).unwrap();
        self.ring.add(
            &self.memory,
            &[
                Buffer { address, len: u32::try_from(request.len()).unwrap(), writable: false },
                Buffer { address: REPLY + unique * 256, len: 16, writable: true },
            ],
        );
        self.run().unwrap();
    }

    /// The error of the answer that comes next, and to which request, or none within the time.
    fn answered_within(&mut self, milliseconds: u16) -> Option<(u64, i32)> {
        let deadline = Instant::now() + Duration::from_millis(milliseconds.into());
        loop {
            if let Some((chain, len)) = self.ring.take_used(&self.memory) {
                assert_eq!(len, 16);
                let at = |offset| GuestAddress(chain[1].address + offset);
                let error: i32 = self.memory.read_obj(at(4)).unwrap();
                return Some((self.memory.read_obj(at(8)).unwrap(), -error));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !crate::testing::readable_within(&self.device.later.wake, u16::try_from(left.as_millis()).unwrap()) {
                return None;
            }
            self.device.source(0, &mut [Some(&mut self.queue)], &self.memory).unwrap();
        }
    }

    fn interrupt(&mut self, unique: u64) {
        self.send(&request(INTERRUPT, 0, &unique.to_le_bytes()), 0);
    }
}

/// A lock of another process on the host, as seen by the kernel.
fn host_lock(file: &File, kind: i32, start: i64, len: i64) -> nix::Result<i32> {
    let lock = libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock))
}

#[test]
fn posix_locks_are_the_hosts() {
    let mut guest = Guest::new();
    let host = fs::OpenOptions::new().read(true).write(true).open(guest.share().join("file")).unwrap();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    // Two owners exclude each other where they overlap, whichever handle they use; one never itself.
    assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, (0, 9), WRLCK, 0)), 0);
    let other = guest.open(file, libc::O_RDWR);
    for (owner, range, wanted) in
        [(2, (5, 5), libc::EAGAIN), (2, (10, 19), 0), (1, (0, 9), 0), (1, (15, 15), libc::EAGAIN)]
    {
        assert_eq!(guest.ask(SETLK, file, &lk(other, owner, range, WRLCK, 0)), wanted, "{owner} {range:?}");
    }
    assert_eq!(host_lock(&host, libc::F_RDLCK, 0, 1), Err(nix::errno::Errno::EAGAIN));
    assert_eq!(host_lock(&host, libc::F_RDLCK, 15, 1), Err(nix::errno::Errno::EAGAIN));
    // Who it is.
    assert_eq!(guest.ask(GETLK, file, &lk(handle, 3, (0, 100), RDLCK, 0)), 0);
    let found = |guest: &Guest| {
        let long = |at: u64| guest.memory.read_obj::<u64>(GuestAddress(REPLY + 16 + at)).unwrap();
        let word = |at: u64| guest.memory.read_obj::<u32>(GuestAddress(REPLY + 16 + at)).unwrap();
        (long(0), long(8), word(16), word(20))
    };
    assert_eq!(found(&guest), (0, 9, WRLCK, 1234));
    assert_eq!(guest.ask(GETLK, file, &lk(handle, 1, (0, 9), WRLCK, 0)), 0);
    assert_eq!(found(&guest).2, UNLCK);
    // The first close by the owner ends all of its locks.
    guest.flush(file, other, 1);
    assert_eq!(host_lock(&host, libc::F_WRLCK, 0, 10), Ok(0));
    assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, (0, 0), RDLCK, 0)), libc::EAGAIN);
    assert_eq!(guest.ask(GETLK, file, &lk(handle, 1, (3, 3), RDLCK, 0)), 0);
    assert_eq!(found(&guest), (0, 9, WRLCK, 0));
    assert_eq!(host_lock(&host, libc::F_UNLCK, 0, 0), Ok(0));
    // A lock without end, of which a part is given up.
    guest.flush(file, other, 2);
    assert_eq!(guest.ask(SETLK, file, &lk(other, 7, ALL, WRLCK, 0)), 0);
    assert_eq!(guest.ask(SETLK, file, &lk(other, 7, (100, 199), UNLCK, 0)), 0);
    assert_eq!(host_lock(&host, libc::F_WRLCK, 100, 100), Ok(0));
    assert_eq!(host_lock(&host, libc::F_WRLCK, 200, 1), Err(nix::errno::Errno::EAGAIN));
    // The last close of the open file.
    guest.close(file, other);
    assert_eq!(host_lock(&host, libc::F_WRLCK, 0, 0), Ok(0));
    assert_eq!(host_lock(&host, libc::F_UNLCK, 0, 0), Ok(0));
    // A new session.
    assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, ALL, WRLCK, 0)), 0);
    guest.init();
    assert_eq!(host_lock(&host, libc::F_WRLCK, 0, 0), Ok(0));
}

#[test]
fn a_reader_that_becomes_a_writer_keeps_its_locks() {
    let mut guest = Guest::new();
    let path = guest.share().join("file");
    let host = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let file = guest.lookup("file");
    let read = guest.open(file, libc::O_RDONLY);
    assert_eq!(guest.ask(SETLK, file, &lk(read, 1, (0, 9), RDLCK, 0)), 0);
    assert_eq!(guest.ask(SETLK, file, &lk(read, 1, (20, 29), RDLCK, 0)), 0);
    let write = guest.open(file, libc::O_RDWR);
    assert_eq!(guest.ask(SETLK, file, &lk(write, 1, (40, 49), WRLCK, 0)), 0);
    for at in [0, 25, 45] {
        assert_eq!(host_lock(&host, libc::F_WRLCK, at, 1), Err(nix::errno::Errno::EAGAIN), "{at}");
    }
    assert_eq!(guest.ask(SETLK, file, &lk(write, 1, (0, 9), WRLCK, 0)), 0);
    assert_eq!(host_lock(&host, libc::F_RDLCK, 5, 1), Err(nix::errno::Errno::EAGAIN));
    guest.flush(file, read, 1);
    assert_eq!(host_lock(&host, libc::F_WRLCK, 0, 0), Ok(0));
}

#[test]
fn flocks_belong_to_the_open_file() {
    let mut guest = Guest::new();
    let host = File::open(guest.share().join("file")).unwrap();
    let file = guest.lookup("file");
    let (one, two) = (guest.open(file, libc::O_RDONLY), guest.open(file, libc::O_RDONLY));
    assert_eq!(guest.ask(SETLK, file, &lk(one, 1, ALL, WRLCK, FLOCK)), 0);
    assert_eq!(guest.ask(SETLK, file, &lk(two, 2, ALL, RDLCK, FLOCK)), libc::EAGAIN);
    assert!(host.try_lock_shared().is_err());
    // To a shared one.
    assert_eq!(guest.ask(SETLK, file, &lk(one, 1, ALL, RDLCK, FLOCK)), 0);
    assert_eq!(guest.ask(SETLK, file, &lk(two, 2, ALL, RDLCK, FLOCK)), 0);
    host.try_lock_shared().unwrap();
    assert_eq!(guest.ask(SETLK, file, &lk(one, 1, ALL, WRLCK, FLOCK)), libc::EAGAIN);
    // That has cost it what it had, as it does on the host: the change is not atomic there either.
    guest.close(file, two);
    host.try_lock().unwrap();
    host.unlock().unwrap();
    let two = guest.open(file, libc::O_RDONLY);
    assert_eq!(guest.ask(SETLK, file, &lk(one, 1, ALL, WRLCK, FLOCK)), 0);
    // It is nothing to a POSIX lock, nor to the close of another.
    let write = guest.open(file, libc::O_RDWR);
    assert_eq!(guest.ask(SETLK, file, &lk(write, 3, ALL, WRLCK, 0)), 0);
    guest.close(file, two);
    assert!(host.try_lock().is_err());
    guest.close(file, one);
    host.try_lock().unwrap();
}

#[test]
fn who_waits_gets_the_lock_when_it_is_free() {
    let (mut guest, mut other) = Guest::pair();
    let host = fs::OpenOptions::new().read(true).write(true).open(guest.share().join("file")).unwrap();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    for flags in [0, FLOCK] {
        // Of the host.
        match flags {
            FLOCK => host.lock().unwrap(),
            _ => drop(host_lock(&host, libc::F_WRLCK, 0, 0).unwrap()),
        }
        guest.post(1, SETLKW, file, &lk(handle, 1, ALL, WRLCK, flags));
        assert_eq!(guest.answered_within(100), None);
        // Others are served meanwhile, by the same queue.
        guest.post(2, SETLK, file, &lk(handle, 1, ALL, UNLCK, 0));
        assert_eq!(guest.answered_within(1000), Some((2, 0)));
        match flags {
            FLOCK => host.unlock().unwrap(),
            _ => drop(host_lock(&host, libc::F_UNLCK, 0, 0).unwrap()),
        }
        assert_eq!(guest.answered_within(5000), Some((1, 0)));
        // Of the guest, through the other queue.
        let second = other.open(file, libc::O_RDWR);
        other.post(3, SETLKW, file, &lk(second, 2, ALL, WRLCK, flags));
        assert_eq!(other.answered_within(50), None);
        assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, ALL, UNLCK, flags)), 0);
        assert_eq!(other.answered_within(5000), Some((3, 0)));
        other.flush(file, second, 2);
        other.close(file, second);
        match flags {
            FLOCK => host.try_lock().unwrap(),
            _ => drop(host_lock(&host, libc::F_WRLCK, 0, 0).unwrap()),
        }
        let _ = (host.unlock(), host_lock(&host, libc::F_UNLCK, 0, 0));
    }
}

#[test]
fn who_does_not_want_to_wait_any_more_is_let_go() {
    let [mut guest, mut other, mut priority] = Guest::queues(Duration::ZERO, 1000);
    let host = fs::OpenOptions::new().read(true).write(true).open(guest.share().join("file")).unwrap();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    for (round, flags) in [0, FLOCK, 0, FLOCK].into_iter().enumerate() {
        let unique = u64::try_from(round).unwrap() * 10;
        host.lock().unwrap();
        host_lock(&host, libc::F_WRLCK, 0, 0).unwrap();
        guest.post(unique + 2, SETLKW, file, &lk(handle, 1, ALL, WRLCK, flags));
        if round < 2 {
            assert_eq!(guest.answered_within(50), None);
        }
        priority.interrupt(unique + 2);
        assert_eq!(guest.answered_within(5000), Some((unique + 2, libc::EINTR)));
        // The interrupt may come first.
        priority.interrupt(unique + 4);
        guest.post(unique + 4, SETLKW, file, &lk(handle, 1, ALL, WRLCK, flags));
        assert_eq!(guest.answered_within(5000), Some((unique + 4, libc::EINTR)));
        // A queue that is reset has no answers.
        other.post(unique + 6, SETLKW, file, &lk(handle, 1, ALL, WRLCK, flags));
        other.device.reset();
        host.unlock().unwrap();
        host_lock(&host, libc::F_UNLCK, 0, 0).unwrap();
        assert_eq!(other.answered_within(50), None);
        assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, ALL, WRLCK, flags)), 0);
        assert_eq!(guest.ask(SETLK, file, &lk(handle, 1, ALL, UNLCK, flags)), 0);
    }
}

#[test]
fn more_than_there_are_threads_wait() {
    let mut guest = Guest::new();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    let flocks: Vec<u64> = (0..40).map(|_| guest.open(file, libc::O_RDWR)).collect();
    assert_eq!(guest.ask(SETLK, file, &lk(handle, 1000, ALL, WRLCK, 0)), 0);
    assert_eq!(guest.ask(SETLK, file, &lk(handle, 1000, ALL, WRLCK, FLOCK)), 0);
    for number in 0..80u64 {
        let (flags, handle) =
            if number < 40 { (0, handle) } else { (FLOCK, flocks[usize::try_from(number).unwrap() - 40]) };
        guest.post(number, SETLKW, file, &lk(handle, number + 1, ALL, WRLCK, flags));
    }
    assert_eq!(guest.answered_within(50), None);
    guest.post(200, SETLK, file, &lk(handle, 1000, ALL, UNLCK, 0));
    guest.post(201, SETLK, file, &lk(handle, 1000, ALL, UNLCK, FLOCK));
    let mut got = 0;
    while got < 80 {
        let (unique, error) = guest.answered_within(20_000).unwrap();
        assert_eq!(error, 0);
        if unique >= 100 {
            continue;
        }
        got += 1;
        // The next one's turn.
        let (flags, handle) =
            if unique < 40 { (0, handle) } else { (FLOCK, flocks[usize::try_from(unique).unwrap() - 40]) };
        guest.post(unique + 100, SETLK, file, &lk(handle, unique + 1, ALL, UNLCK, flags));
    }
    assert_eq!(got, 80);
}

#[test]
fn locks_that_cannot_be_are_refused() {
    let mut guest = Guest::new();
    let file = guest.lookup("file");
    let handle = guest.open(file, libc::O_RDWR);
    for opcode in [GETLK, SETLK, SETLKW] {
        for (range, kind) in [((9, 5), RDLCK), ((0, u64::MAX), RDLCK), ((0, 5), 3), ((u64::MAX, u64::MAX), WRLCK)] {
            assert_eq!(
                guest.ask(opcode, file, &lk(handle, 1, range, kind, 0)),
                libc::EINVAL,
                "{opcode} {range:?} {kind}"
            );
        }
        for (inode, handle) in [(file, 77), (12345, handle), (ROOT, handle)] {
            assert_eq!(guest.ask(opcode, inode, &lk(handle, 1, ALL, RDLCK, 0)), libc::EBADF);
            assert_eq!(guest.ask(opcode, inode, &lk(handle, 1, ALL, RDLCK, FLOCK)), libc::EBADF);
        }
        assert_eq!(guest.send(&request(opcode, file, &lk(handle, 1, ALL, RDLCK, 0)[..40]), 4096), 0);
        assert_eq!(guest.send(&request(opcode, file, &lk(handle, 1, ALL, UNLCK, 0)), 15), 0);
    }
    // As many owners as there can be.
    let most = u64::try_from(locks::OWNERS).unwrap();
    for owner in 0..most {
        assert_eq!(guest.ask(SETLK, file, &lk(handle, owner, (0, 0), RDLCK, 0)), 0);
    }
    assert_eq!(guest.ask(SETLK, file, &lk(handle, most, (0, 0), RDLCK, 0)), libc::ENOLCK);
    guest.flush(file, handle, 5);
    assert_eq!(guest.ask(SETLK, file, &lk(handle, most, (0, 0), RDLCK, 0)), 0);
}

/// The inode and size that a lookup in a directory tells.
fn look(guest: &mut Guest, parent: u64, name: &str) -> Result<u64, i32> {
    match guest.ask(LOOKUP, parent, &names(&[], &[name])) {
        0 => Ok(guest.replied()),
        error => Err(error),
    }
}

/// The size of a file, as its attributes have it.
fn size(guest: &mut Guest, inode: u64) -> Result<u64, i32> {
    match guest.ask(GETATTR, inode, &[0; 16]) {
        // After the timeout's 16 bytes, the inode number.
        0 => Ok(guest.memory.read_obj(GuestAddress(REPLY + 16 + 16 + 8)).unwrap()),
        error => Err(error),
    }
}

#[test]
fn the_guest_knows_more_files_than_there_are_descriptors() {
    let mut guest = Guest::with_descriptors(64);
    let mut known = Vec::new();
    for d in 0..20 {
        let dir = guest.share().join(format!("d{d}/deep/deeper"));
        fs::create_dir_all(&dir).unwrap();
        let mut parent = look(&mut guest, ROOT, &format!("d{d}")).unwrap();
        for name in ["deep", "deeper"] {
            parent = look(&mut guest, parent, name).unwrap();
        }
        for f in 0..100 {
            fs::write(dir.join(format!("f{f}")), vec![0; d * 100 + f]).unwrap();
            known.push((look(&mut guest, parent, &format!("f{f}")).unwrap(), d * 100 + f, parent, format!("f{f}")));
        }
    }
    // Each is itself when it is asked for, in whatever order, and has the same number when it is looked up again.
    for (inode, len, parent, name) in known.iter().rev() {
        assert_eq!(size(&mut guest, *inode), Ok(u64::try_from(*len).unwrap()));
        assert_eq!(look(&mut guest, *parent, name), Ok(*inode));
    }
    for (inode, ..) in known.iter().step_by(7) {
        let handle = guest.open(*inode, libc::O_RDONLY);
        guest.close(*inode, handle);
    }
    // As many open at once as there is room for, while others come and go.
    let handles: Vec<_> =
        known.iter().step_by(150).map(|(inode, ..)| (*inode, guest.open(*inode, libc::O_RDWR))).collect();
    for (inode, len, ..) in &known {
        assert_eq!(size(&mut guest, *inode), Ok(u64::try_from(*len).unwrap()));
    }
    for (inode, handle) in handles {
        let mut write = handle.to_le_bytes().to_vec();
        write.extend([0; 8]);
        write.extend(1u32.to_le_bytes());
        write.extend([0; 20]);
        write.push(b'x');
        assert_eq!(guest.ask(WRITE, inode, &write), 0);
        guest.close(inode, handle);
    }
    // All of it is forgotten once each name is.
    for (inode, _, parent, _) in &known {
        guest.send(&request(FORGET, *inode, &2u64.to_le_bytes()), 0);
        guest.send(&request(FORGET, *parent, &0u64.to_le_bytes()), 0);
        assert_eq!(size(&mut guest, *inode), Err(libc::EBADF));
    }
}

#[test]
fn a_file_that_was_given_back_is_found_where_it_is_now() {
    let mut guest = Guest::with_descriptors(64);
    let share = guest.share();
    fs::create_dir_all(share.join("a/b")).unwrap();
    for name in ["moved", "replaced", "removed", "linked", "swapped", "host-moved"] {
        fs::write(share.join("a/b").join(name), name).unwrap();
    }
    fs::create_dir(share.join("many")).unwrap();
    for f in 0..300 {
        fs::write(share.join("many").join(format!("f{f}")), "").unwrap();
    }
    let a = look(&mut guest, ROOT, "a").unwrap();
    let b = look(&mut guest, a, "b").unwrap();
    let inode = |guest: &mut Guest, name| look(guest, b, name).unwrap();
    let [moved, replaced, removed, linked, swapped, host_moved] =
        ["moved", "replaced", "removed", "linked", "swapped", "host-moved"].map(|name| inode(&mut guest, name));
    let press = |guest: &mut Guest| {
        let many = look(guest, ROOT, "many").unwrap();
        for f in 0..300 {
            look(guest, many, &format!("f{f}")).unwrap();
        }
    };
    press(&mut guest);
    // The guest's own changes, with the directory's number, which was given back as well.
    let dir = |of: u64| names(&[u32::try_from(of).unwrap(), 0], &[]);
    let rename = |from: &str, to: &str, into: u64| [dir(into), names(&[], &[from, to])].concat();
    assert_eq!(guest.ask(RENAME, b, &rename("moved", "here", a)), 0);
    assert_eq!(guest.ask(LINK, a, &[linked.to_le_bytes().to_vec(), names(&[], &["second"])].concat()), 0);
    assert_eq!(guest.ask(UNLINK, b, &names(&[], &["linked"])), 0);
    let exchange = [a.to_le_bytes().to_vec(), names(&[2, 0], &["swapped", "here"])].concat();
    assert_eq!(guest.ask(RENAME2, b, &exchange), 0);
    assert_eq!(guest.ask(RENAME, ROOT, &rename("a", "A", ROOT)), 0);
    // The host's.
    fs::write(share.join("A/b/new"), "another file").unwrap();
    fs::rename(share.join("A/b/new"), share.join("A/b/replaced")).unwrap();
    fs::remove_file(share.join("A/b/removed")).unwrap();
    fs::rename(share.join("A/b/host-moved"), share.join("A/b/host-moved-2")).unwrap();
    press(&mut guest);
    assert_eq!(size(&mut guest, moved), Ok(5));
    assert_eq!(size(&mut guest, swapped), Ok(7));
    assert_eq!(size(&mut guest, linked), Ok(6));
    assert_eq!(size(&mut guest, removed), Err(libc::ESTALE));
    assert_eq!(size(&mut guest, replaced), Err(libc::ESTALE));
    assert_eq!(size(&mut guest, host_moved), Err(libc::ESTALE));
    assert_eq!(look(&mut guest, a, "here"), Ok(swapped));
    assert_eq!(look(&mut guest, b, "swapped"), Ok(moved));
    assert_eq!(look(&mut guest, a, "second"), Ok(linked));
    // Another file has another number.
    let now = look(&mut guest, b, "replaced").unwrap();
    assert_ne!(now, replaced);
    assert_eq!(size(&mut guest, now), Ok(12));
    // A second name of a file that was given back leads to the same number.
    fs::hard_link(share.join("A/second"), share.join("A/third")).unwrap();
    press(&mut guest);
    assert_eq!(look(&mut guest, a, "third"), Ok(linked));
    assert_eq!(size(&mut guest, linked), Ok(6));
}
