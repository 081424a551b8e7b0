//! The start of a `vmm` process, as whoever has a VM starts it: this same program again, with the subcommand `vmm`.
//!
//! It gets its end of the control channel and a place for its words, and nothing else of this process: no descriptor,
//! no variable but those named here. Its namespaces are its own from the beginning; the rest of its jail it makes
//! itself.

use std::{
    env,
    ffi::{CStr, CString},
    fmt,
    fs::OpenOptions,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{sched::CloneFlags, unistd::Pid};
use vz_sys::{
    channel::Channel,
    process::{Command, Process, Steps, limit_core, raise_open_files},
};

use crate::control::{self, BootConfig, CONTROL_FD, Request};

/// What it has of this process's environment: where QEMU is looked for, and whether a panic says where it was.
const ENVIRONMENT: [&str; 2] = ["PATH", "RUST_BACKTRACE"];

/// A vmm process to be started.
#[derive(Clone, Copy)]
pub struct Spawn<'a> {
    /// What it is called.
    pub name: &'a CStr,
    /// Where its log goes; nowhere without.
    pub stderr: Option<BorrowedFd<'a>>,
    /// Whether it is in a user namespace of its own.
    pub user_namespace: bool,
    /// Called with its pid before it does anything, so that what it takes is counted where it belongs.
    pub admit: &'a dyn Fn(Pid) -> io::Result<()>,
}

impl fmt::Debug for Spawn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut spawn = f.debug_struct("Spawn");
        spawn.field("name", &self.name).field("stderr", &self.stderr).field("user_namespace", &self.user_namespace);
        spawn.finish_non_exhaustive()
    }
}

/// Why there is no VM being booted.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The process could not be started.
    #[error("start vmm process")]
    Process(#[source] io::Error),
    /// It could not be told to boot.
    #[error("send request to vmm")]
    Boot(#[source] io::Error),
}

impl Spawn<'_> {
    /// Starts it, and tells it to boot, with `files` for its network cards and disks. Call it from the main thread: the
    /// process does not outlive the one that has started it, nor, once it is told anything, this end of its channel.
    pub fn boot(&self, config: BootConfig, files: &[OwnedFd]) -> Result<(Channel, Process), SpawnError> {
        let (channel, process) = self.process().map_err(SpawnError::Process)?;
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        control::send(&channel, &Request::Boot(Box::new(config)), &files).map_err(SpawnError::Boot)?;
        Ok((channel, process))
    }

    fn process(&self) -> io::Result<(Channel, Process)> {
        let (ours, theirs) = Channel::pair()?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        let stderr = self.stderr.unwrap_or(null.as_fd());
        let user_namespace = if self.user_namespace { CloneFlags::CLONE_NEWUSER } else { CloneFlags::empty() };
        let command = Command {
            program: c"/proc/self/exe".into(),
            args: vec![self.name.into(), c"vmm".into()],
            env: environment()?,
            fds: vec![(null.as_fd(), 0), (null.as_fd(), 1), (stderr, 2), (theirs.as_fd(), CONTROL_FD)],
            namespaces: CloneFlags::CLONE_NEWNS
                | CloneFlags::CLONE_NEWPID
                | CloneFlags::CLONE_NEWIPC
                | CloneFlags::CLONE_NEWNET
                | CloneFlags::CLONE_NEWUTS
                | CloneFlags::CLONE_NEWCGROUP
                | user_namespace,
            outlives_parent: false,
        };
        let admit = |pid| {
            // From in there the limits could not be raised.
            raise_open_files(pid, vz_jail::OPEN_FILES)?;
            limit_core(pid, vz_jail::NO_CORE)?;
            (self.admit)(pid)
        };
        let process = command.spawn_with(Steps { parent: Some(&admit), ..Steps::default() })?;
        Ok((ours, process))
    }
}

fn environment() -> io::Result<Vec<CString>> {
    let set = ENVIRONMENT.into_iter().filter_map(|name| Some((name, env::var_os(name)?)));
    set.map(|(name, value)| Ok(CString::new([name.as_bytes(), b"=", value.as_encoded_bytes()].concat())?)).collect()
}
