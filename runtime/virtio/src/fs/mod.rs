//! virtio-fs: one directory tree, served by virtiofsd's pass-through file system in this process.
//!
//! Each queue is a backend of its own, so that each has a thread: requests of one queue are served in order, those of
//! several in parallel. All share one [`Server`], hence one inode table.
//!
//! Nothing of the shared directory is opened before the guest's FUSE_INIT: by then the process is in its jail, and
//! descriptors that were opened in there cannot reach out of it.
//!
//! What the guest sees is what is in the directory now: the host changes files under a running guest (bind mounts of
//! single files, `cp`, volumes of several sandboxes). So there is no write-back cache, an open drops cached pages
//! unless the file is the one that was cached (`cache`), and names and attributes are believed for [`Config::cache`]
//! only.
//!
//! Threat: see the crate. virtiofsd does not check names; [`guard::Guarded`] does. It also splits a reply buffer
//! without looking at its size; [`FsQueue`] looks before.

use std::{
    fs::File,
    io::{self, Read, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    filesystem::{Context, FileSystem},
    passthrough::{self, CachePolicy, NegotiationMode, PassthroughFs},
    server::Server,
};

use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress};
use vz_sys::sync;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Chain, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

mod cache;
mod guard;
mod locks;
mod nodes;
pub use guard::Guarded;
use locks::{Answer, Locks, Request, errno};
pub use locks::{Threads, Work};

/// Largest tag in bytes.
const TAG: usize = 36;
/// Size of each queue.
const QUEUE_SIZE: u16 = 1024;
/// Requests that are served before the guest hears of those that are done.
const BATCH: usize = 16;
/// Descriptors besides those of [`Config::fd_limit`]: those of locks, and of requests on their way.
pub const OWN_FDS: u64 = locks::OWNERS as u64 + 512 + 64;

/// A FUSE request's header: `struct fuse_in_header`.
#[derive(Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
struct RequestHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    inode: u64,
    who: [u32; 4],
}

/// A lock, as requests and answers have it: `struct fuse_file_lock`.
#[derive(Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct FileLock {
    start: u64,
    end: u64,
    kind: u32,
    pid: u32,
}

/// A request about a lock: its header and `struct fuse_lk_in`.
#[derive(Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
struct LockRequest {
    header: RequestHeader,
    handle: u64,
    owner: u64,
    lock: FileLock,
    flags: u32,
    padding: u32,
}

/// A reply's header: `struct fuse_out_header`. The error is negated.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct ReplyHeader {
    len: u32,
    error: i32,
    unique: u64,
}

const REQUEST_HEADER: usize = size_of::<RequestHeader>();
const REPLY_HEADER: usize = size_of::<ReplyHeader>();
/// Requests that have no reply.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Requests that virtiofsd knows by name only.
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
/// A lock request that is one of flock(2).
const FLOCK: u32 = 1;

/// The unused type parameter of [`Server::handle_message`]: we have no backend channel.
type NoChannel = ();

/// What is shared, and how.
#[derive(Debug)]
pub struct Config {
    /// Path of the shared directory in the process's root at the time of FUSE_INIT.
    pub root: String,
    /// Name by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// Number of request queues.
    pub request_queues: u16,
    /// `/proc/self/fd` of this process, where the root has no `/proc`.
    pub proc_self_fd: Option<File>,
    /// How long the guest believes names and attributes, and that a name is not there: a program's start asks for
    /// dozens of those, the same ones again and again (`PATH`, the dynamic linker's directories).
    pub cache: Duration,
    /// Most descriptors that the guest's inodes and open files may take.
    pub fd_limit: u64,
    /// Where requests wait for locks.
    pub lock_threads: Threads,
}

