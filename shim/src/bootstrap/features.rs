//! What `-info` says that this runtime can: the OCI runtime spec's features. Each is one that a test uses.

use oci_spec::runtime::{Cgroup, Features, LinuxFeature, LinuxNamespaceType, Seccomp};

/// How containerd names the type.
pub const TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// Versions of the OCI runtime spec, lowest and highest.
const OCI: [&str; 2] = ["1.0.0", "1.2.1"];
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
/// CRI reads `rro` of these: recursive read-only mounts.
const MOUNT_OPTIONS: [&str; 28] = [
    "async",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "ro",
    "rprivate",
    "rro",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "tmpcopyup",
    "unbindable",
];
/// Without `user`: CRI would place pods with `hostUsers: false` here.
const NAMESPACES: [LinuxNamespaceType; 6] = [
    LinuxNamespaceType::Cgroup,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Mount,
    LinuxNamespaceType::Network,
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Uts,
];

/// The features.
pub fn features() -> Features {
    let strings = |all: &[&str]| Some(all.iter().map(|one| (*one).to_owned()).collect());
    let mut cgroup = Cgroup::default();
    cgroup.set_v1(Some(true)).set_v2(Some(true)).set_systemd(Some(true)).set_systemd_user(Some(false));
    let mut seccomp = Seccomp::default();
    seccomp.set_enabled(Some(true));
    let mut linux = LinuxFeature::default();
    linux.set_namespaces(Some(NAMESPACES.to_vec())).set_cgroup(Some(cgroup)).set_seccomp(Some(seccomp));
    let mut features = Features::default();
    let [min, max] = OCI.map(str::to_owned);
    features.set_oci_version_min(min).set_oci_version_max(max);
    features.set_hooks(strings(&HOOKS)).set_mount_options(strings(&MOUNT_OPTIONS)).set_linux(Some(linux));
    features
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cri_finds_recursive_read_only_mounts_and_no_user_namespaces() {
        let features = serde_json::to_value(features()).unwrap();
        assert!(features["mountOptions"].as_array().unwrap().contains(&"rro".into()));
        assert!(!features["linux"]["namespaces"].as_array().unwrap().contains(&"user".into()));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], serde_json::Value::Null);
        assert_eq!(features["ociVersionMin"], "1.0.0");
    }
}
