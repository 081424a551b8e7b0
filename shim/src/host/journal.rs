//! What a sandbox owns on the host, written down before it is made.
//!
//! The journal is a file of JSON lines in the sandbox's state directory. Mounts are not in it: they are made in the
//! shim's private mount namespace and end with its last process. [`super::unwind`] takes away what the journal names.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::process::{is_alive, start_time};

/// Where all sandboxes keep their state; a tmpfs on every host that has systemd.
pub const STATE_ROOT: &str = "/run/vz";
pub const FILE: &str = "journal";
/// The role of the shim's own process.
pub const SHIM: &str = "shim";
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
    /// A process that is to be written down.
    #[error("look at {role} (pid {pid})")]
    Process {
        /// What it is.
        role: String,
        /// Its pid.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
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

    /// Makes the state directory and an empty journal in it. What an earlier sandbox with this name has left behind
    /// must have been taken away.
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
        let start_time = start_time(pid).map_err(|source| Error::Process { role: role.to_owned(), pid, source })?;
        let resource = Resource::Process { role: role.to_owned(), pid, start_time };
        self.made(resource.clone())?;
        Ok(resource)
    }

    /// Writes down a hook that has been started, and is told to begin after this.
    pub fn hook(&self, pid: i32) -> Result<Resource, Error> {
        let start_time = start_time(pid).map_err(|source| Error::Process { role: "hook".into(), pid, source })?;
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
                is_alive(pid, then).then_some(pid)
            }
            _ => None,
        };
        Ok(read(dir)?.into_iter().find_map(living))
    }
}

/// Writes down what is gone of a sandbox whose journal stays.
pub fn append(dir: &Path, gone: Vec<Resource>) -> Result<(), Error> {
    let state = |source| Error::State { action: "write journal in", path: dir.to_owned(), source };
    let Some(journal) = Journal::open(dir)? else { return Ok(()) };
    // A line that was cut short ends here.
    (&journal.file).write_all(b"\n").map_err(state)?;
    gone.into_iter().try_for_each(|resource| journal.gone(resource))
}

pub fn read(dir: &Path) -> Result<Vec<Resource>, Error> {
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

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
        while is_alive(pid, start_time(pid).unwrap()) {
            std::thread::yield_now();
        }
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        child.wait().unwrap();
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
    }

    #[test]
    fn a_journal_of_the_version_before_is_read() {
        let old = r#"{"made":{"kind":"socket","path":"/s"}}"#;
        let Line::Made(resource) = serde_json::from_str(old).unwrap() else { panic!() };
        assert_eq!(resource, Resource::Socket { path: "/s".into(), inode: None });
    }
}
