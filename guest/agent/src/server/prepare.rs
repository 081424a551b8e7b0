//! A spec as libcontainer is to see it.

use std::{fs, io, os::unix::fs::DirBuilderExt};

use oci_spec::runtime::{Linux, LinuxNamespaceType, Spec};

use super::{
    error::{CallError, Result},
    resources,
};
use crate::{home, paths};

/// What the agent needs to know of a spec.
#[derive(Debug)]
pub struct Prepared {
    /// The spec, fitted to the guest.
    pub spec: Spec,
    /// See [`outlives_init`].
    pub outlives_init: bool,
}

/// Parses a spec and fits it to the guest.
pub fn prepare(bytes: &[u8], id: &str, terminal: bool) -> Result<Prepared> {
    let invalid = |e: String| CallError::Invalid(format!("spec of container {id:?}: {e}"));
    let mut spec: Spec = serde_json::from_slice(bytes).map_err(|e| invalid(e.to_string()))?;
    let root = spec.root().as_ref().map(|r| r.path().clone());
    let process = spec.process_mut().as_mut().ok_or_else(|| invalid("it has no process".into()))?;
    process.set_terminal(Some(terminal));
    if let Some(root) = &root {
        home::settle(process, root);
    }
    let linux = spec.linux_mut().as_mut().ok_or_else(|| invalid("it has no linux section".into()))?;
    if linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::User) {
        // libcontainer creates such containers, but executes processes outside of their user namespace.
        return Err(CallError::Unsupported("user namespaces are not supported in this guest".into()));
    }
    // Whatever the host calls it: in the guest each container has a place of its own.
    linux.set_cgroups_path(Some(paths::cgroup(id).into()));
    as_runc_takes_it(linux);
    let outlives_init = outlives_init(&spec);
    Ok(Prepared { spec, outlives_init })
}

/// Says the same in libcontainer's words, where these differ from what callers of runc say.
fn as_runc_takes_it(linux: &mut Linux) {
    // libcontainer propagates recursively under these names too.
    let propagation = linux.rootfs_propagation().as_deref();
    if let Some(plain) = propagation.and_then(|p| p.strip_prefix('r')).map(ToOwned::to_owned) {
        linux.set_rootfs_propagation(Some(plain));
    }
    if let Some(resources) = linux.resources_mut() {
        resources::as_runc_takes_them(resources);
    }
}

/// Whether the container has no pid namespace of its own: the kernel then leaves its other processes when init ends.
pub fn outlives_init(spec: &Spec) -> bool {
    let mut namespaces = spec.linux().iter().flat_map(|l| l.namespaces().iter().flatten());
    !namespaces.any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none())
}

/// Writes the bundle that libcontainer reads, in place of one that is left from before.
pub fn write_bundle(id: &str, spec: &Spec) -> io::Result<()> {
    let bundle = paths::bundle(id);
    for left in [&bundle, &paths::state(id)] {
        match fs::remove_dir_all(left) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    fs::DirBuilder::new().mode(0o700).create(&bundle)?;
    fs::write(bundle.join("config.json"), serde_json::to_vec(spec)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","user":{{"uid":0,"gid":0}},"args":["a"]}},"linux":{{{linux}}}}}"#
        )
    }

    #[test]
    fn every_container_has_its_own_cgroup() {
        let prepared = prepare(spec(r#""cgroupsPath":"system.slice:vz:a""#).as_bytes(), "a", false).unwrap();
        assert_eq!(prepared.spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some("/vz.a".as_ref()));
    }

    #[test]
    fn what_runc_takes_is_said_in_libcontainers_words() {
        let given = spec(r#""rootfsPropagation":"rshared","resources":{"pids":{"limit":0}}"#);
        let linux = prepare(given.as_bytes(), "a", false).unwrap().spec.linux().clone().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("shared"));
        assert_eq!(linux.resources().as_ref().unwrap().pids(), &None);
        let kept = spec(r#""rootfsPropagation":"slave","resources":{"pids":{"limit":-1}}"#);
        let linux = prepare(kept.as_bytes(), "a", false).unwrap().spec.linux().clone().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
        assert!(linux.resources().as_ref().unwrap().pids().is_some());
    }

    #[test]
    fn a_terminal_is_what_the_request_says() {
        let prepared = prepare(spec("").as_bytes(), "a", true).unwrap();
        assert_eq!(prepared.spec.process().as_ref().unwrap().terminal(), Some(true));
    }

    #[test]
    fn processes_outlive_init_without_a_pid_namespace() {
        let own = spec(r#""namespaces":[{"type":"pid"},{"type":"mount"}]"#);
        assert!(!prepare(own.as_bytes(), "a", false).unwrap().outlives_init);
        let joined = spec(r#""namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]"#);
        assert!(prepare(joined.as_bytes(), "a", false).unwrap().outlives_init);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(matches!(prepare(b"{", "a", false), Err(CallError::Invalid(_))));
        assert!(matches!(prepare(br#"{"ociVersion":"1.0.2"}"#, "a", false), Err(CallError::Invalid(_))));
        let user = spec(r#""namespaces":[{"type":"user"}]"#);
        assert!(matches!(prepare(user.as_bytes(), "a", false), Err(CallError::Unsupported(_))));
    }
}