/// Why a share cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The tag is empty or too long.
    #[error("share tag {0:?} is not of 1 to {TAG} bytes")]
    Tag(String),
    /// It needs at least one request queue.
    #[error("share needs at least one request queue")]
    Queues,
    /// virtiofsd refused.
    #[error("set up share")]
    Share(#[source] io::Error),
    /// A system call failed.
    #[error("{0} for share")]
    System(&'static str, #[source] io::Error),
}

/// The device, before its queues are handed to threads.
#[derive(Debug)]
pub struct Fs {
    queues: Vec<FsQueue>,
}

impl Fs {
    /// Sets up the share. Sets the process's umask to 0, which creating files with the guest's modes needs.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { root, tag, request_queues, proc_self_fd, cache, fd_limit, lock_threads } = config;
        if tag.is_empty() || tag.len() > TAG {
            return Err(ConfigError::Tag(tag));
        }
        if request_queues == 0 {
            return Err(ConfigError::Queues);
        }
        let mut space = tag.into_bytes();
        space.resize(TAG, 0);
        space.extend_from_slice(&u32::from(request_queues).to_le_bytes());

        let fs = PassthroughFs::new(passthrough::Config {
            root_dir: root,
            cache_policy: CachePolicy::Auto,
            entry_timeout: cache,
            attr_timeout: cache,
            writeback: false,
            xattr: true,
            // Setuid bits are cleared here, so that the guest need not ask for a capability attribute before each
            // write.
            killpriv_v2: true,
            // Without, files of different mounts can have the same device and inode number in the guest.
            announce_submounts: true,
            // A list that the host has set counts in the guest, whose kernel looks at it.
            posix_acl: NegotiationMode::Auto,
            proc_sfd_rawfd: proc_self_fd,
            guest_fd_limit: fd_limit,
            ..passthrough::Config::default()
        })
        .map_err(ConfigError::Share)?;
        vz_sys::thread::allow_interrupts().map_err(|e| ConfigError::System("handle signals", e))?;
        let locks = Locks::new(lock_threads);
        let fs = Guarded::new(fs, cache, locks.clone(), fd_limit);
        let server: Arc<dyn Serve> = Arc::new(Share { server: Server::new(fs.clone()), fs, locks });
        let space: Arc<[u8]> = space.into();
        let queue = |number| {
            Ok(FsQueue {
                number: usize::from(number),
                server: Arc::clone(&server),
                space: Arc::clone(&space),
                later: Arc::new(Later::new().map_err(|e| ConfigError::System("make eventfd", e))?),
                mistakes: Mistakes::new("fs"),
            })
        };
        Ok(Self { queues: (0..=request_queues).map(queue).collect::<Result<_, _>>()? })
    }

    /// The high-priority queue and the request queues, each a backend that sees itself as queue 0.
    pub fn split(self) -> Vec<FsQueue> {
        self.queues
    }
}

/// The server and its file system, without their types.
trait Serve: Send + Sync {
    /// [`Server::handle_message`]. The writer has room for a reply's header.
    fn serve(&self, reader: Reader<'_>, writer: Writer<'_>) -> virtiofsd::Result<usize>;
    /// The guest drops references to an inode.
    fn forget(&self, inode: u64, count: u64);
    /// What keeps the guest from a lock.
    fn lock_in_the_way(&self, request: &Request) -> io::Result<locks::Range>;
    /// The guest wants a lock now.
    fn lock(&self, request: &Request) -> io::Result<()>;
    /// The guest waits for a lock.
    fn wait_for_lock(&self, request: &Request, unique: u64, queue: usize, answer: Box<dyn Answer>);
    /// All locks.
    fn locks(&self) -> &Locks;
}

struct Share<F: FileSystem + Send + Sync> {
    server: Server<Guarded<F>>,
    fs: Guarded<F>,
    locks: Locks,
}

impl<F: FileSystem + Send + Sync> Drop for Share<F> {
    /// Those who wait would do so for ever, for locks that nobody gives up.
    fn drop(&mut self) {
        self.locks.clear();
    }
}

/// Who asks where nobody's rights are looked at.
fn nobody() -> Context {
    Context { uid: u32::MAX.into(), gid: u32::MAX.into(), pid: 0 }
}

impl<F: FileSystem + Send + Sync> Serve for Share<F> {
    fn serve(&self, reader: Reader<'_>, writer: Writer<'_>) -> virtiofsd::Result<usize> {
        self.server.handle_message::<NoChannel>(reader, writer, None)
    }

    fn forget(&self, inode: u64, count: u64) {
        self.fs.forget(nobody(), inode.into(), count);
    }

    fn lock_in_the_way(&self, request: &Request) -> io::Result<locks::Range> {
        self.locks.get(&self.fs, request)
    }

    fn lock(&self, request: &Request) -> io::Result<()> {
        self.locks.set(&self.fs, request)
    }

    fn wait_for_lock(&self, request: &Request, unique: u64, queue: usize, answer: Box<dyn Answer>) {
        self.locks.wait(&self.fs, request, unique, queue, answer);
    }

    fn locks(&self) -> &Locks {
        &self.locks
    }
}

/// Answers of a queue that come when its thread is at something else.
#[derive(Debug)]
struct Later {
    done: Mutex<Done>,
    wake: Wake,
}

#[derive(Debug, Default)]
struct Done {
    /// Grows with each reset: what was asked before is not answered after.
    generation: u64,
    answers: Vec<Reply>,
}

