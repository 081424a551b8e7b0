//! The description of a pod that containerd's CRI plugin sends as the options of `CreateSandbox`.
//!
//! The messages are a part of the Container Runtime Interface, version 1, with its field numbers. See
//! `proto/cri.proto`.

/// Generated messages.
#[allow(missing_debug_implementations, unused_qualifications, clippy::all, clippy::pedantic, clippy::restriction)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}

pub use generated::cri::*;
pub use protobuf::{EnumOrUnknown, Message};

/// How containerd names the type of a pod's configuration.
pub const POD_SANDBOX_CONFIG: &str = "runtime.v1.PodSandboxConfig";
