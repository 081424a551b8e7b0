//! What goes wrong in a call, and the code that the shim sees.

use ttrpc::{Code, get_status};

use crate::protocol::Failure;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// There is such a thing already.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// This guest cannot do that.
    #[error("{0}")]
    Unsupported(String),
    /// It was tried.
    #[error("{0}")]
    Failed(String),
}

/// Result of a call.
pub type Result<T> = std::result::Result<T, CallError>;

impl CallError {
    /// Something that the agent itself could not do.
    pub fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Self {
        move |e| Self::Failed(format!("{what}: {e}"))
    }

    /// No such container.
    pub fn no_container(id: &str) -> Self {
        Self::NotFound(format!("container {id:?} does not exist"))
    }

    /// No such process.
    pub fn no_process(container: &str, exec: &str) -> Self {
        Self::NotFound(format!("process {exec:?} of container {container:?} does not exist"))
    }

    /// The process has ended, in runc's words.
    pub fn finished() -> Self {
        Self::NotFound("process already finished".into())
    }
}

impl From<Failure> for CallError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Exists => Self::Exists("process exists already".into()),
            Failure::Gone => Self::finished(),
            Failure::Failed(text) => Self::Failed(text),
        }
    }
}

impl From<CallError> for ttrpc::Error {
    fn from(error: CallError) -> Self {
        let code = match &error {
            CallError::NotFound(_) => Code::NOT_FOUND,
            CallError::Exists(_) => Code::ALREADY_EXISTS,
            CallError::State(_) => Code::FAILED_PRECONDITION,
            CallError::Invalid(_) => Code::INVALID_ARGUMENT,
            CallError::Unsupported(_) => Code::UNIMPLEMENTED,
            CallError::Failed(_) => Code::UNKNOWN,
        };
        Self::RpcStatus(get_status(code, error.to_string()))
    }
}
