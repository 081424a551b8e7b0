//! What the shim and the guest agent say to each other.
//!
//! All connections are vsock streams between the host (CID 2) and the guest:
//!
//! | port | dialled by | carries |
//! | --- | --- | --- |
//! | [`CONTROL_PORT`] | guest | a [`Hello`] frame, a [`Welcome`] frame back, then ttrpc with the guest as server |
//! | [`LOG_PORT`] | guest | [`LogRecord`] frames |
//! | [`STREAM_PORT`] | host | a stream token ([`frame::write_token`]), then the raw bytes of one stdio stream |
//! | [`FORWARD_PORT`] | host | a [`Forward`] frame, a [`ForwardReply`] frame back, then the bytes of a TCP connection |
//!
//! A host-to-guest half-close on a stream is end of file on the process's stdin; the guest's
//! half-close is end of file on the process's output. Frames are length-prefixed protobuf, see [`frame`].
//!
//! Threat: both ends parse what the other wrote, and the guest may be hostile. Every length is bounded
//! here, once, before anything is allocated.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

/// Generated messages and service; see `proto/agent.proto` for the contract of each.
#[allow(missing_debug_implementations, unused_qualifications, clippy::all, clippy::pedantic, clippy::restriction)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/service.rs"));
}

pub use generated::agent::*;
pub use generated::agent_ttrpc::{Agent, AgentClient, create_agent};
pub use protobuf::well_known_types::empty::Empty;

pub mod bounds;
pub mod frame;
pub mod handshake;

/// CID of the host, by definition of the protocol.
pub const HOST_CID: u32 = 2;
/// CID of the guest. Every VM has a device of its own, so all can use the same.
pub const GUEST_CID: u32 = 3;
/// Host port of the control connection.
pub const CONTROL_PORT: u32 = 1024;
/// Host port of the log connection.
pub const LOG_PORT: u32 = 1025;
/// Guest port of the stdio streams.
pub const STREAM_PORT: u32 = 1026;
/// Guest port of connections to what listens on the containers' loopback addresses.
pub const FORWARD_PORT: u32 = 1027;
/// virtiofs tag of the sandbox's share.
pub const SHARE_TAG: &str = "vz";
/// Where the agent mounts the share in the guest.
pub const SHARE_PATH: &str = "/run/vz/share";
/// A disk of the VM as a mount's source, with its id behind it: under this name, udev would have it.
pub const DISK_PATH: &str = "/dev/disk/by-id/virtio-";
/// The network namespace that all containers of a VM share. It is not the agent's own, so that nothing that a container
/// does to its network can cut the agent off.
pub const NETNS_PATH: &str = "/run/vz/netns";
/// A namespace of another container as a spec's namespace path: this, the container's id, and the namespace's name
/// below /proc/PID/ns.
pub const NAMESPACES_PATH: &str = "/run/vz/ns";
/// Annotation of a spec whose container only keeps a pod's namespaces: it has no program, the agent is it.
pub const PAUSE_ANNOTATION: &str = "io.containerd.vz.internal/pause";
/// Shared memory that containers have in common as a mount's source: this, and the id of the container whose IPC
/// namespace they share. The mount has the option `size=BYTES`.
pub const SHM_PATH: &str = "/run/vz/shm";
