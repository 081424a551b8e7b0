//! What a sandbox owns on the host, written down before it is made, and the one way in which it is taken away again.
//!
//! The journal is a file of JSON lines in the sandbox's state directory. [`Journal::unwind`] is both the end of a
//! sandbox's normal life and what `delete` does after a crash; it can be repeated at any point of itself. What cannot be
//! taken away keeps nothing else and no later sandbox of this name for good: each `start` tries again, and says what it is.
//! Mounts are not in it: they are made in the shim's private mount namespace and end with its last process.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use serde::{Deserialize, Serialize};
use vz_net::netns::Netns;
use vz_sys::process::Handle;

use crate::{
    error::chain,
    host::{cgroup, socket},
};

/// Where all sandboxes keep their state; a tmpfs on every host that has systemd.
pub const STATE_ROOT: &str = "/run/vz";
const FILE: &str = "journal";
/// The role of the shim's own process.
pub const SHIM: &str = "shim";
/// How long a hook may go on after its shim.
const HOOK_DEADLINE: Duration = Duration::from_secs(3);
/// How long one thing may take to be gone before the next one's turn.
const EACH: Duration = Duration::from_secs(1);
/// How long everything may take that is slow.
const DEADLINE: Duration = Duration::from_secs(10);
/// Times that a directory is made again which somebody else removes: each time another sandbox has ended.
const MAKE_TRIES: usize = 100;

/// Something that a sandbox owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Resource {
    /// A process; `start_time` tells it from a later one with its pid.
    Process {
        /// What it is, for people.
        role: String,
        /// Its pid on the host.
        pid: i32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
    },
    /// A hook that runs: what it does must be done before its counterpart undoes it.
    Hook {
        /// Its pid on the host.
        pid: i32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
    },
    /// A unix socket.
    Socket {
        /// Its path.
        path: PathBuf,
        /// Its inode, by which it is told from a later one at the same path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inode: Option<u64>,
    },
    /// A directory of a cgroup.
    Cgroup {
        /// Its path.
        path: PathBuf,
    },
    /// The redirection of a link's packets, in a network namespace that outlives the sandbox.
    Redirect {
        /// Where the namespace is.
        netns: PathBuf,
        /// The link's index.
        index: u32,
        /// The link's name.
        link: String,
    },
    /// poststop hooks of a container that are still to be run.
    Poststop {
        /// The container's id.
        id: String,
        /// Its bundle, with the config.json that names them.
        bundle: PathBuf,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Made(Resource),
    Gone(Resource),
}

/// Why something could not be written down or taken away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory or its journal.
    #[error("{action} {path}")]
    State {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A redirection in a network namespace.
    #[error("take redirection from link {link} in network namespace {netns}")]
    Redirect {
        /// The namespace.
        netns: PathBuf,
        /// The link.
        link: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A process does not end.
    #[error("kill {role} (pid {pid})")]
    Kill {
        /// What it is.
        role: String,
        /// Its pid.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
    /// Not everything is gone.
    #[error(
        "an earlier sandbox has left what cannot be taken away, which the next start tries again ({dir}): {failures}"
    )]
    Left {
        /// The state directory, whose journal has it.
        dir: PathBuf,
        /// What, and why.
        failures: Failures,
    },
}

/// All that has failed.
#[derive(Debug)]
pub struct Failures(Vec<Error>);

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> = self.0.iter().map(|error| chain(error)).collect();
        f.write_str(&all.join("; "))
    }
}

/// A sandbox's journal, open for writing.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    file: File,
}

impl Journal {
    /// The state directory of a sandbox. Both names are checked by containerd to be free of `/`.
    pub fn dir(namespace: &str, id: &str) -> PathBuf {
        Path::new(STATE_ROOT).join(namespace).join(id)
    }

