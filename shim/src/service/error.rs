//! The one place where a failure becomes a ttrpc status.

use ttrpc::{Code, get_status};
use vz_sys::error::chain;

use crate::{
    container::{self, Error as Container},
    guest::Error as Guest,
    host::{Error as Host, cgroup, disks},
    sandbox::{self, pod, served},
    spec,
};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A container, or something of it.
    #[error(transparent)]
    Container(#[from] container::Error),
    /// A pod's sandbox.
    #[error(transparent)]
    Served(#[from] served::Error),
    /// A request that a VM cannot fulfil.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// Not offered.
    #[error("{0} is not supported by vz")]
    Unimplemented(&'static str),
}

impl Error {
    /// Whether the client asked after what is gone, which clients do as a matter of course.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Container(Container::NotFound { .. } | Container::Finished))
    }

    fn code(&self) -> Code {
        match self {
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Container(error) => of_container(error),
            Self::Served(error) => of_served(error),
            Self::Spec(_) => Code::INVALID_ARGUMENT,
        }
    }

    /// What the client is told.
    pub fn to_ttrpc(&self) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(get_status(self.code(), chain(self)))
    }
}

fn of_served(error: &served::Error) -> Code {
    match error {
        served::Error::NotFound(_) => Code::NOT_FOUND,
        served::Error::Step { .. } => Code::FAILED_PRECONDITION,
        served::Error::Pod(pod::Error::Options(_) | pod::Error::Spec(_)) => Code::INVALID_ARGUMENT,
        served::Error::Pod(pod::Error::Bundle { .. }) => Code::UNKNOWN,
        served::Error::Container(error) => of_container(error),
        served::Error::Sandbox(error) => match &**error {
            sandbox::Error::Host(error) => of_host(error),
            sandbox::Error::Guest(error) => of_guest(error),
            sandbox::Error::Spec(_) | sandbox::Error::Config(_) => Code::INVALID_ARGUMENT,
            sandbox::Error::FindBundle(_) | sandbox::Error::OpenBundle(_) => Code::UNKNOWN,
        },
    }
}

fn of_container(error: &Container) -> Code {
    match error {
        Container::NotFound { .. } | Container::Finished => Code::NOT_FOUND,
        Container::AlreadyExists { .. } => Code::ALREADY_EXISTS,
        Container::State { .. } | Container::TooLarge { .. } => Code::FAILED_PRECONDITION,
        Container::Invalid(_) | Container::Spec(_) => Code::INVALID_ARGUMENT,
        Container::Unconfirmed { .. } | Container::Unreported { .. } => Code::DEADLINE_EXCEEDED,
        Container::CopyUp(_) | Container::Stdio(_) => Code::UNKNOWN,
        Container::Host(error) => of_host(error),
        Container::Guest(error) => of_guest(error),
    }
}

fn of_host(error: &Host) -> Code {
    use crate::host::{network, offload};
    match error {
        Host::Disk(disks::Error::Busy { .. }) => Code::FAILED_PRECONDITION,
        Host::Disk(disks::Error::Missing { .. } | disks::Error::Late { .. })
        | Host::Cgroup(cgroup::Error::Path(_))
        | Host::Network(network::Error::Spec(_))
        | Host::Score(_) => Code::INVALID_ARGUMENT,
        Host::Files(offload::Error::Stuck { .. }) => Code::DEADLINE_EXCEEDED,
        Host::Files(offload::Error::Panicked(_)) => Code::UNAVAILABLE,
        _ => Code::UNKNOWN,
    }
}

