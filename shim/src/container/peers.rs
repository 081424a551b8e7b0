//! The other containers of a sandbox, as a spec names them: by the namespaces of their tasks' pids on the host.
//!
//! A pod's containers join the network, IPC, UTS and PID namespaces of the pause container, and an ephemeral one the
//! PID namespace of another container. The host's namespaces mean nothing to the guest: the guest joins those of the
//! container whose pid it is.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::LinuxNamespaceType;
use vz_proto::NAMESPACES_PATH;

/// Containers of the sandbox by the pid of each on the host.
#[derive(Debug, Default, Clone)]
pub struct Peers(HashMap<u32, String>);

impl FromIterator<(u32, String)> for Peers {
    fn from_iter<I: IntoIterator<Item = (u32, String)>>(containers: I) -> Self {
        Self(containers.into_iter().collect())
    }
}

impl Peers {
    /// The container whose namespace of this kind is at `path`.
    pub fn owner(&self, kind: LinuxNamespaceType, path: &Path) -> Option<&str> {
        let mut parts = path.components();
        let [root, proc, pid, ns, name] = std::array::from_fn(|_| parts.next());
        let named = |part: Option<Component<'_>>, name: &str| part == Some(Component::Normal(name.as_ref()));
        let whole = root == Some(Component::RootDir)
            && named(proc, "proc")
            && named(ns, "ns")
            && named(name, file(kind)?)
            && parts.next().is_none();
        let pid: u32 = pid.filter(|_| whole)?.as_os_str().to_str()?.parse().ok()?;
        self.0.get(&pid).map(String::as_str)
    }
}

/// A namespace's name below /proc/PID/ns, for those that containers of a VM may share.
fn file(kind: LinuxNamespaceType) -> Option<&'static str> {
    match kind {
        LinuxNamespaceType::Ipc => Some("ipc"),
        LinuxNamespaceType::Uts => Some("uts"),
        LinuxNamespaceType::Pid => Some("pid"),
        LinuxNamespaceType::Network => Some("net"),
        _ => None,
    }
}

/// How the guest is told to join a namespace of `owner`.
pub fn guest_path(owner: &str, kind: LinuxNamespaceType) -> Option<PathBuf> {
    Some(Path::new(NAMESPACES_PATH).join(owner).join(file(kind)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_known_by_its_tasks_pid() {
        let peers: Peers = [(41, "pause".to_owned())].into_iter().collect();
        let owner = |kind, path: &str| peers.owner(kind, Path::new(path)).map(str::to_owned);
        assert_eq!(owner(LinuxNamespaceType::Ipc, "/proc/41/ns/ipc").as_deref(), Some("pause"));
        assert_eq!(owner(LinuxNamespaceType::Pid, "/proc/41/ns/pid").as_deref(), Some("pause"));
        for path in ["/proc/42/ns/ipc", "/proc/41/ns/uts", "/proc/41/ns/ipc/x", "/x/41/ns/ipc", "/proc/../41/ns", ""] {
            assert_eq!(owner(LinuxNamespaceType::Ipc, path), None, "{path}");
        }
        assert_eq!(owner(LinuxNamespaceType::Mount, "/proc/41/ns/mnt"), None);
    }
}
