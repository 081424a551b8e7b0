//! How a VM ends.

use std::fmt;

/// `KVM_INTERNAL_ERROR_EMULATION` and the others, by their numbers (linux/kvm.h).
const SUBERRORS: [&str; 5] = ["", "emulation", "simultaneous exceptions", "event delivery", "unexpected exit reason"];

/// Why a VM is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest reset itself: a reboot, or a panic that is set to reboot.
    Reset,
    /// The guest's processor met an exception that it had no handler for, nor for the failure of that.
    TripleFault(Processor),
    /// KVM could not go on with what the guest did. The host cannot run this guest.
    Internal {
        /// KVM's suberror.
        suberror: u32,
        /// What it says about it; for an emulation failure, the instruction.
        data: Vec<u64>,
        /// Where the vCPU was.
        at: Processor,
    },
    /// The host's processor refused to enter the guest.
    Entry {
        /// The hardware's reason.
        reason: u64,
        /// Where the vCPU was.
        at: Processor,
    },
    /// The guest used memory that the host could not give it.
    Memory {
        /// The guest's address.
        address: u64,
        /// Where the vCPU was.
        at: Processor,
    },
    /// An exit that this machine never asked for.
    Unexpected {
        /// Which.
        exit: String,
        /// Where the vCPU was.
        at: Processor,
    },
    /// `KVM_RUN` failed.
    Run {
        /// The error's number.
        errno: i32,
        /// Where the vCPU was.
        at: Processor,
    },
    /// The machine was told to end.
    Killed,
}

/// A vCPU's registers at its end, as far as KVM would tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Processor {
    /// Number of the vCPU.
    pub vcpu: u8,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
    pub cs: u16,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu, rip, rsp, rflags, cs, cr0, cr2, cr3, cr4, efer } = self;
        write!(
            f,
            "vcpu {vcpu} at {cs:#x}:{rip:#x} rsp {rsp:#x} rflags {rflags:#x} cr0 {cr0:#x} cr2 {cr2:#x} cr3 {cr3:#x} \
             cr4 {cr4:#x} efer {efer:#x}"
        )
    }
}

impl End {
    /// Whether it was the guest's own wish.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::PowerOff | Self::Reset)
    }

    /// Whether it shows that this host's KVM cannot run our guest.
    pub fn blames_kvm(&self) -> bool {
        matches!(self, Self::Internal { .. } | Self::Entry { .. })
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("guest powered off"),
            Self::Reset => f.write_str("guest reset itself"),
            Self::TripleFault(at) => write!(f, "guest crashed with a triple fault: {at}"),
            Self::Internal { suberror, data, at } => {
                let name = usize::try_from(*suberror).ok().and_then(|n| SUBERRORS.get(n)).copied().unwrap_or_default();
                write!(f, "KVM cannot run this guest: internal error {suberror}")?;
                if !name.is_empty() {
                    write!(f, " ({name})")?;
                }
                if let Some(instruction) = instruction(*suberror, data) {
                    write!(f, ", instruction {instruction}")?;
                }
                write!(f, ": {at}")
            }
            Self::Entry { reason, at } => write!(f, "processor refused to run the guest, reason {reason:#x}: {at}"),
            Self::Memory { address, at } => write!(f, "host has no memory for guest address {address:#x}: {at}"),
            Self::Unexpected { exit, at } => write!(f, "unexpected exit {exit}: {at}"),
            Self::Run { errno, at } => {
                write!(f, "run guest: {}: {at}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::Killed => f.write_str("machine was killed"),
        }
    }
}

/// The bytes that could not be emulated: flags, then a length and up to 15 bytes, in words.
fn instruction(suberror: u32, data: &[u64]) -> Option<String> {
    const EMULATION: u32 = 1;
    const HAS_INSTRUCTION: u64 = 1;
    let (flags, words) = data.split_first()?;
    if suberror != EMULATION || flags & HAS_INSTRUCTION == 0 {
        return None;
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let (len, bytes) = bytes.split_first()?;
    let text: Vec<String> = bytes.get(..usize::from(*len))?.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(text.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_that_kvm_could_not_emulate_is_named() {
        let data = vec![1, u64::from_le_bytes([4, 0xf3, 0x0f, 0xb8, 0xc1, 0, 0, 0]), 0];
        let at = Processor { vcpu: 1, rip: 0xffff_ffff_8100_0000, ..Processor::default() };
        let end = End::Internal { suberror: 1, data, at };
        let text = end.to_string();
        assert!(
            text.starts_with(
                "KVM cannot run this guest: internal error 1 (emulation), instruction f3 0f b8 c1: vcpu 1"
            ),
            "{text}"
        );
        assert!(end.blames_kvm() && !end.is_orderly());
    }

    #[test]
    fn nonsense_data_is_no_instruction() {
        assert_eq!(instruction(1, &[]), None);
        assert_eq!(instruction(1, &[1, 0xff]), None);
        assert_eq!(instruction(2, &[1, 1]), None);
        assert_eq!(instruction(1, &[0, 1]), None);
    }
}