fn of_guest(error: &Guest) -> Code {
    match error {
        Guest::Ended(_) | Guest::Away { .. } | Guest::Lost { .. } => Code::UNAVAILABLE,
        Guest::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        Guest::Busy { .. } => Code::RESOURCE_EXHAUSTED,
        Guest::TooLarge { .. } => Code::INVALID_ARGUMENT,
        Guest::Refused { code, .. } => *code,
        Guest::Host(error) => of_host(error),
        Guest::Vmm(_) | Guest::Metrics(_) | Guest::Stream(_) => Code::UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn code(error: impl Into<Container>) -> Code {
        match Error::from(error.into()).to_ttrpc() {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn codes_are_the_ones_that_clients_look_for() {
        assert_eq!(code(Container::Finished), Code::NOT_FOUND);
        assert_eq!(code(Container::AlreadyExists { what: "exec", id: "x".into() }), Code::ALREADY_EXISTS);
        let state = Container::State { what: "container", id: "x".into(), state: "running", wanted: "must be stopped" };
        assert_eq!(state.to_string(), "container x is running, must be stopped");
        assert_eq!(code(state), Code::FAILED_PRECONDITION);
        assert_eq!(Error::Unimplemented("checkpoint").code(), Code::UNIMPLEMENTED);
        let (what, after) = ("kill", Duration::from_secs(4));
        assert_eq!(code(Guest::Timeout { what, after }), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(Guest::Away { what, after }), Code::UNAVAILABLE);
        assert_eq!(code(Guest::Lost { what, why: "reset".into() }), Code::UNAVAILABLE);
        assert_eq!(code(Guest::Ended("the vm has ended".into())), Code::UNAVAILABLE);
    }

    #[test]
    fn what_the_client_asked_for_wrongly_is_told_apart_from_what_failed() {
        use std::{io, path::PathBuf};

        use crate::{
            container::{copyup, stdio},
            host::{network, offload, oom},
            spec,
        };
        let path = || PathBuf::from("/dev/x");
        let missing = || spec::Error::Missing("linux");
        let invalid: [Container; 7] = [
            Container::Invalid("no process".into()),
            missing().into(),
            disks::Error::Missing { path: path(), major: 8, minor: 0 }.into(),
            disks::Error::Late { path: path() }.into(),
            cgroup::Error::Path("a:b".into()).into(),
            network::Error::from(missing()).into(),
            Guest::TooLarge { what: "exec", bytes: 9, most: 8 }.into(),
        ];
        for error in invalid {
            let said = error.to_string();
            assert_eq!(code(error), Code::INVALID_ARGUMENT, "{said}");
        }
        let process = serde_json::json!({ "cwd": "/", "user": { "uid": 0, "gid": 0 }, "oomScoreAdj": 9999 });
        let score = serde_json::from_value(serde_json::json!({ "ociVersion": "1.2.0", "process": process })).unwrap();
        assert_eq!(code(oom::Score::of(&score).unwrap_err()), Code::INVALID_ARGUMENT);
        let failed = || io::Error::other("no memory");
        let unknown: [Container; 6] = [
            copyup::Error::Files("/run".into()).into(),
            stdio::Error::Scheme { uri: "x://".into(), scheme: "x".into() }.into(),
            disks::Error::Open { path: path(), source: failed() }.into(),
            network::Error::Create(failed()).into(),
            offload::Error::Thread(failed()).into(),
            Guest::Vmm(vz_machine::client::Error::Gone.into()).into(),
        ];
        for error in unknown {
            let said = error.to_string();
            assert_eq!(code(error), Code::UNKNOWN, "{said}");
        }
    }

    #[test]
    fn what_may_pass_by_itself_is_told_apart_too() {
        use crate::host::offload;
        let after = Duration::from_secs(4);
        let stuck = || offload::Error::Stuck { what: "look at /net".into(), seconds: 4 };
        assert_eq!(code(stuck()), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(Guest::Host(stuck().into())), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(Container::Unreported { after }), Code::DEADLINE_EXCEEDED);
        let unconfirmed = Container::Unconfirmed { what: "exec", id: "x".into(), after };
        assert_eq!(code(unconfirmed), Code::DEADLINE_EXCEEDED);
        assert_eq!(code(offload::Error::Panicked("mount".into())), Code::UNAVAILABLE);
        assert_eq!(code(disks::Error::Busy { path: "/dev/x".into() }), Code::FAILED_PRECONDITION);
        assert_eq!(code(Guest::Busy { what: "exec", most: 8 }), Code::RESOURCE_EXHAUSTED);
    }

    #[test]
    fn a_refusal_of_the_agent_keeps_its_code_and_words() {
        for refused in [Code::NOT_FOUND, Code::FAILED_PRECONDITION, Code::INTERNAL] {
            let error = Error::from(Container::from(Guest::Refused { code: refused, message: "no such thing".into() }));
            let ttrpc::Error::RpcStatus(status) = error.to_ttrpc() else { panic!("{error}") };
            assert_eq!((status.code(), status.message.as_str()), (refused, "no such thing"));
        }
    }

    #[test]
    fn only_what_is_gone_is_expected() {
        let gone = |error: Container| Error::from(error).is_gone();
        assert!(gone(Container::Finished));
        assert!(gone(Container::NotFound { what: "exec", id: "x".into() }));
        assert_eq!(code(Container::NotFound { what: "exec", id: "x".into() }), Code::NOT_FOUND);
        assert!(!gone(Container::Invalid("x".into())));
        // The agent does not know what the shim knows: somebody is wrong.
        assert!(!gone(Guest::Refused { code: Code::NOT_FOUND, message: "x".into() }.into()));
        assert!(!Error::Unimplemented("checkpoint").is_gone());
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = crate::host::anchor::Error::Spawn(std::io::Error::other("no memory"));
        assert_eq!(chain(&Error::from(Container::from(error))), "start anchor process: no memory");
    }
}
