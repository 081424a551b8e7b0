//! Why the host's side of a sandbox fails.

use super::{anchor, cgroup, disks, hooks, journal, network, offload, oom, share};

/// A failure of one part of the host's side. Each part names what it was about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The share.
    #[error(transparent)]
    Share(#[from] share::Error),
    /// The anchor.
    #[error(transparent)]
    Anchor(#[from] anchor::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] disks::Error),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// The score for the out-of-memory killer.
    #[error(transparent)]
    Score(#[from] oom::Error),
    /// Work on this host's file systems.
    #[error(transparent)]
    Files(#[from] offload::Error),
}
