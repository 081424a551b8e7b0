//! The container's seccomp profile for an exec.
//!
//! libcontainer gives the profile to a container's init only; a process that is executed in it would run without. So it
//! is loaded here, as libcontainer does it for init: without `noNewPrivileges` that takes `CAP_SYS_ADMIN`, which the
//! process is therefore given until then.

use std::collections::HashSet;

use libcontainer::{
    capabilities::drop_privileges,
    oci_spec::runtime::{Capability, LinuxCapabilities, LinuxSeccomp, Process, Spec},
    seccomp::{initialize_seccomp, is_notify},
    syscall::syscall::create_syscall,
};

/// What is left to do right before the program is executed.
#[derive(Clone)]
pub struct Late {
    profile: LinuxSeccomp,
    /// The capabilities that the process shall end up with, where it was lent some.
    capabilities: Option<LinuxCapabilities>,
}

impl Late {
    /// What an exec of `process` in the container of `spec` needs, and lends the process what it needs for that.
    pub fn prepare(spec: &Spec, process: &mut Process) -> Result<Option<Self>, &'static str> {
        let Some(profile) = spec.linux().as_ref().and_then(|l| l.seccomp().clone()) else { return Ok(None) };
        if is_notify(&profile) {
            return Err("exec in a container whose seccomp profile notifies a listener is not supported");
        }
        let capabilities = process.capabilities().clone();
        let Some(own) = capabilities.filter(|_| process.no_new_privileges() != Some(true)) else {
            return Ok(Some(Self { profile, capabilities: None }));
        };
        // Setting the bounding set back takes a capability too.
        let lent = HashSet::from([Capability::SysAdmin, Capability::Setpcap]);
        let with =
            |set: &Option<HashSet<Capability>>| Some(set.iter().flatten().copied().chain(lent.clone()).collect());
        let mut more = own.clone();
        more.set_bounding(with(own.bounding()))
            .set_effective(with(own.effective()))
            .set_permitted(with(own.permitted()));
        process.set_capabilities(Some(more));
        // An absent set is not touched when capabilities are dropped, so it must be an empty one.
        let mut back = own;
        let or_empty = |set: &Option<HashSet<Capability>>| Some(set.clone().unwrap_or_default());
        let sets = (or_empty(back.effective()), or_empty(back.permitted()));
        back.set_effective(sets.0).set_permitted(sets.1);
        Ok(Some(Self { profile, capabilities: Some(back) }))
    }

    /// Loads the profile and takes back what was lent.
    pub fn apply(&self) -> Result<(), String> {
        initialize_seccomp(&self.profile).map_err(|e| format!("load seccomp profile: {}", crate::text::chain(&e)))?;
        if let Some(capabilities) = &self.capabilities {
            drop_privileges(capabilities, create_syscall().as_ref())
                .map_err(|e| format!("drop capabilities: {}", crate::text::chain(&e)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(seccomp: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","linux":{{{seccomp}}}}}"#)).unwrap()
    }

    fn process(rest: &str) -> Process {
        serde_json::from_str(&format!(r#"{{"cwd":"/","user":{{"uid":0,"gid":0}}{rest}}}"#)).unwrap()
    }

    const PROFILE: &str = r#""seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}"#;

    #[test]
    fn without_a_profile_nothing_is_lent() {
        let mut exec = process(r#","capabilities":{"bounding":["CAP_KILL"]}"#);
        let before = exec.clone();
        assert!(Late::prepare(&spec(""), &mut exec).unwrap().is_none());
        assert_eq!(exec, before);
    }

    #[test]
    fn capabilities_are_lent_and_taken_back() {
        let mut exec = process(r#","capabilities":{"bounding":["CAP_KILL"]}"#);
        let late = Late::prepare(&spec(PROFILE), &mut exec).unwrap().unwrap();
        let lent = exec.capabilities().as_ref().unwrap();
        let wanted = HashSet::from([Capability::Kill, Capability::SysAdmin, Capability::Setpcap]);
        assert_eq!(lent.bounding().as_ref(), Some(&wanted));
        let back = late.capabilities.unwrap();
        assert_eq!(back.bounding(), &Some(HashSet::from([Capability::Kill])));
        assert_eq!(back.permitted(), &Some(HashSet::new()));
    }

    #[test]
    fn no_new_privileges_needs_no_loan() {
        let mut exec = process(r#","noNewPrivileges":true,"capabilities":{}"#);
        let before = exec.clone();
        let late = Late::prepare(&spec(PROFILE), &mut exec).unwrap().unwrap();
        assert!(late.capabilities.is_none());
        assert_eq!(exec, before);
    }
}
