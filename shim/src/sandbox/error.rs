//! Why a sandbox cannot be had.

use crate::{guest, host, parts::from_parts, spec};

/// A sandbox cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] vz_config::Error),
    /// The spec of its first container.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The guest bundle is not there.
    #[error("find guest bundle")]
    FindBundle(#[source] vz_linux::EnsureError),
    /// The guest bundle is not what it should be.
    #[error("open guest bundle")]
    OpenBundle(#[source] vz_linux::Error),
    /// The host's side.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The guest's side.
    #[error(transparent)]
    Guest(#[from] guest::Error),
}

from_parts!(
    Host: host::cgroup::Error,
    host::disks::Error,
    host::journal::Error,
    host::network::Error,
    host::oom::Error,
    host::share::Error
);
from_parts!(Guest: guest::vmm::Error);
