//! A container's cgroup. Unified hierarchy only.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use libcgroups::{
    common::{CgroupManager, ControllerOpt},
    v2::manager::{Manager, V2ManagerError},
};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use oci_spec::runtime::LinuxResources;
use tokio::time::timeout;

use super::readiness;
use crate::paths;

/// For killed processes to go, or processes to freeze.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A container's.
    pub fn of(container: &str) -> Self {
        Self(Path::new(paths::CGROUP).join(paths::cgroup(container).trim_start_matches('/')))
    }

    /// Makes it. libcontainer would too, and enable each controller of each level above with a write of its own.
    pub fn create(&self) -> io::Result<()> {
        fs::create_dir(&self.0)
    }

    /// Sets the limits that these resources name.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), V2ManagerError> {
        let name = self.0.file_name().unwrap_or_default();
        let manager = Manager::new(paths::CGROUP.into(), Path::new("/").join(name))?;
        let limits = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        manager.apply(&limits)
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// All its processes, those of cgroups below it included.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for directory in tree(&self.0)? {
            match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
                // It has just been removed, or is threaded: its processes are listed above it.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::EOPNOTSUPP)
                    ) => {}
                Err(e) => return Err(e),
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills all its processes, even such as are just being forked.
    pub fn kill(&self) -> io::Result<()> {
        absent_is_fine(fs::write(self.file("cgroup.kill"), "1"))
    }

    /// Sends a signal to all its processes, with none of them running meanwhile.
    pub async fn signal(&self, signal: i32) -> io::Result<()> {
        if signal == nix::libc::SIGKILL {
            return self.kill();
        }
        fs::write(self.file("cgroup.freeze"), "1")?;
        let sent = self.signal_frozen(signal).await;
        self.thaw()?;
        sent
    }

    async fn signal_frozen(&self, signal: i32) -> io::Result<()> {
        self.wait("frozen", "1").await?;
        for pid in self.pids()? {
            match vz_sys::fork::kill(nix::unistd::Pid::from_raw(pid), signal) {
                Err(e) if e.raw_os_error() == Some(nix::libc::ESRCH) => {}
                sent => sent?,
            }
        }
        Ok(())
    }

    /// Undoes a freeze, which a server that died may have left.
    pub fn thaw(&self) -> io::Result<()> {
        absent_is_fine(fs::write(self.file("cgroup.freeze"), "0"))
    }

    /// Kills what is left, and removes it with all cgroups below it.
    pub async fn remove(&self) -> io::Result<()> {
        if !self.0.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait("populated", "0").await?;
        for directory in tree(&self.0)?.iter().rev() {
            absent_is_fine(fs::remove_dir(directory))?;
        }
        Ok(())
    }

    /// Waits until a key of `cgroup.events` has a value.
    async fn wait(&self, key: &str, value: &str) -> io::Result<()> {
        let file = self.file("cgroup.events");
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        inotify.add_watch(&file, AddWatchFlags::IN_MODIFY)?;
        let changes = readiness::register(inotify.as_fd())?;
        let wait = async {
            loop {
                if has(&fs::read_to_string(&file)?, key, value) {
                    return Ok(());
                }
                let mut ready = changes.readable().await?;
                // Which change it was does not matter.
                if inotify.read_events().is_err() {
                    ready.clear_ready();
                }
            }
        };
        timeout(PATIENCE, wait).await.unwrap_or_else(|_| {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("cgroup does not become {key} {value}")))
        })
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.file("memory.events")).unwrap_or_default();
        events.lines().find_map(|l| l.strip_prefix("oom_kill ")).and_then(|n| n.parse().ok()).unwrap_or(0)
    }
}

fn has(events: &str, key: &str, value: &str) -> bool {
    events.lines().any(|l| l.split_once(' ') == Some((key, value)))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV)) => Ok(()),
        result => result,
    }
}

/// A directory and all below it, parents first.
fn tree(root: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![root.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next = next.saturating_add(1);
        let entries = match fs::read_dir(&directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && next > 1 => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_have_cgroups_below_the_root() {
        assert_eq!(Cgroup::of("a").file("x"), Path::new("/sys/fs/cgroup/vz.a/x"));
    }

    #[test]
    fn events_are_keys_and_values() {
        let events = "populated 1\nfrozen 0\n";
        assert!(has(events, "populated", "1") && has(events, "frozen", "0"));
        assert!(!has(events, "populated", "0") && !has(events, "froze", "0"));
    }

    #[test]
    fn trees_are_listed_parents_first() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let wanted = [dir.path().to_owned(), dir.path().join("a"), dir.path().join("a/b")];
        assert_eq!(tree(dir.path()).unwrap(), wanted);
    }
}
