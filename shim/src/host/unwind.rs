//! The one way in which everything that a sandbox owns is taken away again.
//!
//! [`unwind`] is both the end of a sandbox's normal life and what `delete` does after a crash; it can be repeated at
//! any point of itself. What cannot be taken away keeps nothing else and no later sandbox of this name for good: each
//! `start` tries again, and says what it is.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use vz_net::netns::Netns;
use vz_sys::{error::chain, process::Identity};

use super::{
    cgroup,
    hooks::{self, Launch},
    journal::{self, Resource, SHIM},
    socket,
};

/// How long a hook may go on after its shim.
const HOOK_DEADLINE: Duration = Duration::from_secs(3);
/// How long one thing may take to be gone before the next one's turn.
const EACH: Duration = Duration::from_secs(1);
/// How long everything may take that is slow.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Why something could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state directory or its journal.
    #[error(transparent)]
    Journal(#[from] journal::Error),
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

/// Takes away everything that the sandbox in `dir` owns, the last made first, and the directory.
///
/// `poststop` runs a container's hooks. The caller itself may be in the journal; it is passed over. No directory is
/// no error. What cannot be taken away keeps nothing else: the error names all of it, and the journal keeps it for the
/// next try.
pub fn unwind(dir: &Path, poststop: impl FnMut(&str, &Path)) -> Result<(), Error> {
    replay(DEADLINE, dir, poststop)
}

/// What an unwinding has come to.
#[derive(Debug)]
pub struct Unwound {
    /// What is left.
    pub result: Result<(), Error>,
    /// The hooks that run now.
    pub due: Due,
}

/// Containers whose poststop hooks are due, and their bundles.
#[derive(Debug, Default)]
#[must_use = "nobody else runs these hooks"]
pub struct Due(Vec<(String, PathBuf)>);

impl Due {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Runs them. The journal that had them has been replayed.
    pub async fn run(self, launch: &Launch) {
        for (id, bundle) in self.0 {
            hooks::poststop(&id, &bundle, None, launch).await;
        }
    }
}

/// Unwinds the sandbox in `dir`, with another time for everything that is slow, and hands over the hooks that are due.
pub fn unwind_within(time: Duration, dir: &Path) -> Unwound {
    let mut due = Due::default();
    let result = replay(time, dir, |id, bundle| due.0.push((id.to_owned(), bundle.to_owned())));
    Unwound { result, due }
}

fn replay(time: Duration, dir: &Path, mut poststop: impl FnMut(&str, &Path)) -> Result<(), Error> {
    let end = Instant::now() + time;
    let mut failures = Vec::new();
    // A shim that lives would go on: make things that are not in the journal yet, and run the hooks of what fails.
    for resource in journal::read(dir)? {
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
    for resource in journal::read(dir)?.into_iter().rev() {
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
    if let Err(error) = journal::append(dir, gone) {
        failures.push(error.into());
    }
    Err(Error::Left { dir: dir.to_owned(), failures: Failures(failures) })
}

/// Takes away one resource, within the deadline.
fn take_away(resource: &Resource, deadline: Instant, poststop: &mut impl FnMut(&str, &Path)) -> Result<(), Error> {
    match resource {
        Resource::Process { role, pid, start_time } => kill(role, *pid, *start_time, deadline),
        Resource::Cgroup { path } => remove(path, |path| cgroup::remove(&path, deadline)),
        Resource::Hook { pid, start_time } => {
            match ends(Identity { pid: *pid, start_time: *start_time }, Instant::now() + HOOK_DEADLINE)
                .map_err(failed("hook", *pid))?
            {
                true => Ok(()),
                false => kill("hook", *pid, *start_time, deadline.max(Instant::now() + EACH)),
            }
        }
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
    let list = |source| state("list", dir.to_owned(), source);
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
                    Err(e) => Err(state("unmount", path, e.into())),
                }
            } else if path.file_name().is_some_and(|name| name != vz_state::JOURNAL) {
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
    remove(&dir.join(vz_state::JOURNAL), fs::remove_file)?;
    remove(dir, fs::remove_dir)?;
    // The namespace's directory stays while others use it.
    if let Some(parent) = dir.parent().filter(|parent| *parent != Path::new(vz_state::ROOT)) {
        match fs::remove_dir(parent) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
            Err(source) => return Err(state("remove", parent.to_owned(), source)),
        }
    }
    Ok(())
}

/// Kills a process and waits until it is gone. The caller itself is left alone.
fn kill(role: &str, pid: i32, start_time: u64, deadline: Instant) -> Result<(), Error> {
    let process = Identity { pid, start_time };
    if Identity::this().is_ok_and(|this| this == process) {
        return Ok(());
    }
    match process.kill(deadline) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let why = io::Error::new(io::ErrorKind::TimedOut, "it has been killed and does not end");
            Err(failed(role, pid)(why))
        }
        Err(error) => Err(failed(role, pid)(error)),
    }
}