/// An answer without a body.
#[derive(Debug)]
struct Reply {
    head: u16,
    address: GuestAddress,
    unique: u64,
    error: i32,
}

impl Later {
    fn new() -> io::Result<Self> {
        Ok(Self { done: Mutex::default(), wake: Wake::new()? })
    }

    fn done(&self) -> std::sync::MutexGuard<'_, Done> {
        sync::lock(&self.done)
    }

    /// Whoever answers takes this along.
    fn slip(self: &Arc<Self>, head: u16, address: GuestAddress, unique: u64) -> Box<dyn Answer> {
        let generation = self.done().generation;
        Box::new(Slip { later: Arc::clone(self), generation, reply: Reply { head, address, unique, error: 0 } })
    }
}

struct Slip {
    later: Arc<Later>,
    generation: u64,
    reply: Reply,
}

impl Answer for Slip {
    fn answer(self: Box<Self>, error: i32) {
        let Self { later, generation, mut reply } = *self;
        reply.error = error;
        let mut done = later.done();
        if done.generation == generation {
            done.answers.push(reply);
            later.wake.signal();
        }
    }
}

/// The header of a reply to a request, given the length of what follows it.
fn reply_header(body: usize, error: i32, unique: u64) -> ReplyHeader {
    let len = u32::try_from(body.saturating_add(REPLY_HEADER)).unwrap_or(0);
    ReplyHeader { len, error: error.saturating_neg(), unique }
}

/// One queue of the device.
pub struct FsQueue {
    number: usize,
    server: Arc<dyn Serve>,
    space: Arc<[u8]>,
    later: Arc<Later>,
    mistakes: Mistakes,
}

impl std::fmt::Debug for FsQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FsQueue").field("mistakes", &self.mistakes).finish_non_exhaustive()
    }
}

/// Why a request was not given to the server, or what the server says about it.
#[derive(Debug, thiserror::Error)]
enum BadRequest {
    #[error("request buffers: {0}")]
    Buffers(virtiofsd::descriptor_utils::Error),
    #[error("request of {0} bytes")]
    Short(usize),
    #[error("reply buffer of {0} bytes for opcode {1}")]
    NoRoom(usize, u32),
    #[error("{0}")]
    Server(virtiofsd::Error),
}

/// What became of a request: how many bytes its reply has, or `None` where it is answered later.
fn handle(
    server: &dyn Serve,
    memory: &Memory,
    chain: Chain<'_>,
    queue: usize,
    later: &Arc<Later>,
) -> Result<Option<usize>, BadRequest> {
    if matches!(opcode(memory, &chain), Some(GETLK | SETLK | SETLKW)) {
        return lock(server, memory, &chain, queue, later);
    }
    let mut reader = Reader::new(memory, chain.clone()).map_err(BadRequest::Buffers)?;
    let writer = Writer::new(memory, chain).map_err(BadRequest::Buffers)?;
    if reader.available_bytes() < REQUEST_HEADER {
        return Err(BadRequest::Short(reader.available_bytes()));
    }
    if writer.available_bytes() >= REPLY_HEADER {
        return server.serve(reader, writer).map(Some).map_err(BadRequest::Server);
    }
    // virtiofsd panics where it wants to reply and there is no room. It reads the opcode itself, and the guest can
    // change it in between: so the requests without reply are done here, from a copy.
    let mut header = RequestHeader::default();
    reader.read_exact(header.as_mut_bytes()).map_err(|_| BadRequest::Short(0))?;
    match header.opcode {
        FORGET => {
            let mut count = 0u64;
            reader.read_exact(count.as_mut_bytes()).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
            server.forget(header.inode, count);
        }
        BATCH_FORGET => {
            let mut start = [0u32; 2];
            reader.read_exact(start.as_mut_bytes()).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
            let [count, _] = start;
            // Ends with the request's bytes, however many it claims to have.
            for _ in 0..count {
                let mut one = [0u64; 2];
                reader.read_exact(one.as_mut_bytes()).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
                let [inode, count] = one;
                server.forget(inode, count);
            }
        }
        // Nothing else takes long enough.
        INTERRUPT => {
            let mut unique = 0u64;
            reader.read_exact(unique.as_mut_bytes()).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
            server.locks().interrupt(unique);
        }
        opcode => return Err(BadRequest::NoRoom(writer.available_bytes(), opcode)),
    }
    Ok(Some(0))
}

