//! Network namespaces, held by descriptor.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

/// The namespace of the thread that opens it.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// A network namespace. One without a name ends with the last process, descriptor and socket that is in it.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    id: (u64, u64),
}

impl Netns {
    /// The calling thread's.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new(CURRENT))
    }

    /// The one at a path: /run/netns/NAME, /proc/PID/ns/net. Fails with `InvalidInput` where it is something else.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let meta = file.metadata()?;
        let fd = OwnedFd::from(file);
        if !is_network_namespace(&fd) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace"));
        }
        Ok(Self { fd, id: (meta.dev(), meta.ino()) })
    }

    /// A new one, in which only `lo` is, and down.
    pub fn create() -> io::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })?
    }

    /// Runs `work` on a thread of its own in the namespace. What it opens there stays in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| {
            setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?
    }

    /// Whether both are the same namespace.
    pub fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A thread that has changed its namespace is not used for anything else.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().map_err(|_| io::Error::other("thread in network namespace panicked"))
    })
}

fn is_network_namespace(fd: &OwnedFd) -> bool {
    vz_sys::namespace::kind(fd.as_fd()).is_ok_and(|kind| kind == CloneFlags::CLONE_NEWNET)
}
