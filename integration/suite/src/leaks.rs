//! What a runtime can leave behind on a host: looked at before and after every test, and compared.
//!
//! Others may use the host at the same time. Whose a process is can be told (see [`host::adopt_orphans`]), and so can
//! whose most other things are; what cannot be told counts.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt, fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

use crate::{
    Lab,
    command::Program,
    host::{self, Processes},
    lab::PREFIX,
    poll::try_until,
};

/// How long what ends by itself after its container's removal may take.
const SETTLE: Duration = Duration::from_secs(20);
/// How long it takes when all is well.
const SLOW: Duration = Duration::from_secs(2);
/// Where each devbox that is up has a file.
const CLAIMS: &str = "/run/vz-devbox";

/// Something on the host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// What it is.
    pub kind: &'static str,
    /// Which one.
    pub name: String,
    /// The process to be killed where it is one.
    pub pid: Option<i32>,
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Everything of interest on the host at a moment.
#[derive(Debug)]
pub struct Snapshot(BTreeSet<Item>);

impl Snapshot {
    /// Looks at everything.
    pub fn take(lab: &Lab) -> Self {
        let mut look = Look::new(lab.devbox());
        look.processes();
        look.mounts();
        look.net_namespaces();
        look.links();
        look.firewall();
        look.addresses();
        look.cgroups();
        look.loop_devices();
        look.files();
        look.containerd(lab);
        Self(look.items)
    }

    /// What is there now and was not then, once all that ends by itself has ended, and how the host looks now. Says so
    /// when that takes long.
    pub fn settle(&self, lab: &Lab) -> (Vec<Item>, Self) {
        let mut now = self.settle_within(lab, SLOW);
        if !now.0.is_empty() {
            let begun = Instant::now();
            let slow: Vec<_> = now.0.iter().map(ToString::to_string).collect();
            now = self.settle_within(lab, SETTLE);
            println!("  still there {:.1} s after the test: {}", begun.elapsed().as_secs_f64(), slow.join(", "));
        }
        now
    }

    /// The same, with another deadline.
    pub fn settle_within(&self, lab: &Lab, deadline: Duration) -> (Vec<Item>, Self) {
        let mut last = None;
        let settled = try_until(deadline, || {
            let now = Self::take(lab);
            let left = now.beyond(self);
            if left.is_empty() {
                return Some((left, now));
            }
            last = Some((left, now));
            None
        });
        settled.or(last).expect("it was looked at once at least")
    }

    /// What is there now and was not then.
    pub fn new_since(&self, lab: &Lab) -> Vec<Item> {
        Self::take(lab).beyond(self)
    }

    /// Everything that is there.
    pub fn iter(&self) -> impl Iterator<Item = &Item> {
        self.0.iter()
    }

