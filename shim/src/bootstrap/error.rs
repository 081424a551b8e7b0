//! Why a call of the shim's program fails: the one line that containerd shows to its client.

use std::{io, path::PathBuf};

use crate::host::{journal, unwind};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line.
    #[error("read command line")]
    Flags(#[source] containerd_shim::Error),
    /// Neither start, delete nor the daemon.
    #[error("unknown action {0:?}: containerd calls this program, see `containerd-shim-vz-v2 -v`")]
    Action(String),
    /// A flag is missing.
    #[error("flag -{0} is missing: containerd calls this program, see `containerd-shim-vz-v2 -v`")]
    Missing(&'static str),
    /// stdin, stdout or the working directory.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What containerd wrote is for another shim.
    #[error("bootstrap parameters are for {found}, the command line for {wanted}")]
    Mismatch {
        /// Namespace and id in the parameters.
        found: String,
        /// Those of the command line.
        wanted: String,
    },
    /// The socket.
    #[error("listen on {path}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The sandbox runs.
    #[error(
        "container {namespace}/{id} runs already, under the shim with pid {pid}: use another id, or remove it first"
    )]
    Living {
        /// Its namespace.
        namespace: String,
        /// Its id.
        id: String,
        /// Its shim's pid.
        pid: i32,
    },
    /// The daemon did not come up.
    #[error("{0}")]
    Daemon(String),
    /// A message could not be read or written.
    #[error("{what}")]
    Message {
        /// Which.
        what: &'static str,
        /// Why not.
        source: containerd_shim_protos::protobuf::Error,
    },
    /// The journal of an earlier sandbox.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// Cleaning up.
    #[error(transparent)]
    Unwind(#[from] unwind::Error),
}

/// For `map_err`: what was tried.
pub fn fail(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}
