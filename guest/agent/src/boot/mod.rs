//! From the kernel's hand-over to a system that containers can run in.
//!
//! [`root`] is what the server needs before it can dial the host; [`rest`] happens while it waits for the answer.

mod mounts;

use std::{
    fs::{self, File},
    io,
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::resource::{RLIM_INFINITY, Resource, rlim_t, setrlimit},
};
use vz_proto::NETNS_PATH;

/// Why the guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See the text.
    #[error("mount {what} at {at}")]
    Mount {
        /// File system or tag.
        what: &'static str,
        /// Where it belongs.
        at: &'static str,
        /// Of mount(2).
        #[source]
        source: Errno,
    },
    /// See the text.
    #[error("create {0}")]
    Create(&'static str, #[source] io::Error),
    /// See the text.
    #[error("switch root")]
    SwitchRoot(#[source] Errno),
    /// See the text.
    #[error("write {0}")]
    Write(&'static str, #[source] io::Error),
    /// See the text.
    #[error("read {0}")]
    Read(&'static str, #[source] io::Error),
    /// See the text.
    #[error("set limit of {0}")]
    Limit(&'static str, #[source] Errno),
    /// See the text.
    #[error("make the containers' network namespace")]
    Network(#[source] io::Error),
}

/// Moves into the VM's root and mounts what the agent itself needs.
pub fn root() -> Result<(), Error> {
    mounts::switch_root()?;
    mounts::early()
}

/// Everything else.
pub fn rest() -> Result<(), Error> {
    mounts::late()?;
    mounts::share()?;
    container_network().map_err(Error::Network)?;
    limits()?;
    settings()
}

/// The network namespace of all containers, with its loopback interface up.
fn container_network() -> io::Result<()> {
    const OURS: &str = "/proc/self/ns/net";
    const NONE: Option<&str> = None;
    let own = File::open(OURS)?;
    unshare(CloneFlags::CLONE_NEWNET)?;
    crate::net::loopback_up()?;
    File::create(NETNS_PATH)?;
    mount(Some(OURS), NETNS_PATH, NONE, MsFlags::MS_BIND, NONE)?;
    setns(own, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}

/// Limits that containers inherit where their spec has none: those of a service manager, not those of a bare init.
fn limits() -> Result<(), Error> {
    const FILES: rlim_t = 1024 * 1024;
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).map_err(|e| Error::Limit("open files", e))?;
    // The kernel's default is a share of the memory that it boots with; cgroups limit processes here.
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).map_err(|e| Error::Limit("processes", e))
}

/// What every distribution sets and containers count on.
fn settings() -> Result<(), Error> {
    for (file, value) in [
        // That is not one of these: how much of memory a CPU may keep in free lists of its own, from which nothing goes
        // back to the host. By the kernel's own choice that is 28 MiB of 1 GiB where there is one CPU.
        ("/proc/sys/vm/percpu_pagelist_high_fraction", "1000"),
        ("/proc/sys/kernel/pid_max", "4194304"),
        ("/proc/sys/fs/protected_hardlinks", "1"),
        ("/proc/sys/fs/protected_symlinks", "1"),
        ("/proc/sys/fs/inotify/max_user_instances", "1024"),
    ] {
        fs::write(file, value).map_err(|e| Error::Write(file, e))?;
    }
    Ok(())
}
