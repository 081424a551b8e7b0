//! The sandbox's cgroup on the host: that of the spec, with the VM and the containers' anchors in it.
//!
//! The guest enforces a container's own limits. The host's are those of the whole VM: memory for its size and what
//! running it takes, so that a VM within its size is never killed for it; CPU as the spec says, since that is what its
//! user pays for. A pod's limits are those of its parent, which the kubelet sets and resizes. The quota comes last: a
//! boot would not end in time under a small one.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cgroups_rs::{
    CgroupPid,
    fs::{Cgroup as Group, CpuResources, MemoryResources, Resources, hierarchies},
    systemd::utils::expand_slice,
};
use containerd_shim_protos::{
    cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat},
    protobuf::MessageField,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use oci_spec::runtime::{LinuxCpu, Spec};
use vz_sys::process::Handle;

use super::journal::{self, Journal, Resource};

/// Controllers that are of use here; on a host with cgroup v1 each has a hierarchy of its own.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];
const MIB: u64 = 1 << 20;
/// Time between two tries where the kernel tells of no change.
const PAUSE: Duration = Duration::from_millis(5);

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec's path is none.
    #[error("cgroupsPath {0:?} is neither a path nor \"slice:prefix:name\"")]
    Path(String),
    /// It could not be made, or used.
    #[error("{action} cgroup {path}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It could not be written down.
    #[error(transparent)]
    Journal(#[from] journal::Error),
}

/// A sandbox's cgroup.
#[derive(Debug)]
pub struct Cgroup {
    group: Group,
    name: String,
    cpu: Option<LinuxCpu>,
    /// Whether it is a pod's: what that may use is its parent's to limit, which the kubelet resizes.
    pod: bool,
    /// Processes that the kernel had killed in it for want of memory before it was ours.
    killed_before: u64,
}

impl Cgroup {
    /// Makes that of a spec, in the journal first, for a VM of this size and what running it takes, in MiB. One that is
    /// there already is used and left there. `None` on a host without cgroups.
    pub fn make(
        journal: &Journal,
        spec: &Spec,
        id: &str,
        vm_mib: u64,
        overhead_mib: u64,
    ) -> Result<Option<Self>, Error> {
        let linux = spec.linux().as_ref();
        let path = linux.and_then(|linux| linux.cgroups_path().as_ref()).map(|path| path.to_string_lossy());
        let name = relative(&path.unwrap_or_default(), id)?;
        let found: Vec<String> = hierarchies::auto()
            .subsystems()
            .iter()
            .map(cgroups_rs::fs::Subsystem::controller_name)
            .filter(|name| CONTROLLERS.contains(&name.as_str()))
            .collect();
        if found.is_empty() {
            tracing::warn!("this host has no cgroup controllers: the vm's memory and cpu are not limited on it");
            return Ok(None);
        }
        let group = Group::load_with_specified_controllers(hierarchies::auto(), &name, found);
        let (cpu, _) = crate::spec::resources(spec);
        let mut this = Self { group, cpu, name, pod: crate::spec::is_pod(spec), killed_before: 0 };
        for path in this.paths() {
            if !path.exists() {
                journal.made(Resource::Cgroup { path })?;
            }
        }
        this.group.create().map_err(this.failed("make"))?;
        this.killed_before = this.killed();
        let limited = crate::spec::limits(spec).1.is_some() && !this.pod;
        let bytes = i64::try_from(vm_mib.saturating_add(overhead_mib).saturating_mul(MIB)).unwrap_or(i64::MAX);
        let memory = MemoryResources { memory_hard_limit: limited.then_some(bytes), ..Default::default() };
        let cpu = CpuResources { shares: this.cpu.as_ref().and_then(LinuxCpu::shares), ..Default::default() };
        this.apply(&Resources { memory, cpu, ..Default::default() })?;
        Ok(Some(this))
    }

    /// Moves a process there, and whatever it starts from then on.
    pub fn add(&self, pid: i32) -> Result<(), Error> {
        let pid = CgroupPid::from(u64::try_from(pid).unwrap_or(0));
        self.group.add_task_by_tgid(pid).map_err(self.failed("move a process to"))
    }

