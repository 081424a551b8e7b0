//! Confinement of the `vmm` process and its threads: the privileged sequence, and the one helper that starts threads.
//!
//! The process gives up in this order, and cannot take back:
//!
//! 1. [`prepare`]: limits, dumpability, mounts that propagate back. The host's files can still be opened.
//! 2. [`enter_root`]: the root is the share and nothing else. What was not opened before cannot be opened any more.
//! 3. [`restrict`]: every capability but those that serving files needs, and every system call that no thread needs.
//! 4. [`enter`], by each thread, before it touches anything of the guest's: what its [`Role`] does not need. The
//!    process's first thread is the last to do so, as threads inherit what their maker may.
//!
//! Threat: a guest that has taken over a thread. Threads share an address space, so what one of them may, the others
//! may have done for them; the boundary is the process's: root, namespaces and the filter of [`restrict`]. Roles make
//! the way there longer.

use std::{
    io,
    thread::{self, JoinHandle},
};

mod capabilities;
pub mod emulator;
mod filter;
mod process;
mod syscalls;

pub use filter::Denied;
pub use process::{NO_CORE, OPEN_FILES, enter_root, prepare, restrict};

/// What a thread does, and thereby what it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The process's first thread: talks to the shim and watches the machine.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves a queue of virtio-fs.
    Fs,
    /// Waits for a lock on a file of the guest's.
    Lock,
    /// Serves virtio-vsock.
    Vsock,
    /// Serves virtio-net.
    Net,
    /// Serves virtio-blk.
    Block,
    /// Serves a small device: console, rng, balloon.
    Device,
    /// Speaks the vhost-user protocol with QEMU.
    Protocol,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Main,
        Self::Vcpu,
        Self::Fs,
        Self::Lock,
        Self::Vsock,
        Self::Net,
        Self::Block,
        Self::Device,
        Self::Protocol,
    ];
}

/// Why a process or a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("confine vmm: {operation}")]
    System {
        /// Which, and on what.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A capability could not be dropped.
    #[error("confine vmm: {operation}")]
    Capabilities {
        /// Of which set.
        operation: &'static str,
        /// Why.
        source: caps::errors::CapsError,
    },
    /// A filter could not be made.
    #[error("make system call filter for {0}")]
    Compile(&'static str, #[source] seccompiler::BackendError),
    /// A filter could not be installed.
    #[error("install system call filter for {0}")]
    Install(&'static str, #[source] seccompiler::Error),
}

/// Confines the calling thread to its role. Once, before it does anything else.
pub fn enter(role: Role) -> Result<(), Error> {
    capabilities::keep(role)?;
    filter::install(role)
}

/// Bytes of a thread's stack. Where the host gives large pages unasked, one of a large page's size would cost 2 MiB.
const STACK: usize = 512 << 10;

/// Starts a thread that is confined to its role before `f` runs. `refused` is called instead of `f` where it could not
/// be.
///
/// A panic is the business of the process's hook; the thread ends with it.
pub fn spawn<F, R>(role: Role, name: &str, f: F, refused: R) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
    R: FnOnce(Error) + Send + 'static,
{
    let name = name.to_owned();
    thread::Builder::new().name(name).stack_size(STACK).spawn(move || match enter(role) {
        Ok(()) => f(),
        Err(e) => refused(e),
    })
}