/// Whether a process ends, or has ended, in time.
fn ends(process: Identity, deadline: Instant) -> io::Result<bool> {
    process.hold()?.map_or(Ok(true), |handle| handle.ends(deadline))
}

fn state(action: &'static str, path: PathBuf, source: io::Error) -> Error {
    journal::Error::State { action, path, source }.into()
}

fn failed(role: &str, pid: i32) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kill { role: role.to_owned(), pid, source }
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
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(state("remove", path.to_owned(), e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, process::Command};

    use super::{super::journal::Journal, *};

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
        unwind(&dir, |id, bundle| hooks.push((id.to_owned(), bundle.to_owned()))).unwrap();
        assert_eq!(hooks, [("c1".to_owned(), PathBuf::from("/b"))]);
        assert!(!child.wait().unwrap().success());
        assert!(!dir.exists() && !socket.exists() && !root.path().join("default").exists());
        unwind(&dir, |_, _| panic!("nothing is left")).unwrap();
    }

    #[tokio::test]
    async fn hooks_that_are_due_run_once_all_else_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let (dir, bundle, done) = (root.path().join("ns/c1"), root.path().join("bundle"), root.path().join("done"));
        let journal = Journal::create(&dir).unwrap();
        fs::create_dir(&bundle).unwrap();
        let script = format!("test ! -e {} && touch {}", dir.display(), done.display());
        let hooks = serde_json::json!({ "poststop": [{ "path": "/bin/sh", "args": ["sh", "-c", script] }] });
        let spec = serde_json::json!({ "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "hooks": hooks });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        journal.made(Resource::Poststop { id: "c1".into(), bundle: bundle.clone() }).unwrap();
        let Unwound { result, due } = unwind_within(DEADLINE, &dir);
        result.unwrap();
        assert!(!due.is_empty() && !done.exists());
        due.run(&Launch { surroundings: None, limit: Duration::from_secs(60) }).await;
        assert!(done.exists());
        assert!(unwind_within(DEADLINE, &dir).due.is_empty());
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
        unwind(&dir, |_, _| assert!(done.exists())).unwrap();
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
        unwind(&dir, |_, _| panic!("it is gone")).unwrap();
    }

    #[test]
    fn a_journal_line_that_was_cut_short_is_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        Journal::create(&dir).unwrap();
        journal_file(&dir).write_all(b"{\"made\":{\"kind\":\"sock").unwrap();
        unwind(&dir, |_, _| ()).unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn a_full_state_directory_is_never_emptied_below_a_mount_point() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        Journal::create(&dir).unwrap();
        fs::create_dir_all(dir.join("share").join("precious")).unwrap();
        assert!(unwind(&dir, |_, _| ()).is_err());
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
        journal_file(&dir).write_all(b"{\"made\":{\"kind\":\"sock").unwrap();
        let mut hooks = 0;
        let said = unwind(&dir, |_, _| hooks += 1).unwrap_err().to_string();
        for name in ["first", "second", "share"] {
            assert!(said.contains(&format!("/{name}: ")), "{name}: {said}");
        }
        assert!(!child.wait().unwrap().success());
        assert!(!dir.join("console.log").exists());
        // What is gone is not looked at again, hooks above all.
        let left = journal::read(&dir).unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
        for path in &wrong {
            fs::remove_dir(path).unwrap();
        }
        fs::remove_dir(dir.join("share").join("precious")).unwrap();
        unwind(&dir, |_, _| hooks += 1).unwrap();
        assert_eq!(hooks, 1);
        assert!(!root.path().join("ns").exists());
    }

    #[test]
    fn a_journal_with_bytes_that_are_no_text_is_read() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns").join("c1");
        let journal = Journal::create(&dir).unwrap();
        journal_file(&dir).write_all(b"\xff\xfe\n").unwrap();
        let socket = root.path().join("socket");
        fs::write(&socket, "").unwrap();
        journal.made(Resource::Socket { path: socket.clone(), inode: None }).unwrap();
        unwind(&dir, |_, _| ()).unwrap();
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
        unwind(&dir, |_, _| ()).unwrap();
        assert!(path.exists());
    }

    /// For what no journal writes.
    fn journal_file(dir: &Path) -> fs::File {
        fs::OpenOptions::new().append(true).open(dir.join(vz_state::JOURNAL)).unwrap()
    }
}
