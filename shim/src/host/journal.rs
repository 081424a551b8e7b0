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

use vz_state::Line;
pub use vz_state::{Resource, SHIM};
use vz_sys::process::Identity;

/// Times that a directory is made again which somebody else removes: each time another sandbox has ended.
const MAKE_TRIES: usize = 100;

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
    /// Makes the state directory and an empty journal in it. What an earlier sandbox with this name has left behind
    /// must have been taken away.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        let state = |action| move |source| Error::State { action, path: dir.to_owned(), source };
        let make = || {
            fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(|e| ("make state directory", e))?;
            let path = dir.join(vz_state::JOURNAL);
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
        match OpenOptions::new().append(true).open(dir.join(vz_state::JOURNAL)) {
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
        let Identity { start_time, .. } =
            Identity::of(pid).map_err(|source| Error::Process { role: role.to_owned(), pid, source })?;
        let resource = Resource::Process { role: role.to_owned(), pid, start_time };
        self.made(resource.clone())?;
        Ok(resource)
    }

    /// Writes down a hook that has been started, and is told to begin after this.
    pub fn hook(&self, pid: i32) -> Result<Resource, Error> {
        let Identity { start_time, .. } =
            Identity::of(pid).map_err(|source| Error::Process { role: "hook".into(), pid, source })?;
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
                Identity { pid, start_time: then }.is_alive().then_some(pid)
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

/// What the sandbox in `dir` owns, in the order in which it was made; nothing if there is no journal.
pub fn read(dir: &Path) -> Result<Vec<Resource>, Error> {
    // The last line may be cut short by a full disk or a kill; what it announced was then never made.
    let unreadable = |error: &serde_json::Error| {
        tracing::warn!(%error, path = %dir.display(), "journal line is unreadable");
    };
    match vz_state::read(dir, unreadable) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|source| Error::State { action: "read journal in", path: dir.to_owned(), source }),
    }
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
        while Identity::of(pid).unwrap().is_alive() {
            std::thread::yield_now();
        }
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
        child.wait().unwrap();
        assert_eq!(Journal::living_shim(&dir).unwrap(), None);
    }
}