    /// Whether the kernel has killed a process in it for want of memory, the cgroup's or the host's.
    pub fn was_starved(&self) -> bool {
        self.killed() > self.killed_before
    }

    fn killed(&self) -> u64 {
        // cgroup v2, v1.
        let files = ["memory.events", "memory.oom_control"];
        let paths = self.paths();
        let texts =
            paths.iter().flat_map(|path| files.iter().filter_map(|file| fs::read_to_string(path.join(file)).ok()));
        texts.map(|text| killed(&text)).sum()
    }

    /// What is used in it, in the form of cgroup v2.
    pub fn metrics(&self) -> Metrics {
        let paths = self.paths();
        let read = |name: &str| paths.iter().find_map(|path| fs::read_to_string(path.join(name)).ok());
        let number = |names: &[&str]| names.iter().find_map(|name| read(name)?.trim().parse().ok());
        let usage_usec = read("cpu.stat")
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok()))
            .or_else(|| Some(read("cpuacct.usage")?.trim().parse::<u64>().ok()? / 1000));
        let cpu = CPUStat { usage_usec: usage_usec.unwrap_or(0), ..Default::default() };
        let memory = MemoryStat {
            usage: number(&["memory.current", "memory.usage_in_bytes"]).unwrap_or(0),
            usage_limit: number(&["memory.max", "memory.limit_in_bytes"]).unwrap_or(u64::MAX),
            ..Default::default()
        };
        let pids = PidsStat { current: number(&["pids.current"]).unwrap_or(0), ..Default::default() };
        Metrics {
            cpu: MessageField::some(cpu),
            memory: MessageField::some(memory),
            pids: MessageField::some(pids),
            ..Default::default()
        }
    }

    /// Applies the limit of CPU time.
    pub fn limit_cpu(&self) -> Result<(), Error> {
        let Some(cpu) = self.cpu.as_ref().filter(|_| !self.pod) else { return Ok(()) };
        let quota = cpu.quota().filter(|quota| *quota > 0);
        let cpu = CpuResources { period: cpu.period().filter(|period| *period > 0), quota, ..Default::default() };
        self.apply(&Resources { cpu, ..Default::default() })
    }

    /// Changes weight and limit of CPU time as an update of the sandbox's container does.
    pub fn change_cpu(&self, cpu: &LinuxCpu) -> Result<(), Error> {
        if self.pod {
            return Ok(());
        }
        let period = cpu.period().filter(|period| *period > 0);
        let cpu = CpuResources { shares: cpu.shares(), period, quota: cpu.quota(), ..Default::default() };
        self.apply(&Resources { cpu, ..Default::default() })
    }

    fn apply(&self, resources: &Resources) -> Result<(), Error> {
        self.group.apply(resources).map_err(self.failed("set limits of"))
    }

    fn failed<E: std::error::Error + Send + Sync + 'static>(&self, action: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::System { action, path: self.name.clone(), source: Box::new(source) }
    }

    /// Its directories: one, or one for each controller.
    fn paths(&self) -> Vec<PathBuf> {
        let mut paths: Vec<PathBuf> = Vec::new();
        for subsystem in self.group.subsystems() {
            let path = subsystem.to_controller().path().to_owned();
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        paths
    }
}

/// The number of processes that were killed, in what the kernel says of a cgroup's memory.
fn killed(text: &str) -> u64 {
    let number = |line: &str| line.strip_prefix("oom_kill ")?.trim().parse().ok();
    text.lines().find_map(number).unwrap_or(0)
}

