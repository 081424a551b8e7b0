//! Filters on system calls, made from the tables of [`crate::syscalls`].
//!
//! A thread has two or three of them on top of each other, of which the strictest word counts: the process's, which is
//! the sum of all roles; its role's; and one that turns a few refusals into errors. They are installed in an order in
//! which each still allows the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::OnceLock,
};

use libc::c_int;
use nix::unistd::Pid;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::{
    Error, Role,
    syscalls::{Allow, COMMON, REFUSED_AT_START, START},
};

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// What happens to a process that makes a system call which its filter does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Denied {
    /// It is killed; the host's audit log has the call's number.
    #[default]
    Kill,
    /// It says on its stderr which call it was, and exits. For development: what runs on until then is in a process
    /// that a guest may have taken over.
    Report,
}

/// Written once, by [`crate::restrict`], for the threads to come.
static DENIED: OnceLock<Denied> = OnceLock::new();

/// Installs the process's filter on the calling thread, which is the only one.
pub(crate) fn install_process(denied: Denied) -> Result<(), Error> {
    let denied = *DENIED.get_or_init(|| denied);
    let rules = [COMMON, START].into_iter().chain(Role::ALL.map(Role::allowed)).flatten().copied();
    install_refusals("process", REFUSED_AT_START)?;
    install_rules("process", rules.chain(passed(REFUSED_AT_START)), denied)
}

/// Installs a role's filter on the calling thread.
pub(crate) fn install(role: Role) -> Result<(), Error> {
    let denied = DENIED.get().copied().unwrap_or_default();
    let name = name(role);
    install_refusals(name, role.refused())?;
    install_rules(name, COMMON.iter().chain(role.allowed()).copied().chain(passed(role.refused())), denied)
}

/// What is refused by one filter has to be let through by the other, whose answer would be the stricter one.
fn passed(refused: &[(libc::c_long, c_int)]) -> impl Iterator<Item = Allow> {
    refused.iter().map(|(call, _)| Allow::Any(*call))
}

const fn name(role: Role) -> &'static str {
    match role {
        Role::Main => "main thread",
        Role::Vcpu => "vCPU thread",
        Role::Fs => "fs thread",
        Role::Lock => "lock thread",
        Role::Vsock => "vsock thread",
        Role::Net => "net thread",
        Role::Block => "block thread",
        Role::Device => "device thread",
        Role::Protocol => "vhost-user thread",
    }
}

fn install_refusals(name: &'static str, refused: &[(libc::c_long, c_int)]) -> Result<(), Error> {
    let failed = |e| Error::Compile(name, e);
    // A filter knows two outcomes, so each errno takes one.
    let numbers: BTreeSet<c_int> = refused.iter().map(|(_, errno)| *errno).collect();
    for errno in numbers {
        let rules = refused.iter().filter(|(_, e)| *e == errno).map(|(call, _)| (*call, Vec::new())).collect();
        let error = SeccompAction::Errno(errno.cast_unsigned());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, error, ARCH).map_err(failed)?;
        apply(name, &filter.try_into().map_err(failed)?)?;
    }
    Ok(())
}

fn install_rules(name: &'static str, allowed: impl Iterator<Item = Allow>, denied: Denied) -> Result<(), Error> {
    let otherwise = match denied {
        Denied::Kill => SeccompAction::KillProcess,
        Denied::Report => SeccompAction::Trap,
    };
    let failed = |e| Error::Compile(name, e);
    let rules = rules(allowed).map_err(failed)?;
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, ARCH).map_err(failed)?;
    apply(name, &filter.try_into().map_err(failed)?)
}

fn apply(name: &'static str, program: &BpfProgram) -> Result<(), Error> {
    apply_filter(program).map_err(|e| Error::Install(name, e))
}

/// A call with several entries is allowed where one of them allows it.
fn rules(allowed: impl Iterator<Item = Allow>) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut with_any_arguments = Vec::new();
    for allow in allowed {
        match allow {
            Allow::Any(call) => {
                rules.entry(call).or_default();
                with_any_arguments.push(call);
            }
            Allow::OneOf(call, argument, values) => {
                for value in values {
                    let is = condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, (*value).into())?;
                    rules.entry(call).or_default().push(is);
                }
            }
            Allow::Masked(call, argument, mask, value) => {
                let is = condition(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value)?;
                rules.entry(call).or_default().push(is);
            }
            Allow::Ourselves(call, argument) => {
                let pid = u64::from(Pid::this().as_raw().cast_unsigned());
                let is = condition(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, pid)?;
                rules.entry(call).or_default().push(is);
            }
        }
    }
    for call in with_any_arguments {
        // No rule at all means no condition.
        rules.entry(call).or_default().clear();
    }
    Ok(rules)
}

fn condition(
    argument: u8,
    length: SeccompCmpArgLen,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, length, operator, value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_with_any_arguments_has_no_condition_left() {
        let some = Allow::OneOf(libc::SYS_ioctl, 1, &[1, 2]);
        assert_eq!(rules([some].into_iter()).unwrap()[&libc::SYS_ioctl].len(), 2);
        let any = Allow::Any(libc::SYS_ioctl);
        assert!(rules([any, some].into_iter()).unwrap()[&libc::SYS_ioctl].is_empty());
    }

    #[test]
    fn every_filter_compiles() {
        for role in Role::ALL {
            let rules = rules(COMMON.iter().chain(role.allowed()).copied()).unwrap();
            let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, ARCH).unwrap();
            assert!(!BpfProgram::try_from(filter).unwrap().is_empty(), "{role:?}");
        }
    }
}
