//! FUSE by hand (Linux' include/uapi/linux/fuse.h): requests as they should be, and with any part of them wrong.

use crate::{
    machine::{peek, poke, poke_bytes, say},
    virtio::{Device, FS, NEXT, Queue, WRITE},
};

/// Opcodes.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// The share's root.
pub const ROOT: u64 = 1;
/// Bytes of a request's and of a reply's header.
pub const HEADER: u32 = 40;
pub const REPLY_HEADER: u32 = 16;
/// Bytes of the buffer for a request, and of that for its reply.
pub const BUFFER: u32 = 0x2_0000;

/// Where an entry of a reply has its mode: 40 bytes before the attributes, 60 bytes in them.
const ENTRY_MODE: u64 = 100;
/// How often the host is asked for a container's directory, which it makes while the guest boots.
const TRIES: u32 = 100_000;

/// A container's own directories.
#[derive(Clone, Copy)]
pub struct Home {
    /// The directory with the container's name, in which its mounts are.
    pub dir: u64,
    /// Its root file system.
    pub rootfs: u64,
}

/// What came of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It was done; its reply has this many bytes.
    Done(u32),
    /// It was refused with this error.
    Refused(i32),
    /// It came back without a reply, as what is no request does.
    Dropped,
    /// Nothing came back.
    Silence,
}

/// A session on one queue.
#[derive(Clone, Copy)]
pub struct Fuse {
    pub queue: Queue,
    /// Where requests and replies are.
    pub request: u64,
    pub reply: u64,
    unique: u64,
}

impl Fuse {
    /// Starts the device and, on its first request queue, a session.
    pub fn start(device: Device, features: u32, memory: u64) -> Option<Self> {
        if device.kind != FS {
            return None;
        }
        let [_, queue, ..] = device.start(features, u16::MAX, memory);
        let mut fuse = Self::on(queue?, memory + 0x10_0000);
        fuse.init().then_some(fuse)
    }

    /// A session on a queue; its buffers are at `memory`.
    pub fn on(queue: Queue, memory: u64) -> Self {
        Self { queue, request: memory, reply: memory + u64::from(BUFFER), unique: 1 }
    }

    /// FUSE_INIT of version 7.38, with no feature.
    pub fn init(&mut self) -> bool {
        let answer = self.call(op::INIT, ROOT, &[&7u32.to_le_bytes(), &38u32.to_le_bytes(), &[0; 8]]);
        if !matches!(answer, Answer::Done(_)) {
            say!("WRONG: no FUSE_INIT");
        }
        matches!(answer, Answer::Done(_))
    }

    /// Writes a request; its whole length. The body is the parts, one after the other.
    pub fn prepare(&mut self, opcode: u32, node: u64, parts: &[&[u8]]) -> u32 {
        let mut length = HEADER;
        for part in parts {
            poke_bytes(self.request + u64::from(length), part);
            length += u32::try_from(part.len()).unwrap_or(0);
        }
        self.head(self.request, length, opcode, node);
        length
    }

    /// Writes a request's header.
    pub fn head(&mut self, at: u64, length: u32, opcode: u32, node: u64) {
        self.unique += 1;
        poke(at, length);
        poke(at + 4, opcode);
        poke(at + 8, self.unique);
        poke(at + 16, node);
        // Who asks, root, and padding.
        (24..40).step_by(8).for_each(|field| poke(at + field, 0u64));
    }

    /// Sends a request, and waits for what becomes of it.
    pub fn call(&mut self, opcode: u32, node: u64, parts: &[&[u8]]) -> Answer {
        let length = self.prepare(opcode, node, parts);
        self.send(length, BUFFER)
    }

    /// Sends what is in the request's buffer, with room for a reply of so many bytes.
    pub fn send(&mut self, length: u32, room: u32) -> Answer {
        poke(self.reply + 4, 0i32.cast_unsigned());
        self.queue.describe(0, self.request, length, NEXT, 1);
        self.queue.describe(1, self.reply, room, WRITE, 0);
        self.queue.offer(0);
        self.queue.notify();
        self.answer()
    }

    /// Waits for the answer to the one request that is on its way.
    pub fn answer(&mut self) -> Answer {
        match self.queue.wait() {
            None => Answer::Silence,
            Some((_, 0)) => Answer::Dropped,
            Some((_, _)) => match peek::<u32>(self.reply + 4).cast_signed() {
                0 => Answer::Done(peek(self.reply)),
                error => Answer::Refused(-error),
            },
        }
    }

    /// The inode of a name, if there is one.
    pub fn lookup(&mut self, dir: u64, name: &str) -> Option<u64> {
        let answer = self.call(op::LOOKUP, dir, &[name.as_bytes(), &[0]]);
        // An entry without an inode says that there is none.
        matches!(answer, Answer::Done(_)).then(|| self.field(0)).filter(|inode| *inode != 0)
    }

    /// The type and permissions in the entry that came last.
    pub fn entry_mode(&self) -> u32 {
        peek(self.reply + u64::from(REPLY_HEADER) + ENTRY_MODE)
    }

    /// Waits for a container's directories, until the image's files are in its root.
    pub fn home(&mut self, container: &str) -> Option<Home> {
        for _ in 0..TRIES {
            if let Some(dir) = self.lookup(ROOT, container)
                && let Some(rootfs) = self.lookup(dir, "rootfs")
                && self.lookup(rootfs, "bin").is_some()
            {
                return Some(Home { dir, rootfs });
            }
        }
        say!("WRONG: no root file system of {container:?}");
        None
    }

    /// A field of the last reply.
    pub fn field(&self, offset: u64) -> u64 {
        peek(self.reply + u64::from(REPLY_HEADER) + offset)
    }

    /// Whether the root still has attributes: that somebody is there, and what came before has been served.
    pub fn alive(&mut self) -> bool {
        matches!(self.call(op::GETATTR, ROOT, &[&[0; 16]]), Answer::Done(_))
    }
}
