//! What runs on the host: processes, and whose they are.

use std::{collections::HashMap, fs, path::Path, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::poll::until;

/// The variable that a devbox's daemons have, and what they start inherits.
const MARK: &str = "VZ_DEVBOX_DAEMON=";

/// Makes this process the one that orphans among its descendants come to: whatever a test starts, and whatever becomes
/// of its parents, descends from here.
pub fn adopt_orphans() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("become the reaper of orphans");
}

/// This process's pid.
pub fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// A process.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its name (comm).
    pub name: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The devbox whose daemon started it, as its environment says.
    pub devbox: Option<String>,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let dir = format!("/proc/{pid}");
        let stat = fs::read_to_string(format!("{dir}/stat")).ok()?;
        let (start, rest) = stat.rsplit_once(')')?;
        let name = start.split_once('(')?.1.to_owned();
        let mut fields = rest.split_whitespace();
        // A zombie is gone as far as anybody but its parent is concerned.
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        if state == "Z" || state == "X" {
            return None;
        }
        let list = |file: &str| {
            let bytes = fs::read(format!("{dir}/{file}")).unwrap_or_default();
            bytes
                .split(|b| *b == 0)
                .filter(|part| !part.is_empty())
                .map(|part| String::from_utf8_lossy(part).into_owned())
                .collect::<Vec<_>>()
        };
        let devbox = list("environ").into_iter().find_map(|v| v.strip_prefix(MARK).map(str::to_owned));
        Some(Self { pid, parent, name, args: list("cmdline"), devbox })
    }

    /// The value of a flag in its arguments.
    pub fn flag(&self, name: &str) -> Option<&str> {
        let at = self.args.iter().position(|arg| arg == name)?;
        self.args.get(at + 1).map(String::as_str)
    }

    /// Whether its program has this name.
    pub fn is(&self, program: &str) -> bool {
        self.args.first().and_then(|arg| Path::new(arg).file_name()).is_some_and(|name| name == program)
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut args = self.args.join(" ");
        if args.len() > 200 {
            args.truncate(args.char_indices().take_while(|(at, _)| *at < 200).count());
            args.push_str(" ...");
        }
        write!(f, "{} (pid {}): {args}", self.name, self.pid)
    }
}

/// All processes of a moment.
#[derive(Debug, Default)]
pub struct Processes(HashMap<i32, Process>);

impl Processes {
    /// Those that run now.
    pub fn now() -> Self {
        let mut all = HashMap::new();
        for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(process) = pid.and_then(Process::read) {
                all.insert(process.pid, process);
            }
        }
        Self(all)
    }

    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = &Process> {
        self.0.values()
    }

    /// One.
    pub fn get(&self, pid: i32) -> Option<&Process> {
        self.0.get(&pid)
    }

    /// Whether `pid` is `ancestor` or descends from it.
    pub fn descends(&self, pid: i32, ancestor: i32) -> bool {
        let mut at = pid;
        // Pids are read one after the other: a circle is possible, if hardly.
        for _ in 0..64 {
            if at == ancestor {
                return true;
            }
            match self.0.get(&at) {
                Some(process) => at = process.parent,
                None => return false,
            }
        }
        false
    }
}

/// A container's processes on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The shim's daemon.
    Shim,
    /// The vmm process.
    Vmm,
    /// QEMU.
    Qemu,
    /// The process whose pid containerd knows.
    Anchor,
    /// That which a caller of `vz create` waits for.
    Keeper,
}

/// A container's process of a role, if it runs.
pub fn find(container: &str, role: Role) -> Option<Process> {
    let all = Processes::now();
    if role == Role::Keeper {
        let words = |p: &&Process| p.is("vz") && p.args.get(1..) == Some(&["keep".to_owned(), container.to_owned()]);
        // The keepers of its exec processes have the same words; its daemon is the child of the first.
        let first =
            |p: &&Process| all.iter().any(|child| child.parent == p.pid && child.name.starts_with("containerd-shim"));
        return all.iter().filter(words).find(first).cloned();
    }
    let shim = all.iter().find(|p| {
        p.name.starts_with("containerd-shim")
            && p.flag("-id") == Some(container)
            && !p.args.iter().any(|arg| ["start", "delete", "watch"].contains(&arg.as_str()))
    })?;
    let has_arg = |p: &Process, arg: &str| p.args.get(1).is_some_and(|found| found == arg);
    let is = |p: &&Process| match role {
        Role::Shim => p.pid == shim.pid,
        Role::Vmm => p.parent == shim.pid && has_arg(p, "vmm"),
        Role::Qemu => p.is("qemu-system-x86_64") && all.descends(p.pid, shim.pid),
        Role::Anchor => p.parent == shim.pid && (p.name == "vz-anchor" || has_arg(p, "anchor")),
        Role::Keeper => false,
    };
    all.iter().find(is).cloned()
}

/// Waits for a container's process of a role.
#[track_caller]
pub fn await_process(container: &str, role: Role) -> Process {
    until(&format!("process {role:?} of {container}"), Duration::from_secs(30), || find(container, role))
}

/// Ends a process the hard way, and waits until it is gone.
#[track_caller]
pub fn kill(process: &Process) {
    let pid = Pid::from_raw(process.pid).expect("a pid is positive");
    kill_process(pid, Signal::KILL).unwrap_or_else(|e| panic!("kill {process}: {e}"));
    until(&format!("end of {process}"), Duration::from_secs(10), || {
        Process::read(process.pid).is_none_or(|now| now.args != process.args).then_some(())
    });
}

/// The host's kernel release.
pub fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
