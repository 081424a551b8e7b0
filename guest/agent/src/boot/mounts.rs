//! What is mounted where.

use std::{fs, io, os::unix::fs::symlink};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    unistd::{chdir, chroot},
};

use super::Error;
use crate::paths;

const NOTHING: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

struct Mount {
    what: &'static str,
    fs: &'static str,
    at: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

impl Mount {
    fn mount(&self) -> Result<(), Error> {
        mount(Some(self.what), self.at, Some(self.fs), self.flags, self.data).map_err(|source| Error::Mount {
            what: self.what,
            at: self.at,
            source,
        })
    }
}

/// Makes the VM's root: the initramfs, read-only, below a tmpfs that takes what is written.
///
/// An initramfs can be neither unmounted nor pivoted away from, and a container's root is entered by pivot_root: so the
/// new root is moved over it.
pub(super) fn switch_root() -> Result<(), Error> {
    let staging = Mount { what: "tmpfs", fs: "tmpfs", at: "/run", flags: MsFlags::empty(), data: Some("mode=0755") };
    staging.mount()?;
    for directory in ["/run/upper", "/run/work", "/run/root"] {
        create(directory)?;
    }
    Mount {
        what: "overlay",
        fs: "overlay",
        at: "/run/root",
        flags: MsFlags::empty(),
        // Nothing outlives the VM, so nothing need be synchronised.
        data: Some("lowerdir=/,upperdir=/run/upper,workdir=/run/work,volatile"),
    }
    .mount()?;
    chdir("/run/root").map_err(Error::SwitchRoot)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(Error::SwitchRoot)?;
    chroot(".").map_err(Error::SwitchRoot)?;
    chdir("/").map_err(Error::SwitchRoot)
}

/// What the agent needs from its first line on.
pub(super) fn early() -> Result<(), Error> {
    for m in [
        Mount { what: "proc", fs: "proc", at: "/proc", flags: NOTHING, data: None },
        Mount { what: "devtmpfs", fs: "devtmpfs", at: "/dev", flags: MsFlags::MS_NOSUID, data: Some("mode=0755") },
        Mount {
            what: "tmpfs",
            fs: "tmpfs",
            at: "/run",
            flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
            data: Some("mode=0755"),
        },
    ] {
        m.mount()?;
    }
    create(paths::RUN)?;
    create("/run/vz/containers")?;
    create(paths::LIBCONTAINER)
}

/// What containers need.
pub(super) fn late() -> Result<(), Error> {
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        create(directory)?;
    }
    for m in [
        Mount { what: "sysfs", fs: "sysfs", at: "/sys", flags: NOTHING, data: None },
        Mount { what: "cgroup2", fs: "cgroup2", at: paths::CGROUP, flags: NOTHING, data: Some("nsdelegate") },
        Mount {
            what: "devpts",
            fs: "devpts",
            at: "/dev/pts",
            flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
            data: Some("gid=5,mode=0620,ptmxmode=0666"),
        },
        Mount {
            what: "tmpfs",
            fs: "tmpfs",
            at: "/dev/shm",
            flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
            data: Some("mode=1777"),
        },
        Mount { what: "mqueue", fs: "mqueue", at: "/dev/mqueue", flags: NOTHING, data: None },
    ] {
        m.mount()?;
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).map_err(|e| Error::Create(link, e))?;
    }
    enable_controllers()
}

/// Lets children of the root cgroup use every controller.
fn enable_controllers() -> Result<(), Error> {
    const AVAILABLE: &str = "/sys/fs/cgroup/cgroup.controllers";
    const ENABLED: &str = "/sys/fs/cgroup/cgroup.subtree_control";
    let available = fs::read_to_string(AVAILABLE).map_err(|e| Error::Read(AVAILABLE, e))?;
    let enable: Vec<String> = available.split_ascii_whitespace().map(|c| format!("+{c}")).collect();
    fs::write(ENABLED, enable.join(" ")).map_err(|e| Error::Write(ENABLED, e))
}

/// Mounts what the host shares, and lets mounts below it and elsewhere propagate to containers that ask for that.
pub(super) fn share() -> Result<(), Error> {
    create(vz_proto::SHARE_PATH)?;
    Mount { what: vz_proto::SHARE_TAG, fs: "virtiofs", at: vz_proto::SHARE_PATH, flags: MsFlags::empty(), data: None }
        .mount()?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .map_err(|source: Errno| Error::Mount { what: "shared propagation", at: "/", source })
}

fn create(directory: &'static str) -> Result<(), Error> {
    match fs::create_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(Error::Create(directory, e)),
        _ => Ok(()),
    }
}