/// What a request wants, where its first buffer says so. The guest can change it at any time: who acts on it reads it
/// once.
fn opcode(memory: &Memory, chain: &Chain<'_>) -> Option<u32> {
    let first = chain.clone().readable().next()?;
    let address = first.addr().checked_add(4).filter(|_| first.len() >= 8)?;
    let mut opcode = 0u32;
    memory.read_slice(opcode.as_mut_bytes(), address).ok()?;
    Some(opcode)
}

/// Serves a request about a lock.
fn lock(
    server: &dyn Serve,
    memory: &Memory,
    chain: &Chain<'_>,
    queue: usize,
    later: &Arc<Later>,
) -> Result<Option<usize>, BadRequest> {
    let mut reader = Reader::new(memory, chain.clone()).map_err(BadRequest::Buffers)?;
    let mut writer = Writer::new(memory, chain.clone()).map_err(BadRequest::Buffers)?;
    let (available, room) = (reader.available_bytes(), writer.available_bytes());
    let mut asked = LockRequest::default();
    reader.read_exact(asked.as_mut_bytes()).map_err(|_| BadRequest::Short(available))?;
    // Who asks does not matter: the guest's kernel has looked at that when the file was opened.
    let LockRequest { header, handle, owner, lock: FileLock { start, end, kind, pid }, flags, .. } = asked;
    let RequestHeader { opcode, unique, inode, .. } = header;
    if room < REPLY_HEADER {
        return Err(BadRequest::NoRoom(room, opcode));
    }
    let request = locks::Kind::new(kind).map(|kind| Request {
        inode,
        handle,
        owner,
        flock: flags & FLOCK != 0,
        range: locks::Range { start, end, kind, pid },
    });
    let mut body = Vec::new();
    let done = match (opcode, request) {
        (_, Err(e)) => Err(e),
        (GETLK, Ok(request)) => server.lock_in_the_way(&request).map(|found| body.extend(found.lock().as_bytes())),
        (SETLKW, Ok(request)) => match chain.clone().writable().next() {
            Some(first) if usize::try_from(first.len()).is_ok_and(|len| len >= REPLY_HEADER) => {
                let slip = later.slip(chain.head_index(), first.addr(), unique);
                server.wait_for_lock(&request, unique, queue, slip);
                return Ok(None);
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        },
        (SETLK, Ok(request)) => server.lock(&request),
        // Changed since it was looked at.
        (_, Ok(_)) => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
    };
    let error = done.map_or_else(|e| errno(&e), |()| 0);
    if room < REPLY_HEADER.saturating_add(body.len()) {
        return Err(BadRequest::NoRoom(room, opcode));
    }
    let header = reply_header(body.len(), error, unique);
    let reply = [header.as_bytes(), &body].concat();
    writer.write_all(&reply).map_err(|_| BadRequest::NoRoom(room, opcode))?;
    Ok(Some(reply.len()))
}

impl Backend for FsQueue {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn enter_thread(&mut self) -> Result<(), Error> {
        // Extended attributes are reached by fchdir, which must not move the other threads.
        unshare(CloneFlags::CLONE_FS).map_err(|e| Error::System("unshare working directory", e.into()))
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.later.wake.source(0)]
    }

    /// Serves some of what is there, and comes back for the rest.
    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let Some(Some(queue)) = queues.first_mut() else { return Ok(kicks) };
        let Self { number, server, later, mistakes, .. } = self;
        let (mut used, more) =
            serve(queue, memory, BATCH, |chain| match handle(server.as_ref(), memory, chain, *number, later) {
                Ok(Some(written)) => Served::Used(u32::try_from(written).unwrap_or(0)),
                Ok(None) => Served::Later,
                Err(e) => {
                    mistakes.note(&e);
                    Served::Used(0)
                }
            })?;
        let answers = std::mem::take(&mut later.done().answers);
        for Reply { head, address, unique, error } in answers {
            let header = reply_header(0, error, unique);
            let len = match memory.write_slice(header.as_bytes(), address) {
                Ok(()) => u32::try_from(REPLY_HEADER).unwrap_or(0),
                Err(e) => {
                    mistakes.note(&e);
                    0
                }
            };
            queue.add_used(memory, head, len).map_err(Error::Ring)?;
            used = true;
        }
        if used {
            kicks.insert(0);
        }
        if more {
            later.wake.signal();
        }
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.later.wake.clear();
        Ok(())
    }

    fn reset(&mut self) {
        let mut done = self.later.done();
        done.generation = done.generation.wrapping_add(1);
        done.answers.clear();
        drop(done);
        self.server.locks().leave(self.number);
    }
}

#[cfg(test)]
mod tests;