    fn beyond(&self, before: &Self) -> Vec<Item> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// Kills the processes among leaked things, so that they do not burden the tests to come.
pub fn kill(items: &[Item]) {
    for pid in items.iter().filter_map(|item| Pid::from_raw(item.pid?)) {
        // It may have ended since.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// A look at the host.
struct Look {
    devbox: PathBuf,
    /// Directories of the other devboxes.
    others: Vec<String>,
    all: Processes,
    items: BTreeSet<Item>,
}

impl Look {
    fn new(devbox: &Path) -> Self {
        let ours = devbox.display().to_string();
        let others = names(Path::new(CLAIMS))
            .iter()
            .filter_map(|name| fs::read_to_string(Path::new(CLAIMS).join(name)).ok())
            .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("dir=").map(str::to_owned)))
            .filter(|dir| *dir != ours)
            .collect();
        Self { devbox: devbox.to_owned(), others, all: Processes::now(), items: BTreeSet::new() }
    }

    fn add(&mut self, kind: &'static str, name: impl fmt::Display) {
        self.items.insert(Item { kind, name: name.to_string(), pid: None });
    }

    fn is_ours(&self, pid: i32) -> bool {
        self.all.descends(pid, host::own_pid())
    }

    fn processes(&mut self) {
        let daemons: Vec<i32> = ["containerd", "registry"]
            .iter()
            .filter_map(|name| {
                fs::read_to_string(self.devbox.join(format!("run/{name}.pid"))).ok()?.trim().parse().ok()
            })
            .collect();
        let telling =
            |name: &str| ["containerd-shim", "qemu-system", "vz-", "vmm"].iter().any(|start| name.starts_with(start));
        let mut found = BTreeSet::new();
        for process in self.all.iter().filter(|process| self.is_ours(process.pid)) {
            // What a daemon of the devbox has started.
            let marked = process.devbox.as_deref().is_some_and(|dir| Path::new(dir) == self.devbox);
            let logger = process.args.iter().any(|arg| arg.contains("_NERDCTL_INTERNAL_LOGGING"));
            let wanted = marked || logger || telling(&process.name) || process.is("containerd-shim-vz-v2");
            if wanted && !daemons.contains(&process.pid) {
                found.insert(Item { kind: "process", name: process.to_string(), pid: Some(process.pid) });
            }
        }
        self.items.extend(found);
    }

    fn mounts(&mut self) {
        let text = fs::read_to_string("/proc/self/mountinfo").expect("read mountinfo");
        for line in text.lines() {
            let mut fields = line.split(' ').skip(3);
            let (root, target) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let (kind, source) = line.split_once(" - ").and_then(|(_, rest)| rest.split_once(' ')).unwrap_or_default();
            let other = self.others.iter().any(|dir| below(target, dir) || below(root, dir));
            // The first named network namespace of a host makes the directory of their names a mount, for good.
            if !other && target != "/run/netns" {
                let source = source.split(' ').next().unwrap_or_default();
                self.add("mount", format_args!("{target} ({kind} {source} {root})"));
            }
        }
    }

    fn net_namespaces(&mut self) {
        for name in names(Path::new("/run/netns")) {
            self.add("network namespace", format_args!("/run/netns/{name}"));
        }
        let mut found: BTreeMap<u64, String> = BTreeMap::new();
        for process in self.all.iter().filter(|process| self.is_ours(process.pid)) {
            let link = fs::read_link(format!("/proc/{}/ns/net", process.pid));
            let inode =
                link.ok().and_then(|link| link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok());
            if let Some(inode) = inode {
                found.entry(inode).or_insert_with(|| process.to_string());
            }
        }
        // Named by number only: which process is found in it first is a matter of chance.
        for inode in found.keys() {
            self.add("network namespace", format_args!("net:[{inode}]"));
        }
    }

    fn links(&mut self) {
        let ours = self.bridges(&self.devbox.display().to_string());
        let others: Vec<_> = self.others.iter().flat_map(|dir| self.bridges(dir)).collect();
        for name in names(Path::new("/sys/class/net")) {
            let master = fs::read_link(format!("/sys/class/net/{name}/master"))
                .ok()
                .and_then(|link| Some(link.file_name()?.to_str()?.to_owned()))
                .unwrap_or_default();
            // The devbox keeps its own bridges.
            if !ours.contains(&name) && !others.contains(&name) && !others.contains(&master) {
                self.add("network link", name);
            }
        }
    }

    /// Rules about addresses of the devbox's range: a container's ports, its way out.
    fn firewall(&mut self) {
        let Some(range) = self.range() else { return };
        // Not those of IPv6: nerdctl leaves them behind, whatever the runtime. A host without the program has no rules.
        let Ok(output) = Command::new("iptables-save").output() else { return };
        for rule in String::from_utf8_lossy(&output.stdout).lines() {
            if rule.starts_with("-A ") && rule.contains(&format!(" {range}.")) {
                self.add("firewall rule", rule);
            }
        }
    }

    /// Addresses that CNI has given out, and what it remembers of each container.
    fn addresses(&mut self) {
        for path in at_depth(&self.devbox.join("data/ipam"), 2) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name != "lock" && !name.starts_with("last_reserved_ip") {
                self.add("address given out", path.display());
            }
        }
        let Some(range) = self.range() else { return };
        for name in names(Path::new("/var/lib/cni/results")) {
            let path = Path::new("/var/lib/cni/results").join(name);
            if fs::read_to_string(&path).is_ok_and(|text| text.contains(&format!("\"{range}."))) {
                self.add("result of CNI", path.display());
            }
        }
    }

