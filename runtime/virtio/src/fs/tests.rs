use std::{
    ffi::CString,
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
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
            fd_limit: 1000,
        });
        let mut queues = device.unwrap().split();
        assert_eq!(queues.len(), 3);
        let dir = Arc::new(dir);
        let guest = |device| {
            let (memory, ring) = (memory(), Ring::new(0x1_0000, 256));
            let queue = ring.queue();
            Self { dir: Arc::clone(&dir), memory, device, ring, queue }
        };
        let second = guest(queues.swap_remove(2));
        let mut first = guest(queues.swap_remove(1));
        first.init();
        (first, second)
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
        let mut created = 0;
        for _ in 0..2000 {
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
            }
        }
        done.store(true, Ordering::Relaxed);
        println!("created {created} of 2000");
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
fn a_ring_that_cannot_be_is_an_error() {
    let mut guest = Guest::new();
    guest.ring.set_index(&guest.memory, 2000);
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
    };
    assert!(matches!(Fs::new(config("", 1)), Err(ConfigError::Tag(_))));
    assert!(matches!(Fs::new(config(&"x".repeat(37), 1)), Err(ConfigError::Tag(_))));
    assert!(matches!(Fs::new(config("x", 0)), Err(ConfigError::Queues)));
    let queues = Fs::new(config("vz", 3)).unwrap().split();
    assert_eq!(queues[0].config()[..4], *b"vz\0\0");
    assert_eq!(queues[0].config()[36..], [3, 0, 0, 0]);
}
