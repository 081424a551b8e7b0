//! Where a keeper is on the host: in the cgroups of its container's anchor.

use std::{fs, io, path::PathBuf};

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
pub fn join_cgroups(pid: u32) -> io::Result<()> {
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
