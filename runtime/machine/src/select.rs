//! Which machine a sandbox runs on.
//!
//! The vmm process decides, before it launches the machine and while it can open `/dev/kvm`: whoever decides must be
//! able to probe, and the shim's `start` must not wait for that. A first start costs the probe, later ones the reading
//! of a file; see [`verdict`](crate::verdict).

pub use vz_probe::{Speed, Unusable};

use crate::{
    control::{MachineChoice, MachineKind},
    verdict::Host,
};

/// A machine, and why this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Which.
    pub kind: MachineKind,
    /// Why.
    pub reason: Reason,
}

/// Why a machine was chosen. The text continues "machine X: ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The configuration says so.
    #[error("configured")]
    Configured,
    /// KVM runs guests on the processor.
    #[error("KVM works on this host")]
    Works(Speed),
    /// KVM cannot be used.
    #[error("KVM cannot be used on this host: {0}")]
    Unusable(#[source] Unusable),
}

/// KVM was asked for and cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("machine \"kvm\" cannot run on this host: {0}; {advice}", advice = .0.advice())]
pub struct Refused(pub Unusable);

/// Chooses. The host is asked only where its KVM matters.
pub fn select(choice: MachineChoice, host: &Host) -> Result<Selection, Refused> {
    select_by(choice, || host.kvm().kvm)
}

/// As [`select`], for a caller who knows more about KVM, or wants to.
pub fn select_by(choice: MachineChoice, kvm: impl FnOnce() -> Result<Speed, Unusable>) -> Result<Selection, Refused> {
    let (kind, reason) = match choice {
        MachineChoice::Qemu => (MachineKind::Qemu, Reason::Configured),
        MachineChoice::Kvm => match kvm() {
            // What may have been the moment's is not held against somebody who knows what they want.
            Err(why) if why.is_lasting() => return Err(Refused(why)),
            _ => (MachineKind::Kvm, Reason::Configured),
        },
        MachineChoice::Auto => match kvm() {
            Err(why) => (MachineKind::Qemu, Reason::Unusable(why)),
            Ok(speed) => (MachineKind::Kvm, Reason::Works(speed)),
        },
    };
    Ok(Selection { kind, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Result<Speed, Unusable> = Ok(Speed { loop_ps: 300 });
    const NONE: Result<Speed, Unusable> = Err(Unusable::Missing);

    #[test]
    fn auto_takes_the_best_that_works() {
        let auto = |kvm: Result<Speed, Unusable>| select_by(MachineChoice::Auto, || kvm).unwrap();
        let works = Selection { kind: MachineKind::Kvm, reason: Reason::Works(Speed { loop_ps: 300 }) };
        assert_eq!(auto(FAST), works);
        let unusable = Selection { kind: MachineKind::Qemu, reason: Reason::Unusable(Unusable::Missing) };
        assert_eq!(auto(NONE), unusable);
    }

    #[test]
    fn kvm_is_kvm_or_nothing() {
        assert_eq!(select_by(MachineChoice::Kvm, || FAST).unwrap().kind, MachineKind::Kvm);
        assert_eq!(select_by(MachineChoice::Kvm, || NONE), Err(Refused(Unusable::Missing)));
        let late = select_by(MachineChoice::Kvm, || Err(Unusable::Deadline { ms: 5000 }));
        assert_eq!(late.unwrap().kind, MachineKind::Kvm);
        let said = Refused(Unusable::Permission).to_string();
        assert!(said.contains("may not be opened") && said.contains("run as root"), "{said}");
    }

    #[test]
    fn qemu_asks_nobody() {
        let selection = select_by(MachineChoice::Qemu, || panic!("the host was asked")).unwrap();
        assert_eq!(selection, Selection { kind: MachineKind::Qemu, reason: Reason::Configured });
    }
}
