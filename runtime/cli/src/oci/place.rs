//! Where a keeper is on the host: in the cgroups of its container's anchor, in its network namespace, and in its mount
//! namespace, whose root is the container's. There the keeper mounts the container's volumes, for those who come
//! through its pid to copy files.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    mount::MsFlags,
    sched::{CloneFlags, setns},
};
use vz_sys::mount as sys;

use super::{error::Error, spec::Mount};

/// File systems of the kernel: the guest has its own.
const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];

/// A volume, not yet mounted.
#[derive(Debug)]
pub struct Volume {
    tree: OwnedFd,
    destination: PathBuf,
}

/// Takes hold of the volumes that a bundle's mounts name, in the caller's mount namespace.
pub fn volumes(mounts: &[Mount]) -> Result<Vec<Volume>, Error> {
    let mut volumes = Vec::new();
    for mount in mounts {
        let options = mount.options.iter().flatten().map(String::as_str);
        let bind = sys::is_bind(mount.kind.as_deref(), options);
        let Some(source) = mount.source.as_ref().filter(|_| bind) else { continue };
        if KERNELS.iter().any(|kernel| source.starts_with(kernel)) {
            continue;
        }
        let hold = || -> io::Result<OwnedFd> {
            let tree = sys::clone_tree(&fs::canonicalize(source)?, mount.has("rbind"))?;
            sys::set_propagation(tree.as_fd(), MsFlags::MS_SLAVE.bits(), true)?;
            if mount.has("ro") || mount.has("rro") {
                sys::set_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
            }
            Ok(tree)
        };
        let tree = hold().map_err(Error::at("look up volume", source))?;
        volumes.push(Volume { tree, destination: mount.destination.clone() });
    }
    Ok(volumes)
}

/// Moves this process, which has one thread, to where the anchor is, and mounts the volumes there.
///
/// From here on no path means what it meant.
pub fn join(anchor: u32, volumes: &[Volume]) -> Result<(), Error> {
    let open = |kind: &str| {
        let path = format!("/proc/{anchor}/ns/{kind}");
        File::open(&path).map_err(Error::at("open", path))
    };
    let (net, mnt) = (open("net")?, open("mnt")?);
    join_cgroups(anchor).map_err(Error::step("join the container's cgroup"))?;
    setns(net, CloneFlags::CLONE_NEWNET).map_err(Error::step("enter the container's network namespace"))?;
    setns(mnt, CloneFlags::CLONE_NEWNS).map_err(Error::step("enter the container's mount namespace"))?;
    for Volume { tree, destination } in volumes {
        // The guest has made the place by now, where that is not on a file system of the guest's own.
        match sys::attach(tree.as_fd(), &Path::new("/").join(destination)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(Error::at("mount volume at", destination))?,
        }
    }
    Ok(())
}

/// A line of /proc/PID/cgroup: controllers (none for cgroup v2), and the path.
fn groups(text: &str) -> Vec<(Vec<&str>, &str)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?.split(',').filter(|name| !name.is_empty()).collect();
            Some((controllers, fields.next()?))
        })
        .collect()
}

/// Where a hierarchy is mounted, by /proc/self/mountinfo (proc(5)): its mount point and which part of it that shows.
fn mounted<'m>(mounts: &'m str, controllers: &[&str]) -> Option<(&'m str, &'m str)> {
    mounts.lines().find_map(|line| {
        let (first, last) = line.split_once(" - ")?;
        let mut fields = first.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let mut fields = last.split(' ');
        let (kind, options) = (fields.next()?, fields.nth(1)?);
        let fits = match controllers {
            [] => kind == "cgroup2",
            [first, ..] => kind == "cgroup" && options.split(',').any(|option| option == *first),
        };
        fits.then_some((point, root))
    })
}

/// Moves this process to wherever `pid` is and it is not.
fn join_cgroups(pid: u32) -> io::Result<()> {
    let theirs = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let ours = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let ours = groups(&ours);
    for group in groups(&theirs) {
        if ours.contains(&group) {
            continue;
        }
        let (controllers, path) = group;
        let Some((point, root)) = mounted(&mounts, &controllers) else { continue };
        let below = if root == "/" { path } else { path.strip_prefix(root).unwrap_or(path) };
        let procs = PathBuf::from(point).join(below.trim_start_matches('/')).join("cgroup.procs");
        fs::write(&procs, std::process::id().to_string())
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", procs.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_generations_of_cgroups_are_found() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                      32 23 0:28 /part /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let text = "5:cpu,cpuacct:/a\n4:memory:/b:c\n3:name=systemd:/\n0::/part/d\n";
        let found = groups(text);
        assert_eq!(found[1], (vec!["memory"], "/b:c"));
        assert_eq!(mounted(mounts, &found[0].0), Some(("/sys/fs/cgroup/cpu,cpuacct", "/")));
        assert_eq!(mounted(mounts, &found[1].0), Some(("/sys/fs/cgroup/memory", "/")));
        assert_eq!(mounted(mounts, &found[2].0), None);
        assert_eq!(mounted(mounts, &found[3].0), Some(("/sys/fs/cgroup/unified", "/part")));
    }
}