    /// The first two numbers of the addresses of the devbox's networks.
    fn range(&self) -> Option<String> {
        let identity = fs::read_to_string(self.devbox.join("identity")).ok()?;
        identity.lines().find_map(|line| line.strip_prefix("net=")).map(str::to_owned)
    }

    /// The names that a devbox gives its bridges.
    fn bridges(&self, dir: &str) -> [String; 2] {
        let digest = Sha256::digest(dir.as_bytes());
        let id: String = digest.iter().take(3).map(|byte| format!("{byte:02x}")).collect();
        [format!("vzn{id}"), format!("vzp{id}")]
    }

    fn cgroups(&mut self) {
        let mut found = Vec::new();
        tree(Path::new("/sys/fs/cgroup"), 12, &mut |path, kind| {
            if kind.is_dir() {
                found.push(path.to_owned());
            }
        });
        for path in found {
            // containerd's clients put containers below a cgroup of their namespace's name, and leave that; podman
            // likewise.
            let kept = ["default", "k8s.io", "libpod_parent", "conmon"];
            let keeps = path.file_name().is_some_and(|name| kept.iter().any(|kept| name == *kept));
            let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            let pids: Vec<i32> = procs.lines().filter_map(|line| line.parse().ok()).collect();
            let others = !pids.is_empty() && !pids.iter().any(|pid| self.is_ours(*pid));
            if !keeps && !others {
                self.add("cgroup", path.display());
            }
        }
    }

    fn loop_devices(&mut self) {
        for name in names(Path::new("/sys/block")).into_iter().filter(|name| name.starts_with("loop")) {
            if let Ok(file) = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file"))
                && !self.others.iter().any(|dir| below(&file, dir))
            {
                self.add("loop device", format_args!("{name} ({})", file.trim()));
            }
        }
    }

    fn files(&mut self) {
        // podman's locks are there for good.
        for name in names(Path::new("/dev/shm")).into_iter().filter(|name| name != "libpod_lock") {
            self.add("shared memory", format_args!("/dev/shm/{name}"));
        }
        for dir in [self.devbox.join("run"), "/run/containerd/s".into(), self.devbox.join("state")] {
            let mut found = Vec::new();
            tree(&dir, 6, &mut |path, kind| {
                if kind.is_socket() || kind.is_fifo() {
                    found.push(path.to_owned());
                }
            });
            for path in found {
                self.add("socket", path.display());
            }
        }
        for (kind, dir, depth) in [
            ("task directory", self.devbox.join("state/io.containerd.runtime.v2.task"), 2),
            ("task directory", self.devbox.join("data/root/io.containerd.runtime.v2.task"), 2),
            ("nerdctl's file", self.devbox.join("data/nerdctl"), 4),
            ("nerdctl's file", "/run/nerdctl".into(), 2),
        ] {
            for path in at_depth(&dir, depth) {
                self.add(kind, path.display());
            }
        }
        self.state_directories();
        self.containers_of_vz();
        self.fifos();
    }

    /// What `vz create` keeps of a container, where it is not told another place.
    fn containers_of_vz(&mut self) {
        for path in at_depth(Path::new("/run/vz-oci"), 1) {
            if path.file_name().is_some_and(|id| id.to_string_lossy().starts_with(PREFIX)) {
                self.add("container of vz", path.display());
            }
        }
    }