/// A cgroup's path below the hierarchies' roots: `cgroupsPath`, or for an empty one the container's id.
///
/// systemd's form is where systemd would put it; it is made there without asking it, as the anchor is not its service.
fn relative(path: &str, id: &str) -> Result<String, Error> {
    let wrong = || Error::Path(path.to_owned());
    let relative = match path.split(':').collect::<Vec<_>>().as_slice() {
        [""] => id.to_owned(),
        [path] => path.trim_matches('/').to_owned(),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            let slice = expand_slice(slice).map_err(|_| wrong())?;
            let unit = match (*prefix, *name) {
                (_, name) if name.ends_with(".slice") => name.to_owned(),
                ("", name) => format!("{name}.scope"),
                (prefix, name) => format!("{prefix}-{name}.scope"),
            };
            Path::new(&slice).join(unit).to_string_lossy().into_owned()
        }
        _ => return Err(wrong()),
    };
    // The root is everybody's, and nothing leads out of it.
    let named = |part| matches!(part, std::path::Component::Normal(_));
    if relative.is_empty() || !Path::new(&relative).components().all(named) {
        return Err(wrong());
    }
    Ok(relative)
}

/// Removes a cgroup's directory, once the processes that are in it have been killed and have ended, which they must by
/// the deadline. One that is gone is no error. Cgroups below it are others', with all that is in them.
pub fn remove(path: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        match fs::remove_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
            other => return other,
        }
        let text = fs::read_to_string(path.join("cgroup.procs"))?;
        let pids: Vec<i32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        let below = fs::read_dir(path)?.flatten().find(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let busy = |why| Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
        if let (Some(below), []) = (&below, pids.as_slice()) {
            // Which ends when somebody else ends it.
            return busy(format!("there is a cgroup below it ({})", below.path().display()));
        }
        if Instant::now() >= deadline {
            return busy(format!("processes in it do not end: {pids:?}"));
        }
        // Takes along what is forked meanwhile. Kernels before 5.14 do not have it, nor does cgroup v1.
        let at_once = below.is_none() && !pids.is_empty() && fs::write(path.join("cgroup.kill"), "1").is_ok();
        let handles: Vec<_> =
            pids.into_iter().filter_map(|pid| Handle::open(pid).transpose()).collect::<Result<_, _>>()?;
        if !at_once {
            for handle in &handles {
                handle.kill(Signal::SIGKILL)?;
            }
        }
        await_change(path, &handles, deadline)?;
    }
}

