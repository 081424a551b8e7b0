//! A container's process on the host: the pid that every reply names.
//!
//! Clients dereference a task's pid (`/proc/PID/ns/net`, `/proc/PID/root`), so each container has this process, in its
//! network namespace and with its root file system as root. It does nothing but wait for its end. Its pid namespace is its
//! own, and so is what it has at /proc: whoever lists the container's processes there finds one.
//!
//! It ends when nobody holds the other end of its channel any more. The shim does, and so do the hooks that it runs: one
//! that connects the container must find the network namespace there to its end, even if the shim is killed meanwhile, for
//! no plugin takes back what it has done by halves. What is still there then is in the journal.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    unistd::{Pid, chdir, pivot_root},
};
use vz_sys::{
    channel::Channel,
    process::{Command, Process, Steps, inherited_fd},
};

/// Descriptor of its channel to the shim.
const CHANNEL_FD: i32 = 3;
/// Descriptor of the network namespace that it enters.
const NETNS_FD: i32 = 4;
const READY: &[u8] = b"ready";

/// Why there is no anchor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("start anchor process")]
    Spawn(#[source] io::Error),
    /// It could not enter the root file system.
    #[error("anchor process in {rootfs}: {reason}")]
    Enter {
        /// The container's root file system.
        rootfs: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// A running anchor; dropping it ends the process.
#[derive(Debug)]
pub struct Anchor {
    process: Process,
    channel: Option<Channel>,
}

impl Anchor {
    /// Starts one with `rootfs` as its root, in the network namespace `netns`. `admit` is called with its pid before it
    /// does anything.
    pub fn start(rootfs: &Path, netns: BorrowedFd<'_>, admit: &dyn Fn(Pid) -> io::Result<()>) -> Result<Self, Error> {
        let enter = |reason: String| Error::Enter { rootfs: rootfs.to_owned(), reason };
        let (ours, theirs) = Channel::pair().map_err(Error::Spawn)?;
        let rootfs_arg = path_arg(rootfs).map_err(Error::Spawn)?;
        let process = Command {
            program: c"/proc/self/exe".into(),
            args: vec![c"vz-anchor".into(), c"anchor".into(), rootfs_arg],
            env: Vec::new(),
            fds: vec![(theirs.as_fd(), CHANNEL_FD), (netns, NETNS_FD)],
            namespaces: CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID,
            // Its channel tells.
            outlives_parent: true,
        }
        .spawn_with(Steps { parent: Some(admit), ..Steps::default() })
        .map_err(Error::Spawn)?;
        drop(theirs);
        let anchor = Self { process, channel: Some(ours) };
        // It answers within a few system calls, or its end of file does.
        match anchor.channel.as_ref().map(Channel::recv) {
            Some(Ok(Some(message))) if message.bytes == READY => Ok(anchor),
            Some(Ok(Some(message))) => Err(enter(String::from_utf8_lossy(&message.bytes).into_owned())),
            Some(Ok(None)) | None => Err(enter("it died".into())),
            Some(Err(e)) => Err(enter(e.to_string())),
        }
    }

    /// Its pid on the host.
    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw()
    }

    /// Something to hold: the process stays while it is open, if the shim has died.
    pub fn hold(&self) -> io::Result<OwnedFd> {
        match &self.channel {
            Some(channel) => channel.as_fd().try_clone_to_owned(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        drop(self.channel.take());
        if let Err(error) = self.process.kill(nix::sys::signal::Signal::SIGKILL).and_then(|()| self.process.wait()) {
            tracing::error!(%error, pid = self.pid(), "end anchor process");
        }
    }
}

fn path_arg(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// The process itself: `anchor ROOTFS`.
pub fn main(rootfs: &Path) -> ExitCode {
    let Ok(channel) = inherited_fd(CHANNEL_FD).map(Channel::from_fd) else { return ExitCode::FAILURE };
    let entered =
        inherited_fd(NETNS_FD).map_err(|e| ("find network namespace", e)).and_then(|netns| enter(rootfs, netns));
    let said = match entered {
        Ok(()) => channel.send(READY, &[]),
        Err((step, error)) => channel.send(format!("{step}: {error}").as_bytes(), &[]),
    };
    // Until nobody has the other end.
    match said.and_then(|()| channel.recv()) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn enter(rootfs: &Path, netns: OwnedFd) -> Result<(), (&'static str, io::Error)> {
    const NONE: Option<&str> = None;
    let step = |name: &'static str| move |e: Errno| (name, io::Error::from(e));
    nix::sys::prctl::set_name(c"vz-anchor").map_err(step("set name"))?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(step("enter network namespace"))?;
    mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).map_err(step("make mounts private"))?;
    // Everything but the root file system leaves this namespace, so that nothing else is kept busy by it.
    chdir(rootfs).map_err(step("enter"))?;
    pivot_root(".", ".").map_err(step("pivot root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach old root"))?;
    chdir("/").map_err(step("enter root"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    match mount(Some("proc"), "/proc", Some("proc"), flags, NONE) {
        // An image without the directory (the guest has its own), or one that is a link in it.
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        other => other.map_err(step("mount proc")),
    }
}
