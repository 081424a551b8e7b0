//! Why a host's KVM cannot be used, and what to do about it.

use std::fmt;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::payload;

/// Why KVM cannot be used on this host. The text is the finding; [`Unusable::advice`] says what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Unusable {
    /// There is no `/dev/kvm`.
    #[error("there is no /dev/kvm")]
    Missing,
    /// There is a device node, with nothing behind it.
    #[error("/dev/kvm is there, but no driver is behind it")]
    NoDriver,
    /// This process may not use it.
    #[error("/dev/kvm may not be opened by this process")]
    Permission,
    /// Another hypervisor has the processor's virtualization.
    #[error("/dev/kvm is busy: another hypervisor uses the processor's virtualization")]
    Busy,
    /// Another API.
    #[error("KVM has API version {found}, not {wanted}")]
    Version {
        /// What it has.
        found: i32,
        /// What there is since Linux 2.6.22.
        wanted: i32,
    },
    /// It lacks what the built-in machine needs.
    #[error("KVM lacks {}", names.join(", "))]
    Capabilities {
        /// Names of the capabilities, as in the kernel's documentation.
        names: Vec<String>,
    },
    /// An operation failed.
    #[error("{operation}: {error}")]
    Failed {
        /// Which.
        operation: String,
        /// The system's words.
        error: String,
    },
    /// KVM gave up on the guest, as KVMs do that emulate it.
    #[error("KVM gave up on {}", instruction(*suberror, bytes))]
    InternalError {
        /// KVM's number: 1 is an instruction that it could not emulate.
        suberror: u32,
        /// The instruction, where KVM told.
        bytes: Vec<u8>,
    },
    /// It works, and emulates.
    #[error(
        "KVM emulates its guests: {} ns for an iteration of an empty loop, a processor takes about one",
        loop_ps / 1000
    )]
    TooSlow {
        /// CPU time of an iteration, in picoseconds.
        loop_ps: u64,
    },
    /// The guest computed something else than a processor does.
    #[error("a guest computed {instruction} wrongly: {found:#x}, must be {wanted:#x}")]
    Wrong {
        /// What was computed.
        instruction: String,
        /// What it must be.
        wanted: u32,
        /// What it was.
        found: u32,
    },
    /// The guest faulted and had no handlers.
    #[error("a guest that does nothing wrong ended by a triple fault")]
    TripleFault,
    /// The processor refused the guest's state.
    #[error("the processor refused to enter a guest (reason {reason:#x}, CPU {cpu})")]
    Entry {
        /// The hardware's reason.
        reason: u64,
        /// On which CPU.
        cpu: u32,
    },
    /// KVM returned from the guest for a reason that it cannot have.
    #[error("KVM left a guest for no reason of the guest's: {exit}")]
    Exit {
        /// The reason.
        exit: String,
    },
    /// No answer.
    #[error("a guest of a hundred instructions did not end within {ms} ms")]
    Deadline {
        /// Milliseconds that were waited.
        ms: u64,
    },
    /// The process that tried it died.
    #[error("the process that tried KVM died: {how}")]
    Died {
        /// How.
        how: String,
    },
    /// A guest that had to boot did not, and it was KVM's doing.
    #[error("KVM failed while a VM booted: {message}")]
    Boot {
        /// What the machine said.
        message: String,
    },
}

impl Unusable {
    pub(crate) fn failed(operation: &str, errno: Errno) -> Self {
        Self::Failed { operation: operation.to_owned(), error: errno.desc().to_owned() }
    }

    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Missing | Self::NoDriver => {
                "load the kernel module kvm_intel or kvm_amd; if that fails, enable virtualization (VT-x, AMD-V) in the \
                 firmware, or nested virtualization for this virtual machine"
            }
            Self::Permission => "run as root, or as a member of the group that owns /dev/kvm",
            Self::Busy => "stop the other hypervisor (VirtualBox, VMware), or unload its kernel modules",
            Self::Version { .. } | Self::Capabilities { .. } => "run a kernel of 5.10 or later with all of KVM for x86",
            Self::InternalError { .. } | Self::TooSlow { .. } | Self::Wrong { .. } => {
                "this KVM does not run guests on the processor: set machine = \"qemu\", or use a host whose processor \
                 offers VT-x or AMD-V to it"
            }
            Self::TripleFault | Self::Entry { .. } | Self::Exit { .. } | Self::Boot { .. } => {
                "see the kernel's log; set machine = \"qemu\" until KVM works, then run `vz check --probe`"
            }
            Self::Failed { .. } | Self::Deadline { .. } | Self::Died { .. } => {
                "see the kernel's log, and run `vz check --probe` once the host is well"
            }
        }
    }

    /// Whether the same must be expected of the next attempt. What may have been the moment's, such as a host with no
    /// time or memory left, is not.
    pub fn is_lasting(&self) -> bool {
        !matches!(self, Self::Failed { .. } | Self::Deadline { .. } | Self::Died { .. })
    }
}

/// What KVM gave up on, for people.
fn instruction(suberror: u32, bytes: &[u8]) -> impl fmt::Display {
    let shown: Vec<String> = payload::whole(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    match (payload::name(bytes), suberror) {
        (Some(name), _) => format!("the instruction {name} ({}): internal error {suberror}", shown.join(" ")),
        (None, _) if !bytes.is_empty() => format!("an instruction ({}): internal error {suberror}", shown.join(" ")),
        (None, _) => format!("a guest: internal error {suberror}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_names_the_instruction() {
        let bytes = vec![0xf3, 0x48, 0x0f, 0xb8, 0xc3, 0xe7, 0xe0];
        let text = Unusable::InternalError { suberror: 1, bytes }.to_string();
        assert_eq!(text, "KVM gave up on the instruction popcnt (f3 48 0f b8 c3): internal error 1");
        let text = Unusable::InternalError { suberror: 3, bytes: Vec::new() }.to_string();
        assert_eq!(text, "KVM gave up on a guest: internal error 3");
        let text = Unusable::InternalError { suberror: 1, bytes: vec![0x0f, 0x0b] }.to_string();
        assert_eq!(text, "KVM gave up on an instruction (0f 0b): internal error 1");
    }

    #[test]
    fn a_finding_survives_being_written_down() {
        for finding in [
            Unusable::Missing,
            Unusable::Capabilities { names: vec!["KVM_CAP_IRQFD".into()] },
            Unusable::InternalError { suberror: 1, bytes: vec![1, 2] },
            Unusable::TooSlow { loop_ps: 1_400_000 },
            Unusable::Entry { reason: 0x8000_0021, cpu: 3 },
        ] {
            let text = serde_json::to_string(&finding).unwrap();
            assert_eq!(serde_json::from_str::<Unusable>(&text).unwrap(), finding, "{text}");
        }
    }
}
