//! Why the guest's side of a sandbox fails.

use std::{sync::Arc, time::Duration};

use ttrpc::Code;
use vz_proto::frame;

use super::{metrics, vmm};
use crate::host;

/// A request that the guest has not answered, or has refused.
///
/// A time-out says whether the agent was connected; a refusal has the agent's code and words. [`Error::Ended`] means
/// that the VM has ended, and nothing else does.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM could not be started, or has ended.
    #[error("{0}")]
    Ended(Arc<str>),
    /// The agent did not answer in time.
    #[error("{what}: the guest agent did not answer within {} s", .after.as_secs())]
    Timeout {
        /// The request.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The agent is not connected, and the VM runs.
    #[error("{what}: the guest agent is not connected after {} s", .after.as_secs())]
    Away {
        /// The request.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection broke while the request was under way, and the VM runs.
    #[error("the guest agent was lost during {what}: {why}")]
    Lost {
        /// The request.
        what: &'static str,
        /// What ttrpc said.
        why: String,
    },
    /// Too many requests wait for the agent.
    #[error("{what}: {most} requests wait for the guest agent already")]
    Busy {
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
    /// The agent refused, with its own code and words.
    #[error("{message}")]
    Refused {
        /// Its code.
        code: Code,
        /// Its words.
        message: String,
    },
    /// The vmm process.
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    /// The guest's metrics.
    #[error(transparent)]
    Metrics(#[from] metrics::Error),
    /// A stream to a process of the guest.
    #[error("open stdio stream")]
    Stream(#[source] frame::Error),
    /// What the guest is to be told of the host.
    #[error(transparent)]
    Host(#[from] host::Error),
}

impl Error {
    /// Whether the agent knows no such process.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NOT_FOUND, .. })
    }

    /// Whether the request may have been carried out all the same.
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Away { .. } | Self::Lost { .. })
    }
}
