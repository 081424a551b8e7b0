//! What a sandbox owns on this host, and how that is taken away.

use std::{io, sync::Arc, time::Duration};

use nix::unistd::Pid;

pub mod anchor;
pub mod cgroup;
pub mod disks;
pub mod error;
pub mod etc_files;
pub mod hooks;
pub mod journal;
pub mod mirror;
pub mod mount_watch;
pub mod mounts;
pub mod network;
pub mod offload;
pub mod oom;
pub mod share;
pub mod socket;
pub mod unwind;

pub use error::Error;

/// The host's side of a sandbox. Containers borrow it; it knows none of them.
#[derive(Debug)]
pub struct Host {
    /// What the sandbox owns, written down.
    pub journal: journal::Journal,
    /// What the guest sees of this host.
    pub share: Arc<share::Share>,
    /// The network namespace and the VM's cards in it.
    pub network: network::Network,
    /// The VM's disks.
    pub disks: Vec<disks::Disk>,
    /// The cgroup of the VM and of the anchors. `None` on a host without cgroups.
    pub cgroup: Option<cgroup::Cgroup>,
    /// How hooks are run.
    pub hooks: hooks::Launch,
    /// How long this host's file systems may take for a container's mounts.
    pub files_deadline: Duration,
}

impl Host {
    /// Moves a process of the sandbox to its cgroup, with a score for the kernel's out-of-memory killer.
    pub fn admit(&self, pid: Pid, score: oom::Score) -> io::Result<()> {
        score.set(pid)?;
        self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.add(pid.as_raw()).map_err(io::Error::other))
    }
}
