//! Why a request about a container fails.

use std::time::Duration;

use super::{copyup, stdio};
use crate::{guest, host, parts::from_parts, spec};

/// What a client asks of a container cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("{what} {id}: not found")]
    NotFound {
        /// `container`, `exec`.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The process has ended; the one error of Kill that clients expect.
    #[error("process already finished")]
    Finished,
    /// The id is taken.
    #[error("{what} {id}: already exists")]
    AlreadyExists {
        /// `container`, `exec`.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The container or process is in another state.
    #[error("{what} {id} is {state}, {wanted}")]
    State {
        /// `container`, `exec`.
        what: &'static str,
        /// Its id.
        id: String,
        /// Its state.
        state: &'static str,
        /// What it must be for this.
        wanted: &'static str,
    },
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The guest says that a process has ended, and has not reported its end.
    #[error("the guest says that the process has ended, and did not report its end within {} s", .after.as_secs())]
    Unreported {
        /// How long it was waited for.
        after: Duration,
    },
    /// A process was killed, and its end is not known.
    #[error("{what} {id}: its end was not confirmed within {} s after SIGKILL", .after.as_secs())]
    Unconfirmed {
        /// `container`, `exec`.
        what: &'static str,
        /// Its id.
        id: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The VM does not have as much.
    #[error(
        "a {asked} is more than the VM has ({has}), and VMs do not grow: make the pod or container anew with the \
         larger limit, or set {set} in vz's configuration"
    )]
    TooLarge {
        /// What was asked for.
        asked: String,
        /// What there is.
        has: String,
        /// The setting.
        set: &'static str,
    },
    /// The spec asks for what a VM cannot give, or cannot be read.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// A tmpfs that is to have what the image has there.
    #[error(transparent)]
    CopyUp(#[from] copyup::Error),
    /// Standard input or output.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// The host's side.
    #[error(transparent)]
    Host(#[from] host::Error),
    /// The guest's side.
    #[error(transparent)]
    Guest(#[from] guest::Error),
}

from_parts!(
    Host: host::anchor::Error,
    host::cgroup::Error,
    host::disks::Error,
    host::hooks::Error,
    host::journal::Error,
    host::network::Error,
    host::offload::Error,
    host::oom::Error,
    host::share::Error
);