    /// Makes the state directory and an empty journal in it. What an earlier sandbox with this name has left behind must
    /// have been taken away.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        let state = |action| move |source| Error::State { action, path: dir.to_owned(), source };
        let make = || {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(|e| ("make state directory", e))?;
            let path = dir.join(FILE);
            OpenOptions::new().append(true).create_new(true).open(path).map_err(|e| ("create journal in", e))
        };
        let mut tries = 0;
        loop {
            match make() {
                // The end of another sandbox has just taken the directory along: the last one of the namespace, or the
                // last one of this name.
                Err((_, e)) if e.kind() == io::ErrorKind::NotFound && tries < MAKE_TRIES => tries += 1,
                Err((action, source)) => return Err(state(action)(source)),
                Ok(file) => return Ok(Self { dir: dir.to_owned(), file }),
            }
        }
    }

    /// Writes down a process of the sandbox in `dir`, for somebody who has not made the journal. `None` if there is no
    /// journal any more.
    pub fn add_process(dir: &Path, role: &str, pid: i32) -> Result<Option<Resource>, Error> {
        Self::open(dir)?.map(|journal| journal.process(role, pid)).transpose()
    }

    fn open(dir: &Path) -> Result<Option<Self>, Error> {
        let state = |source| Error::State { action: "open journal in", path: dir.to_owned(), source };
        match OpenOptions::new().append(true).open(dir.join(FILE)) {
            Ok(file) => Ok(Some(Self { dir: dir.to_owned(), file })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(state(e)),
        }
    }

    /// The state directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Writes down something that is about to be made.
    pub fn made(&self, resource: Resource) -> Result<(), Error> {
        self.write(&Line::Made(resource))
    }

    /// Writes down that something is gone.
    pub fn gone(&self, resource: Resource) -> Result<(), Error> {
        self.write(&Line::Gone(resource))
    }

    /// Writes down a running process.
    pub fn process(&self, role: &str, pid: i32) -> Result<Resource, Error> {
        let start_time = start_time(pid).map_err(|source| Error::Kill { role: role.to_owned(), pid, source })?;
        let resource = Resource::Process { role: role.to_owned(), pid, start_time };
        self.made(resource.clone())?;
        Ok(resource)
    }

    /// Writes down a hook that has been started, and is told to begin after this.
    pub fn hook(&self, pid: i32) -> Result<Resource, Error> {
        let start_time = start_time(pid).map_err(|source| Error::Kill { role: "hook".into(), pid, source })?;
        let resource = Resource::Hook { pid, start_time };
        self.made(resource.clone())?;
        Ok(resource)
    }

    fn write(&self, line: &Line) -> Result<(), Error> {
        let state = |source| Error::State { action: "write journal in", path: self.dir.clone(), source };
        let mut text = serde_json::to_vec(line).map_err(|e| state(e.into()))?;
        text.push(b'\n');
        (&self.file).write_all(&text).map_err(state)
    }

    /// The pid of the shim that runs the sandbox in `dir`, if one does.
    pub fn living_shim(dir: &Path) -> Result<Option<i32>, Error> {
        let living = |resource| match resource {
            Resource::Process { role, pid, start_time: then } if role == SHIM => {
                // One that has ended, and has only not been waited for, is not living.
                stat(pid).is_ok_and(|(state, now)| state != 'Z' && state != 'X' && now == then).then_some(pid)
            }
            _ => None,
        };
        Ok(read(dir)?.into_iter().find_map(living))
    }

    /// Takes away everything that the sandbox in `dir` owns, the last made first, and the directory.
    ///
    /// `poststop` runs a container's hooks. The caller itself may be in the journal; it is passed over. No directory is
    /// no error. What cannot be taken away keeps nothing else: the error names all of it, and the journal keeps it for the
    /// next try.
    pub fn unwind(dir: &Path, poststop: impl FnMut(&str, &Path)) -> Result<(), Error> {
        Self::unwind_within(DEADLINE, dir, poststop)
    }

    /// The same, with another time for everything that is slow.
    pub fn unwind_within(time: Duration, dir: &Path, mut poststop: impl FnMut(&str, &Path)) -> Result<(), Error> {
        let end = Instant::now() + time;
        let mut failures = Vec::new();
        // A shim that lives would go on: make things that are not in the journal yet, and run the hooks of what fails.
        for resource in read(dir)? {
            if let Resource::Process { role, pid, start_time } = resource
                && role == SHIM
                && let Err(error) = kill(&role, pid, start_time, end)
            {
                failures.push(error);
            }
        }
        if !failures.is_empty() {
            return Err(Error::Left { dir: dir.to_owned(), failures: Failures(failures) });
        }
        let (mut gone, mut left) = (Vec::new(), Vec::new());
        for resource in read(dir)?.into_iter().rev() {
            match take_away(&resource, end.min(Instant::now() + EACH), &mut poststop) {
                Ok(()) => gone.push(resource),
                Err(_) => left.push(resource),
            }
        }
        // What was slow has had time meanwhile, and what kept it busy may be gone.
        for resource in left {
            match take_away(&resource, end, &mut poststop) {
                Ok(()) => gone.push(resource),
                Err(error) => failures.push(error),
            }
        }
        empty(dir, &mut failures);
        if failures.is_empty() {
            return remove_directory(dir);
        }
        // Hooks are not run again, nor is a pid looked at that may be another's by then.
        if let Err(error) = append(dir, gone) {
            failures.push(error);
        }
        Err(Error::Left { dir: dir.to_owned(), failures: Failures(failures) })
    }
}

