//! Where things are in the guest.

use std::path::PathBuf;

/// What the agent keeps of its own.
pub const RUN: &str = "/run/vz";
/// Root of libcontainer's state: a directory for each container.
pub const LIBCONTAINER: &str = "/run/vz/libcontainer";
/// Where cgroup2 is mounted.
pub const CGROUP: &str = "/sys/fs/cgroup";

/// A container's bundle: `config.json` and what belongs to its execs.
pub fn bundle(container: &str) -> PathBuf {
    [RUN, "containers", container].iter().collect()
}

/// What belongs to one exec.
pub fn exec(container: &str, exec: &str) -> PathBuf {
    bundle(container).join("exec").join(exec)
}

/// A container's cgroup, as a path in the hierarchy. One level below the root, whose controllers are enabled at boot.
pub fn cgroup(container: &str) -> String {
    format!("/vz.{container}")
}

/// libcontainer's state of a container.
pub fn state(container: &str) -> PathBuf {
    [LIBCONTAINER, container].iter().collect()
}