/// Waits until a cgroup may have become empty, or until the deadline.
fn await_change(path: &Path, members: &[Handle], deadline: Instant) -> io::Result<()> {
    for member in members {
        if !member.ends(deadline)? {
            return Ok(());
        }
    }
    // A process leaves its cgroup a moment after it has ended for those who wait for it.
    let left = deadline.saturating_duration_since(Instant::now());
    let events = match File::open(path.join("cgroup.events")) {
        Ok(events) => events,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // cgroup v1 tells nobody.
            std::thread::sleep(left.min(PAUSE));
            return Ok(());
        }
        Err(e) => return Err(e),
    };
    // Read first: what changes from then on is told.
    if io::read_to_string(&events)?.lines().any(|line| line == "populated 0") {
        std::thread::sleep(left.min(PAUSE));
        return Ok(());
    }
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_both_forms_have_their_place() {
        let place = |path| relative(path, "c1").unwrap();
        assert_eq!(place("/default/c1"), "default/c1");
        assert_eq!(place("kubepods/pod1/c1"), "kubepods/pod1/c1");
        assert_eq!(place(""), "c1");
        assert_eq!(place("system.slice:nerdctl:c1"), "system.slice/nerdctl-c1.scope");
        assert_eq!(place(":cri-containerd:c1"), "system.slice/cri-containerd-c1.scope");
        assert_eq!(place("a-b.slice:x:c1"), "a.slice/a-b.slice/x-c1.scope");
        assert_eq!(place("a.slice::b.slice"), "a.slice/b.slice");
        for wrong in ["/", "/../x", "a/../../b", "a:b", "a:b:c:d", "a/b.slice:x:y", "x:y:z"] {
            assert!(matches!(relative(wrong, "c1"), Err(Error::Path(_))), "{wrong}");
        }
    }

    #[test]
    fn a_cgroup_is_made_limited_and_taken_away_with_what_is_in_it() {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        let name = format!("/vz-test-{}/c1", std::process::id());
        let resources =
            json!({ "memory": { "limit": 64 << 20 }, "cpu": { "shares": 512, "quota": 50_000, "period": 100_000 } });
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": { "path": "rootfs" },
            "linux": { "cgroupsPath": name, "resources": resources },
        }))
        .unwrap();
        let Some(cgroup) = Cgroup::make(&journal, &spec, "c1", 192, 100).unwrap() else {
            vz_tally::skip!("no cgroup controllers");
            return;
        };
        let paths = cgroup.paths();
        assert!(!paths.is_empty() && paths.iter().all(|path| path.exists()));
        let value = |names: [&str; 2]| {
            let find = |name: &str| paths.iter().find_map(|path| fs::read_to_string(path.join(name)).ok());
            names.into_iter().find_map(find).unwrap().trim().to_owned()
        };
        assert_eq!(value(["memory.max", "memory.limit_in_bytes"]), (292 * MIB).to_string());
        assert!(["512", "20"].contains(&value(["cpu.shares", "cpu.weight"]).as_str()));
        assert!(["-1", "max 100000"].contains(&value(["cpu.max", "cpu.cfs_quota_us"]).as_str()));
        cgroup.limit_cpu().unwrap();
        assert!(["50000", "50000 100000"].contains(&value(["cpu.max", "cpu.cfs_quota_us"]).as_str()));
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        cgroup.add(i32::try_from(child.id()).unwrap()).unwrap();
        // Reaped by its parent as soon as it ends, as the daemon's processes are.
        let reaper = std::thread::spawn(move || child.wait().unwrap());
        super::super::unwind::unwind(&dir, |_, _| ()).unwrap();
        assert!(!reaper.join().unwrap().success());
        assert!(paths.iter().all(|path| !path.exists()));
        for path in paths {
            remove(path.parent().unwrap(), Instant::now()).unwrap();
        }
    }

    #[test]
    fn kills_are_counted_in_either_form() {
        assert_eq!(killed("low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\noom_group_kill 1\n"), 3);
        assert_eq!(killed("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"), 4);
        assert_eq!(killed("oom_kill_disable 1\n"), 0);
    }

    /// Each hierarchy that a cgroup can be made in here, with a new one in it.
    fn made(name: &str) -> Vec<PathBuf> {
        let roots = ["", "memory", "unified"].map(|root| Path::new("/sys/fs/cgroup").join(root));
        let roots = roots.into_iter().filter(|root| root.join("cgroup.procs").exists());
        roots
            .map(|root| root.join(format!("vz-test-{name}-{}", std::process::id())))
            .filter(|path| fs::create_dir(path).is_ok())
            .collect()
    }

    #[test]
    fn a_cgroup_is_removed_while_its_processes_end() {
        let paths = made("ends");
        if paths.is_empty() {
            vz_tally::skip!("no cgroup can be made");
            return;
        }
        for path in paths {
            // Processes that start others all the time.
            let mut child =
                std::process::Command::new("sh").args(["-c", "while :; do sleep 0.01 & done"]).spawn().unwrap();
            fs::write(path.join("cgroup.procs"), child.id().to_string()).unwrap();
            let reaper = std::thread::spawn(move || child.wait().unwrap());
            remove(&path, Instant::now() + Duration::from_secs(10)).unwrap();
            assert!(!path.exists());
            assert!(!reaper.join().unwrap().success());
            remove(&path, Instant::now()).unwrap();
        }
    }

    #[test]
    fn others_cgroups_below_are_left_and_named() {
        let paths = made("below");
        if paths.is_empty() {
            vz_tally::skip!("no cgroup can be made");
            return;
        }
        for path in paths {
            let below = path.join("others");
            fs::create_dir(&below).unwrap();
            let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            fs::write(below.join("cgroup.procs"), child.id().to_string()).unwrap();
            let said = remove(&path, Instant::now() + Duration::from_secs(60)).unwrap_err().to_string();
            assert!(said.contains("/others"), "{said}");
            assert!(child.try_wait().unwrap().is_none());
            child.kill().unwrap();
            child.wait().unwrap();
            remove(&below, Instant::now() + Duration::from_secs(10)).unwrap();
            remove(&path, Instant::now() + Duration::from_secs(10)).unwrap();
        }
    }
}
