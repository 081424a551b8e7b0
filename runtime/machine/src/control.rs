//! What the shim and its `vmm` process say to each other, over an inherited [`vz_sys::channel::Channel`].
//!
//! The shim sends [`Request`]s, [`Request::Boot`] first and once; the vmm sends [`Event`]s. Either side's end of file
//! means that it died: the vmm then ends the VM and itself, the shim ends the task.

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
pub use vz_config::Machine as MachineChoice;
use vz_sys::channel::Channel;

/// Descriptor under which the vmm process inherits its end of the channel.
pub const CONTROL_FD: i32 = 3;

/// From the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// Boot the VM, with the descriptors of its cards and disks. Answered by [`Event::Launched`] or [`Event::Ended`].
    Boot(Box<BootConfig>),
    /// Connect to a vsock port of the guest. Answered by [`Event::Dialed`] with the same id.
    Dial {
        /// Chosen by the shim.
        id: u64,
        /// The guest's port.
        port: u32,
    },
}

/// From the vmm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// The VM runs.
    Launched {
        /// Which machine it runs on.
        machine: MachineKind,
        /// CPU time that the vmm process used until here, in microseconds.
        cpu_us: u64,
    },
    /// The answer to [`Request::Dial`]; on success with one descriptor, a connected stream socket.
    Dialed {
        /// The request's id.
        id: u64,
        /// Why it failed: reset by the guest (nobody listens), or not yet possible.
        error: Option<String>,
    },
    /// The guest connected to one of [`BootConfig::guest_ports`]; with one descriptor, a connected stream socket.
    Accepted {
        /// The host's port.
        port: u32,
    },
    /// The VM has ended, or could not be started; the last message.
    Ended(Ended),
}

/// Why and how a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// What happened.
    pub cause: Cause,
    /// A sentence for people: what failed, found and wanted, and what to do.
    pub message: String,
    /// The last lines of the guest's console; empty where there were none.
    pub console: String,
}

/// What ended a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// It could not be started: bundle, QEMU, resources.
    Launch,
    /// The agent did not connect to [`BootConfig::guest_ports`] within the boot deadline.
    BootTimeout,
    /// The guest powered off or rebooted.
    Shutdown,
    /// The guest's kernel panicked.
    Panic,
    /// The machine itself failed or was killed.
    Machine,
    /// KVM failed before the agent connected, which is to say that this host's KVM cannot run our guest. The shim then
    /// marks the host, see [`crate::verdict::Host::failed_early`].
    Kvm,
}

/// A machine that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// Our own, on KVM.
    Kvm,
    /// QEMU's `microvm`, software emulation.
    Qemu,
}

impl MachineKind {
    /// Its name, as in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// A network card of the guest. Its tap descriptors, one for each queue pair, come with [`Request::Boot`], those of all
/// cards in the order of [`BootConfig::nics`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// The address that the guest's driver finds; the agent may set another.
    pub mac: [u8; 6],
    /// Queue pairs, at least 1.
    pub queue_pairs: u16,
}

/// A disk of the guest. Its file comes with [`Request::Boot`], after the cards' descriptors, in the order of
/// [`BootConfig::disks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its name in the guest (`/sys/block/*/serial`), at most 20 bytes.
    pub id: String,
    /// The guest cannot write.
    pub read_only: bool,
}

/// Everything that the vmm needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// `namespace/id` of the sandbox, for log lines.
    pub sandbox: String,
    /// Which machine to run on.
    pub machine: MachineChoice,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Guest bundle directory (`vmlinux`, `initramfs.img`, `version.json`); verified before use.
    pub guest_bundle: PathBuf,
    /// Directory that is shared with the guest as [`BootConfig::share_tag`].
    pub share: PathBuf,
    /// virtiofs tag of the share.
    pub share_tag: String,
    /// The sandbox's state directory: the vmm keeps `console.log` and its sockets there.
    pub state_dir: PathBuf,
    /// Host ports that the guest may connect to; everything else is reset.
    pub guest_ports: Vec<u32>,
    /// Time in milliseconds for the guest's first connection to one of `guest_ports`.
    pub boot_deadline_ms: u64,
    /// Most bytes that are kept of the console.
    pub console_limit: u64,
    /// QEMU's program: an absolute path, or a name that is looked up in `PATH`.
    pub qemu: PathBuf,
    /// Appended to the guest's kernel command line.
    pub kernel_args: String,
    /// For measurements: the guest's clocks count instructions, a nanosecond each, instead of time, and all that is
    /// random or of the host's clock is the same each time. [`MachineKind::Qemu`] only.
    pub count_instructions: bool,
    /// For development: a thread that makes a system call which its filter denies says which, before the process ends.
    pub report_denied_calls: bool,
    /// Lowest level that the vmm logs to its stderr: error, warn, info, debug, trace.
    pub log_level: String,
}

/// Sends one message with at most one descriptor.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    serde_json::to_vec(message).map_err(io::Error::other)
}

/// Reads a message's bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Sends one message; the descriptors are duplicated to the peer.
pub fn send<T: Serialize>(channel: &Channel, message: &T, fds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
    channel.send(&encode(message)?, fds)
}
