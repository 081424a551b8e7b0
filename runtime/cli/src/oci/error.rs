//! Why a container's command failed. Where runc has words that its callers look for, they are in here.

use std::{io, path::PathBuf};

/// An error of the container commands.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not root.
    #[error("containers need root: the VM's process is confined by it")]
    NotRoot,
    /// The id.
    #[error("{0:?}: invalid container ID format: letters, digits and _+-. only, and not \".\" or \"..\"")]
    Id(String),
    /// There is one.
    #[error("{0}: container with given ID already exists")]
    Exists(String),
    /// There is none.
    #[error("{0}: container does not exist")]
    Missing(String),
    /// It runs.
    #[error("{id}: cannot delete container that is not stopped: {status}; stop it, or delete it with --force")]
    NotStopped {
        /// Its id.
        id: String,
        /// What it is.
        status: &'static str,
    },
    /// It does not run.
    #[error("{0}: container not running")]
    NotRunning(String),
    /// It cannot be started.
    #[error("{id}: cannot start a container that is {status}")]
    NotCreated {
        /// Its id.
        id: String,
        /// What it is.
        status: &'static str,
    },
    /// Somebody else is at it.
    #[error("{0}: container is being created: wait for that, or delete it with --force")]
    Busy(String),
    /// A file or directory.
    #[error("{action} {path}")]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// JSON.
    #[error("read {path}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A step.
    #[error("{0}")]
    Step(&'static str, #[source] io::Error),
    /// The option has no meaning with a VM, or together with another one.
    #[error("{option}: {why}")]
    Option {
        /// Which.
        option: String,
        /// Why not, and what to do.
        why: &'static str,
    },
    /// A signal that there is not.
    #[error("{0:?} is not a signal")]
    Signal(String),
    /// There is no shim.
    #[error("find containerd-shim-vz-v2 beside {0} or in PATH: install it (`make install`)")]
    NoShim(PathBuf),
    /// The sandbox's daemon, or the process that keeps a container, said why.
    #[error("{0}")]
    Said(String),
    /// It ended and said nothing.
    #[error("{what} ended with {status}")]
    Died {
        /// What ended.
        what: &'static str,
        /// How.
        status: String,
    },
    /// A request to the daemon.
    #[error("{request}")]
    Task {
        /// Which.
        request: &'static str,
        /// Why not.
        source: ttrpc::Error,
    },
}

impl Error {
    /// For `map_err`.
    pub fn at(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { action, path, source }
    }

    /// For `map_err`.
    pub fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Step(what, source.into())
    }
}