/// Takes away one resource, within the deadline.
fn take_away(resource: &Resource, deadline: Instant, poststop: &mut impl FnMut(&str, &Path)) -> Result<(), Error> {
    match resource {
        Resource::Process { role, pid, start_time } => kill(role, *pid, *start_time, deadline),
        Resource::Cgroup { path } => remove(path, |path| cgroup::remove(&path, deadline)),
        Resource::Hook { pid, start_time } => match ends(*pid, *start_time, Instant::now() + HOOK_DEADLINE)? {
            true => Ok(()),
            false => kill("hook", *pid, *start_time, deadline.max(Instant::now() + EACH)),
        },
        Resource::Socket { path, inode } => remove(path, |path| socket::remove(&path, *inode)),
        Resource::Redirect { netns, index, link } => take_back(netns, *index, link),
        Resource::Poststop { id, bundle } => {
            poststop(id, bundle);
            Ok(())
        }
    }
}

/// Removes what is in a state directory but its journal.
fn empty(dir: &Path, failures: &mut Vec<Error>) {
    let list = |source| Error::State { action: "list", path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(source) => return failures.push(list(source)),
    };
    for entry in entries {
        let removed = entry.map_err(list).and_then(|entry| {
            let path = entry.path();
            // A directory here is a mount point, never a tree of files. Whatever is mounted is detached first, so
            // nothing below it can be removed by mistake, and rmdir refuses what is not empty.
            if path.is_dir() && !path.is_symlink() {
                match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                    Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => remove(&path, fs::remove_dir),
                    Err(e) => Err(Error::State { action: "unmount", path, source: e.into() }),
                }
            } else if path.file_name().is_some_and(|name| name != FILE) {
                remove(&path, fs::remove_file)
            } else {
                Ok(())
            }
        });
        failures.extend(removed.err());
    }
}

/// Removes an empty state directory with its journal.
fn remove_directory(dir: &Path) -> Result<(), Error> {
    remove(&dir.join(FILE), fs::remove_file)?;
    remove(dir, fs::remove_dir)?;
    // The namespace's directory stays while others use it.
    if let Some(parent) = dir.parent().filter(|parent| *parent != Path::new(STATE_ROOT)) {
        match fs::remove_dir(parent) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
            Err(source) => return Err(Error::State { action: "remove", path: parent.to_owned(), source }),
        }
    }
    Ok(())
}

/// Writes down what is gone of a sandbox whose journal stays.
fn append(dir: &Path, gone: Vec<Resource>) -> Result<(), Error> {
    let state = |source| Error::State { action: "write journal in", path: dir.to_owned(), source };
    let Some(journal) = Journal::open(dir)? else { return Ok(()) };
    // A line that was cut short ends here.
    (&journal.file).write_all(b"\n").map_err(state)?;
    gone.into_iter().try_for_each(|resource| journal.gone(resource))
}

fn read(dir: &Path) -> Result<Vec<Resource>, Error> {
    let path = dir.join(FILE);
    let text = match fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(Error::State { action: "read", path, source }),
    };
    let mut made = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        match serde_json::from_str(line) {
            Ok(Line::Made(resource)) => made.push(resource),
            Ok(Line::Gone(resource)) => made.retain(|r| *r != resource),
            // The last line may be cut short by a full disk or a kill; what it announced was then never made.
            Err(error) => tracing::warn!(%error, path = %path.display(), "journal line is unreadable"),
        }
    }
    Ok(made)
}

