//! virtio-fs: one directory tree, served by virtiofsd's pass-through file system in this process.
//!
//! Each queue is a backend of its own, so that each has a thread: requests of one queue are served in order, those of
//! several in parallel. All share one [`Server`], hence one inode table.
//!
//! Nothing of the shared directory is opened before the guest's FUSE_INIT: by then the process is in its jail, and
//! descriptors that were opened in there cannot reach out of it.
//!
//! What the guest sees is what is in the directory now: the host changes files under a running guest (bind mounts of
//! single files, `cp`, volumes of several sandboxes). So there is no write-back cache, an open drops cached pages unless
//! the file is the one that was cached (`cache`), and names and attributes are believed for [`Config::cache`] only.
//!
//! Threat: see the crate. virtiofsd does not check names; [`guard::Guarded`] does. It also splits a reply buffer without
//! looking at its size; [`FsQueue`] looks before.

use std::{
    fs::File,
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    filesystem::{Context, FileSystem},
    passthrough::{self, CachePolicy, PassthroughFs},
    server::Server,
};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues,
    chain::{Chain, Served, serve},
    limit::Mistakes,
};

mod cache;
mod guard;
pub use guard::Guarded;

/// Largest tag in bytes.
const TAG: usize = 36;
/// Size of each queue.
const QUEUE_SIZE: u16 = 1024;
/// Chains of one queue that are served in one call.
const BATCH: usize = 4096;

/// Bytes of a FUSE request's and of a reply's header.
const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
/// Requests that have no reply.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

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
    /// How long the guest believes names and attributes, and that a name is not there: a program's start asks for dozens of
    /// those, the same ones again and again (`PATH`, the dynamic linker's directories).
    pub cache: Duration,
    /// Most descriptors that the guest's inodes and open files may take.
    pub fd_limit: u64,
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
}

/// The device, before its queues are handed to threads.
#[derive(Debug)]
pub struct Fs {
    queues: Vec<FsQueue>,
}

impl Fs {
    /// Sets up the share. Sets the process's umask to 0, which creating files with the guest's modes needs.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let Config { root, tag, request_queues, proc_self_fd, cache, fd_limit } = config;
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
            // Setuid bits are cleared here, so that the guest need not ask for a capability attribute before each write.
            killpriv_v2: true,
            // Without, files of different mounts can have the same device and inode number in the guest.
            announce_submounts: true,
            proc_sfd_rawfd: proc_self_fd,
            guest_fd_limit: fd_limit,
            ..passthrough::Config::default()
        })
        .map_err(ConfigError::Share)?;
        let fs = Guarded::new(fs, cache);
        let server: Arc<dyn Serve> = Arc::new(Share { server: Server::new(fs.clone()), fs });
        let space: Arc<[u8]> = space.into();
        let queues = (0..=request_queues)
            .map(|_| FsQueue { server: Arc::clone(&server), space: Arc::clone(&space), mistakes: Mistakes::new("fs") })
            .collect();
        Ok(Self { queues })
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
}

struct Share<F: FileSystem + Send + Sync> {
    server: Server<Guarded<F>>,
    fs: Guarded<F>,
}

impl<F: FileSystem + Send + Sync> Serve for Share<F> {
    fn serve(&self, reader: Reader<'_>, writer: Writer<'_>) -> virtiofsd::Result<usize> {
        self.server.handle_message::<NoChannel>(reader, writer, None)
    }

    fn forget(&self, inode: u64, count: u64) {
        // Nobody's rights are looked at.
        let nobody = Context { uid: u32::MAX.into(), gid: u32::MAX.into(), pid: 0 };
        self.fs.forget(nobody, inode.into(), count);
    }
}

/// One queue of the device.
pub struct FsQueue {
    server: Arc<dyn Serve>,
    space: Arc<[u8]>,
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

fn handle(server: &dyn Serve, memory: &Memory, chain: Chain<'_>) -> Result<usize, BadRequest> {
    let mut reader = Reader::new(memory, chain.clone()).map_err(BadRequest::Buffers)?;
    let writer = Writer::new(memory, chain).map_err(BadRequest::Buffers)?;
    if reader.available_bytes() < REQUEST_HEADER {
        return Err(BadRequest::Short(reader.available_bytes()));
    }
    if writer.available_bytes() >= REPLY_HEADER {
        return server.serve(reader, writer).map_err(BadRequest::Server);
    }
    // virtiofsd panics where it wants to reply and there is no room. It reads the opcode itself, and the guest can change
    // it in between: so the requests without reply are done here, from a copy.
    let mut header = [0u8; REQUEST_HEADER];
    reader.read_exact(&mut header).map_err(|_| BadRequest::Short(0))?;
    let mut fields = header.as_slice();
    let (_len, opcode) = (word(&mut fields), word(&mut fields));
    let (_unique, inode) = (long(&mut fields), long(&mut fields));
    match opcode {
        FORGET => {
            let mut count = [0u8; 8];
            reader.read_exact(&mut count).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
            server.forget(inode, u64::from_le_bytes(count));
        }
        BATCH_FORGET => {
            let mut start = [0u8; 8];
            reader.read_exact(&mut start).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
            let count = word(&mut start.as_slice());
            // Ends with the request's bytes, however many it claims to have.
            for _ in 0..count {
                let mut one = [0u8; 16];
                reader.read_exact(&mut one).map_err(|_| BadRequest::Short(REQUEST_HEADER))?;
                let mut fields = one.as_slice();
                server.forget(long(&mut fields), long(&mut fields));
            }
        }
        // virtiofsd does not interrupt.
        INTERRUPT => {}
        _ => return Err(BadRequest::NoRoom(writer.available_bytes(), opcode)),
    }
    Ok(0)
}

/// Takes a field off the front; 0 where there is none.
fn word(bytes: &mut &[u8]) -> u32 {
    bytes.split_off(..4).and_then(|field| field.first_chunk()).map_or(0, |field| u32::from_le_bytes(*field))
}

/// As [`word`].
fn long(bytes: &mut &[u8]) -> u64 {
    bytes.split_off(..8).and_then(|field| field.first_chunk()).map_or(0, |field| u64::from_le_bytes(*field))
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

    fn queue(&mut self, index: u16, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let Some(Some(queue)) = queues.get_mut(usize::from(index)) else { return Ok(kicks) };
        let Self { server, mistakes, .. } = self;
        loop {
            let (used, more) = serve(queue, memory, BATCH, |chain| {
                let written = handle(server.as_ref(), memory, chain).unwrap_or_else(|e| {
                    mistakes.note(&e);
                    0
                });
                Served::Used(u32::try_from(written).unwrap_or(0))
            })?;
            if used {
                kicks.insert(usize::from(index));
            }
            if !more {
                return Ok(kicks);
            }
        }
    }
}

#[cfg(test)]
mod tests;