    /// /run/vz/NAMESPACE/ID; the journal in it has the shim's socket, which is in its devbox's directory.
    fn state_directories(&mut self) {
        let root = Path::new("/run/vz");
        for path in at_depth(root, 2) {
            // What has been verified is remembered there, for all.
            if path.starts_with(root.join(".verified")) {
                continue;
            }
            let journal = fs::read_to_string(path.join("journal")).unwrap_or_default();
            let mut sockets = journal.lines().filter_map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).ok()?;
                (line["made"]["kind"] == "socket").then(|| line["made"]["path"].as_str().map(PathBuf::from))?
            });
            let ours = match sockets.next() {
                // The suite's own files are beside its devbox.
                Some(socket) => socket.starts_with(&self.devbox) || socket.starts_with(self.devbox.with_extension("d")),
                None => {
                    self.others.is_empty()
                        || path.file_name().is_some_and(|id| id.to_string_lossy().starts_with(PREFIX))
                }
            };
            if ours {
                self.add("state directory", path.display());
            }
        }
    }

    fn fifos(&mut self) {
        for path in fifo_directories() {
            self.add("fifo directory", path.display());
        }
    }

    /// What containerd knows, and what it holds open.
    fn containerd(&mut self, lab: &Lab) {
        let list = |program: Program| {
            let mut running = program.deadline(20).start();
            running
                .wait_at_most(Duration::from_secs(20))
                .filter(|output| output.code() == 0)
                .map(|output| output.text())
        };
        for (kind, args) in [
            ("container", &["containers", "ls", "-q"][..]),
            ("task", &["task", "ls", "-q"]),
            ("snapshot", &["snapshots", "ls"]),
            ("lease", &["leases", "ls", "-q"]),
        ] {
            match list(lab.ctr(args)) {
                Some(text) if kind == "snapshot" => {
                    // Committed ones are images' layers, which containerd's garbage collector removes in its own time.
                    let active = text.lines().filter(|line| line.ends_with("Active") || line.ends_with("View"));
                    active.for_each(|line| self.add(kind, line.split_whitespace().next().unwrap_or_default()));
                }
                Some(text) => text.lines().for_each(|line| self.add(kind, line)),
                None => self.add("containerd", format_args!("that does not answer `ctr {}`", args.join(" "))),
            }
        }
        let Some(pid) = fs::read_to_string(self.devbox.join("run/containerd.pid")).ok() else { return };
        let tasks = self.devbox.join("state/io.containerd.runtime.v2.task");
        for fd in names(&PathBuf::from(format!("/proc/{}/fd", pid.trim()))) {
            let target = fs::read_link(format!("/proc/{}/fd/{fd}", pid.trim())).unwrap_or_default();
            if target.starts_with(&tasks) {
                self.add("file that containerd holds open:", target.display());
            }
        }
    }
}

/// ctr's directories of fifos, one per client; those of this suite by the names in them.
pub fn fifo_directories() -> Vec<PathBuf> {
    let root = Path::new("/run/containerd/fifo");
    let ours = |dir: &PathBuf| names(dir).iter().any(|fifo| fifo.starts_with(PREFIX));
    names(root).iter().map(|name| root.join(name)).filter(ours).collect()
}

fn below(path: &str, dir: &str) -> bool {
    Path::new(path).starts_with(dir)
}

/// Names in a directory; none where it is not there.
fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Calls `each` with everything below a directory, at most so deep.
fn tree(dir: &Path, depth: usize, each: &mut impl FnMut(&Path, &fs::FileType)) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        each(&path, &kind);
        if kind.is_dir() && depth > 1 {
            tree(&path, depth - 1, each);
        }
    }
}

/// Everything below a directory that is exactly so deep.
fn at_depth(dir: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = HashSet::new();
    let wanted = dir.components().count() + depth;
    tree(dir, depth, &mut |path, _| {
        if path.components().count() == wanted {
            found.insert(path.to_owned());
        }
    });
    found.into_iter().collect()
}