/// A namespace or link that is gone has taken it along.
fn take_back(netns: &Path, index: u32, link: &str) -> Result<(), Error> {
    let failed = |source| Error::Redirect { netns: netns.to_owned(), link: link.to_owned(), source };
    match Netns::open(netns) {
        Ok(netns) => vz_net::wire::take_back(&netns, index, link).map_err(|e| failed(e.into())),
        // The place of its name may be there still.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(()),
        Err(e) => Err(failed(e.into())),
    }
}

fn remove(path: &Path, how: impl FnOnce(PathBuf) -> io::Result<()>) -> Result<(), Error> {
    match how(path.to_owned()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::State { action: "remove", path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

/// Kills a process and waits until it is gone. A pid that now belongs to another process is left alone.
fn kill(role: &str, pid: i32, wanted: u64, deadline: Instant) -> Result<(), Error> {
    if pid == nix::unistd::Pid::this().as_raw() {
        return Ok(());
    }
    let fail = |source| Error::Kill { role: role.to_owned(), pid, source };
    let Some(handle) = hold(pid, wanted).map_err(fail)? else { return Ok(()) };
    handle.kill(Signal::SIGKILL).map_err(fail)?;
    match wait(&handle, deadline) {
        Ok(true) => Ok(()),
        Ok(false) => Err(fail(io::Error::new(io::ErrorKind::TimedOut, "it has been killed and does not end"))),
        Err(error) => Err(fail(error)),
    }
}

/// Whether a process ends, or has ended, in time.
fn ends(pid: i32, wanted: u64, deadline: Instant) -> Result<bool, Error> {
    let fail = |source| Error::Kill { role: "hook".into(), pid, source };
    match hold(pid, wanted).map_err(fail)? {
        Some(handle) => wait(&handle, deadline).map_err(fail),
        None => Ok(true),
    }
}

/// Takes hold of a process, unless it has ended.
fn hold(pid: i32, wanted: u64) -> io::Result<Option<Handle>> {
    let Some(handle) = Handle::open(pid)? else { return Ok(None) };
    match start_time(pid) {
        Ok(found) if found == wanted => Ok(Some(handle)),
        Ok(_) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a process ends in time.
pub fn wait(handle: &Handle, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// When a process was started, in clock ticks since boot.
fn start_time(pid: i32) -> io::Result<u64> {
    stat(pid).map(|(_, start_time)| start_time)
}

/// The state of a process, and when it was started: proc_pid_stat(5), fields 3 and 22.
fn stat(pid: i32) -> io::Result<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may contain anything, but it ends with the last parenthesis.
    let fields = || {
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        Some((fields.next()?.chars().next()?, fields.nth(18)?.parse().ok()?))
    };
    fields().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn unwinding_takes_away_what_was_made_and_can_be_repeated() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("default").join("c1");
        let journal = Journal::create(&dir).unwrap();
        let socket = root.path().join("socket");
        fs::write(&socket, "").unwrap();
        journal.made(Resource::Socket { path: socket.clone(), inode: None }).unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        journal.process("sleeper", i32::try_from(child.id()).unwrap()).unwrap();
        fs::create_dir(dir.join("share")).unwrap();
        fs::write(dir.join("console.log"), "x").unwrap();
        journal.made(Resource::Poststop { id: "c1".into(), bundle: "/b".into() }).unwrap();
        let mut hooks = Vec::new();
        Journal::unwind(&dir, |id, bundle| hooks.push((id.to_owned(), bundle.to_owned()))).unwrap();
        assert_eq!(hooks, [("c1".to_owned(), PathBuf::from("/b"))]);
        assert!(!child.wait().unwrap().success());
        assert!(!dir.exists() && !socket.exists() && !root.path().join("default").exists());
        Journal::unwind(&dir, |_, _| panic!("nothing is left")).unwrap();
    }

    #[test]
    fn a_running_hook_is_waited_for_before_its_counterpart_runs() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("default").join("c1");
        let journal = Journal::create(&dir).unwrap();
        journal.made(Resource::Poststop { id: "c1".into(), bundle: "/b".into() }).unwrap();
        let done = root.path().join("done");
        let mut hook =
            Command::new("sh").args(["-c", &format!("sleep 0.3; touch {}", done.display())]).spawn().unwrap();
        journal.hook(i32::try_from(hook.id()).unwrap()).unwrap();
        Journal::unwind(&dir, |_, _| assert!(done.exists())).unwrap();
        assert!(hook.wait().unwrap().success());
    }

    #[test]
    fn what_is_gone_already_is_not_taken_away_again() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        let hook = Resource::Poststop { id: "c1".into(), bundle: "/b".into() };
        journal.made(hook.clone()).unwrap();
        journal.gone(hook).unwrap();
        Journal::unwind(&dir, |_, _| panic!("it is gone")).unwrap();
    }

    #[test]
    fn a_pid_that_was_reused_is_left_alone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let soon = Instant::now() + Duration::from_secs(5);
        kill("other", pid, start_time(pid).unwrap() + 1, soon).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        kill("gone", pid, 1, soon).unwrap();
    }

    #[test]
    fn a_living_shim_is_found() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        let journal = Journal::create(&dir).unwrap();
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        journal.process(SHIM, pid).unwrap();
        assert_eq!(Journal::living_shim(&dir).unwrap(), Some(pid));
        child.kill().unwrap();
        // A zombie by now or soon, until it is waited for.
        while stat(pid).is_ok_and(|(state, _)| state != 'Z') {
            std::thread::yield_now();
        }
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        child.wait().unwrap();
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        Journal::unwind(&dir, |_, _| ()).unwrap();
    }

    #[test]
    fn a_journal_line_that_was_cut_short_is_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        (&journal.file).write_all(b"{\"made\":{\"kind\":\"sock").unwrap();
        Journal::unwind(&dir, |_, _| ()).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn a_full_state_directory_is_never_emptied_below_a_mount_point() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        Journal::create(&dir).unwrap();
        fs::create_dir_all(dir.join("share").join("precious")).unwrap();
        assert!(Journal::unwind(&dir, |_, _| ()).is_err());
        assert!(dir.join("share").join("precious").exists());
    }

    #[test]
    fn what_cannot_be_taken_away_keeps_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        journal.process("sleeper", i32::try_from(child.id()).unwrap()).unwrap();
        journal.made(Resource::Poststop { id: "c1".into(), bundle: "/b".into() }).unwrap();
        // Not sockets, so that they cannot be removed as such.
        let wrong = [root.path().join("first"), root.path().join("second")];
        for path in &wrong {
            fs::create_dir(path).unwrap();
            journal.made(Resource::Socket { path: path.clone(), inode: None }).unwrap();
        }
        fs::create_dir_all(dir.join("share").join("precious")).unwrap();
        fs::write(dir.join("console.log"), "x").unwrap();
        (&journal.file).write_all(b"{\"made\":{\"kind\":\"sock").unwrap();
        let mut hooks = 0;
        let said = Journal::unwind(&dir, |_, _| hooks += 1).unwrap_err().to_string();
        for name in ["first", "second", "share"] {
            assert!(said.contains(&format!("/{name}: ")), "{name}: {said}");
        }
        assert!(!child.wait().unwrap().success());
        assert!(!dir.join("console.log").exists());
        // What is gone is not looked at again, hooks above all.
        let left = read(&dir).unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
        for path in &wrong {
            fs::remove_dir(path).unwrap();
        }
        fs::remove_dir(dir.join("share").join("precious")).unwrap();
        Journal::unwind(&dir, |_, _| hooks += 1).unwrap();
        assert_eq!(hooks, 1);
        assert!(!root.path().join("ns").exists());
    }

    #[test]
    fn a_journal_with_bytes_that_are_no_text_is_read() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        (&journal.file).write_all(b"\xff\xfe\n").unwrap();
        let socket = root.path().join("socket");
        fs::write(&socket, "").unwrap();
        journal.made(Resource::Socket { path: socket.clone(), inode: None }).unwrap();
        Journal::unwind(&dir, |_, _| ()).unwrap();
        assert!(!socket.exists() && !dir.exists());
    }

    #[test]
    fn another_sandboxs_socket_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        let path = root.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let inode = socket::inode(&path).unwrap();
        journal.made(Resource::Socket { path: path.clone(), inode: Some(inode + 1) }).unwrap();
        Journal::unwind(&dir, |_, _| ()).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn a_journal_of_the_version_before_is_read() {
        let old = r#"{"made":{"kind":"socket","path":"/s"}}"#;
        let Line::Made(resource) = serde_json::from_str(old).unwrap() else { panic!() };
        assert_eq!(resource, Resource::Socket { path: "/s".into(), inode: None });
    }
}
