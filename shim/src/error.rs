//! What a request can fail with, and the one place where it becomes a ttrpc status.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use ttrpc::{Code, get_status};
pub use vz_sys::error::chain;

/// Why a request failed.
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
    /// Not offered.
    #[error("{0} is not supported by vz")]
    Unimplemented(&'static str),
    /// The VM could not be started, or has ended.
    #[error("{0}")]
    Sandbox(Arc<str>),
    /// The agent did not answer in time.
    #[error("{what}: the guest agent did not answer within {} s", .after.as_secs())]
    AgentTimeout {
        /// The request.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The agent is not connected, and the VM runs.
    #[error("{what}: the guest agent is not connected after {} s", .after.as_secs())]
    AgentAway {
        /// The request.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection broke while the request was under way, and the VM runs.
    #[error("the guest agent was lost during {what}: {why}")]
    AgentLost {
        /// The request.
        what: &'static str,
        /// What ttrpc said.
        why: String,
    },
    /// Too many requests wait for the agent.
    #[error("{what}: {most} requests wait for the guest agent already")]
    AgentBusy {
        /// The request.
        what: &'static str,
        /// How many may.
        most: usize,
    },
    /// A request is larger than a message to the agent can be.
    #[error("{what}: the request has {bytes} bytes, at most {most} can be sent to the guest")]
    TooLarge {
        /// The request.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// The largest that is possible.
        most: u64,
    },
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
    /// A file system of the host's does not answer.
    #[error("{what}: the file system did not answer for {seconds} s")]
    Stuck {
        /// What was tried.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The agent refused, with its own code and words.
    #[error("{message}")]
    Agent {
        /// Its code.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The spec.
    #[error("read {path}")]
    ReadSpec {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: oci_spec::OciSpecError,
    },
    /// The spec asks for what a VM cannot give.
    #[error(transparent)]
    Spec(#[from] crate::container::spec::Error),
    /// A tmpfs that is to have what the image has there.
    #[error(transparent)]
    CopyUp(#[from] crate::container::copyup::Error),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] vz_config::Error),
    /// The share.
    #[error(transparent)]
    Share(#[from] crate::host::share::Error),
    /// The anchor.
    #[error(transparent)]
    Anchor(#[from] crate::host::anchor::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] crate::host::network::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] crate::host::disks::Error),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] crate::host::hooks::Error),
    /// Standard input or output.
    #[error(transparent)]
    Io(#[from] crate::container::stdio::Error),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] crate::host::journal::Error),
    /// The cgroup.
    #[error(transparent)]
    Cgroup(#[from] crate::host::cgroup::Error),
    /// The guest's metrics.
    #[error(transparent)]
    Metrics(#[from] crate::guest::metrics::Error),
    /// The vmm process.
    #[error(transparent)]
    Vmm(#[from] crate::guest::vmm::Error),
    /// A message could not be read or written.
    #[error("{what}")]
    Message {
        /// Which.
        what: &'static str,
        /// Why not.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl Error {
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Self::State { .. } | Self::Disk(crate::host::disks::Error::Busy { .. }) => Code::FAILED_PRECONDITION,
            Self::Invalid(_)
            | Self::Spec(_)
            | Self::ReadSpec { .. }
            | Self::Config(_)
            | Self::Disk(crate::host::disks::Error::Missing { .. } | crate::host::disks::Error::Late { .. })
            | Self::Cgroup(crate::host::cgroup::Error::Path(_)) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Sandbox(_) | Self::AgentAway { .. } | Self::AgentLost { .. } => Code::UNAVAILABLE,
            Self::AgentTimeout { .. } | Self::Unconfirmed { .. } | Self::Unreported { .. } | Self::Stuck { .. } => {
                Code::DEADLINE_EXCEEDED
            }
            Self::AgentBusy { .. } => Code::RESOURCE_EXHAUSTED,
            Self::TooLarge { .. } => Code::INVALID_ARGUMENT,
            Self::Agent { code, .. } => *code,
            _ => Code::UNKNOWN,
        }
    }

    /// What the client is told.
    pub fn to_ttrpc(&self) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(get_status(self.code(), chain(self)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_ones_that_clients_look_for() {
        let code = |error: Error| match error.to_ttrpc() {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        };
        assert_eq!(code(Error::Finished), Code::NOT_FOUND);
        assert_eq!(code(Error::AlreadyExists { what: "exec", id: "x".into() }), Code::ALREADY_EXISTS);
        let state = Error::State { what: "container", id: "x".into(), state: "running", wanted: "must be stopped" };
        assert_eq!(state.to_string(), "container x is running, must be stopped");
        assert_eq!(code(state), Code::FAILED_PRECONDITION);
        assert_eq!(code(Error::Unimplemented("checkpoint")), Code::UNIMPLEMENTED);
        let (what, after) = ("kill", Duration::from_secs(4));
        assert_eq!(code(Error::AgentTimeout { what, after }), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(Error::AgentAway { what, after }), Code::UNAVAILABLE);
        assert_eq!(code(Error::AgentLost { what, why: "reset".into() }), Code::UNAVAILABLE);
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = crate::host::anchor::Error::Spawn(std::io::Error::other("no memory"));
        assert_eq!(chain(&Error::from(error)), "start anchor process: no memory");
    }
}
