//! Facts about the host: kernel, cgroups, devices, QEMU.

use std::{env, fs, path::Path, process::Command};

use nix::unistd::geteuid;
use vz_config::Config;

use super::{Check, Status, chain};

pub(super) fn user() -> Check {
    if geteuid().is_root() {
        return Check::new("user", Status::Ok, "root");
    }
    let found = format!("uid {}", geteuid());
    Check::new("user", Status::Info, found).advise("run as root to see what only root can: containers are run by root")
}

pub(super) fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Check::new("kernel", Status::Info, format!("{} {}", release.trim(), env::consts::ARCH))
}

/// QEMU, which is `needed` where it is the chosen machine.
pub(super) fn qemu(config: &Config, needed: bool) -> Check {
    let lacking = if needed { Status::Failed } else { Status::Info };
    let program = match vz_qemu::find(&config.qemu.path, env::var_os("PATH").as_deref()) {
        Ok(program) => program,
        Err(e) => return Check::new("qemu", lacking, chain(&e)),
    };
    match version_of(&program) {
        Ok(version) => Check::new("qemu", Status::Ok, format!("{version}, {}", program.display())),
        Err(e) => Check::new("qemu", lacking, format!("{} --version: {e}", program.display())),
    }
}

/// First line of what `program --version` says.
pub(super) fn version_of(program: &Path) -> Result<String, String> {
    let output = Command::new(program).arg("--version").output().map_err(|e| e.to_string())?;
    let line = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().trim().to_owned();
    if output.status.success() { Ok(line(&output.stdout)) } else { Err(line(&output.stderr)) }
}

pub(super) fn cgroup() -> Check {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let (status, found) = match cgroup_layout(&mounts) {
        Layout { v2: Some(at), v1: 0 } => (Status::Ok, format!("v2, at {at}")),
        Layout { v2: Some(at), v1 } => {
            (Status::Ok, format!("hybrid: {v1} hierarchies of v1, and v2 at {at} for what is not in these"))
        }
        Layout { v2: None, v1: 0 } => {
            (Status::Warning, "none is mounted: containers' limits hold in their VM only".into())
        }
        Layout { v2: None, v1 } => (Status::Ok, format!("v1, {v1} hierarchies")),
    };
    Check::new("cgroups", status, found)
}

#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Where v2 is mounted.
    v2: Option<String>,
    /// Hierarchies of v1.
    v1: usize,
}

/// From proc_pid_mountinfo(5): the mount point is the fifth field, the type is the first one after a lone dash.
fn cgroup_layout(mountinfo: &str) -> Layout {
    let mut layout = Layout { v2: None, v1: 0 };
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let at = fields.nth(4).unwrap_or_default();
        match fields.skip_while(|field| *field != "-").nth(1) {
            Some("cgroup2") if layout.v2.is_none() => layout.v2 = Some(at.to_owned()),
            Some("cgroup") => layout.v1 += 1,
            _ => {}
        }
    }
    layout
}

pub(super) fn overlayfs() -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        return Check::new("overlayfs", Status::Ok, "known to the kernel");
    }
    Check::new("overlayfs", Status::Warning, "not known to the kernel")
        .advise("modprobe overlay, or choose another snapshotter in containerd")
}

pub(super) fn tun() -> Check {
    if Path::new("/dev/net/tun").exists() {
        return Check::new("tun", Status::Ok, "/dev/net/tun");
    }
    Check::new("tun", Status::Warning, "there is no /dev/net/tun, which networks of containers need")
        .advise("modprobe tun")
}

/// The kernel's own backends. vz has its own, in the process that is confined.
pub(super) fn vhost() -> Check {
    let found: Vec<&str> =
        ["vhost-net", "vhost-vsock"].into_iter().filter(|name| Path::new("/dev").join(name).exists()).collect();
    let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
    Check::new("vhost", Status::Info, format!("{found}; not used"))
}

pub(super) fn user_namespaces() -> Check {
    let read = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let most = read("/proc/sys/user/max_user_namespaces");
    let unprivileged = read("/proc/sys/kernel/unprivileged_userns_clone");
    let found = match (most, unprivileged) {
        (None, _) => "not known to the kernel".to_owned(),
        (Some(0), _) => "forbidden (user.max_user_namespaces is 0)".to_owned(),
        (Some(most), Some(0)) => format!("root's only, {most} at most"),
        (Some(most), _) => format!("{most} at most"),
    };
    Check::new("user namespaces", Status::Info, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_told_by_their_mounts() {
        let v2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup_layout(v2), Layout { v2: Some("/sys/fs/cgroup".into()), v1: 0 });
        let hybrid = "30 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      31 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      32 23 0:29 / /sys/fs/cgroup/cpu rw shared:9 master:1 - cgroup cgroup rw,cpu\n";
        assert_eq!(cgroup_layout(hybrid), Layout { v2: Some("/sys/fs/cgroup/unified".into()), v1: 2 });
        assert_eq!(cgroup_layout("22 1 0:21 / /proc rw - proc proc rw\n\nnonsense"), Layout { v2: None, v1: 0 });
    }

    #[test]
    fn a_programs_version_is_its_first_line() {
        let version = version_of(Path::new("/bin/bash")).unwrap();
        assert!(version.starts_with("GNU bash, version "), "{version}");
        assert!(version_of(Path::new("/nowhere")).unwrap_err().contains("No such file"));
    }
}
