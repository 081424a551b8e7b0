//! A container's process on the host: the pid that every reply names.
//!
//! Clients dereference a task's pid (`/proc/PID/ns/net`, `/proc/PID/root`), so each container has this process, in its
//! network namespace and with its root file system as root. It does nothing but wait for its end. Its pid namespace is
//! its own, and so is what it has at /proc: whoever lists the container's processes there finds one.
//!
//! It ends when nobody holds the other end of its channel any more. The shim does, and so do the hooks that it runs:
//! one that connects the container must find the network namespace there to its end, even if the shim is killed
//! meanwhile, for no plugin takes back what it has done by halves. What is still there then is in the journal.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns},
    sys::signal::Signal,
    unistd::{Pid, chdir, fchdir, pivot_root},
};
use tokio::{io::unix::AsyncFd, runtime::Handle, task::JoinHandle};
use vz_sys::{
    channel::Channel,
    mount as sys,
    process::{Command, Process, Steps, inherited_fd},
};

/// Descriptor of its channel to the shim.
const CHANNEL_FD: i32 = 3;
/// Descriptor of the network namespace that it enters.
const NETNS_FD: i32 = 4;
/// Descriptor of the detached mounts that become its root.
const ROOTFS_FD: i32 = 5;
/// How long it may take to be ready: a few system calls, of which those on the root file system may be held up.
const READY_DEADLINE: Duration = Duration::from_secs(10);
const READY: &[u8] = b"ready";

/// How long a killed anchor is waited for.
const END_DEADLINE: Duration = Duration::from_secs(1);

/// Why there is no anchor.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("start anchor process")]
    Spawn(#[source] io::Error),
    /// It could not enter the root file system.
    #[error("anchor process in the root file system of container {id}: {reason}")]
    Enter {
        /// The container.
        id: String,
        /// What it said.
        reason: String,
    },
}

/// A running anchor; dropping it ends the process.
#[derive(Debug)]
pub struct Anchor {
    pid: i32,
    process: Option<Process>,
    channel: Option<Channel>,
}

impl Anchor {
    /// Starts the one of container `id`, with the detached mounts `rootfs` as its root, in the network namespace
    /// `netns`. `admit` is called with its pid before it does anything.
    pub async fn start(
        id: &str,
        rootfs: OwnedFd,
        netns: BorrowedFd<'_>,
        admit: &(dyn Fn(Pid) -> io::Result<()> + Sync),
    ) -> Result<Self, Error> {
        let enter = |reason: String| Error::Enter { id: id.to_owned(), reason };
        let (ours, theirs) = Channel::pair().map_err(Error::Spawn)?;
        ours.set_nonblocking(true).map_err(Error::Spawn)?;
        let name = CString::new(id).map_err(|e| Error::Spawn(e.into()))?;
        let process = Command {
            program: c"/proc/self/exe".into(),
            // The name is for people who look at the list of processes.
            args: vec![c"vz-anchor".into(), c"anchor".into(), name],
            env: Vec::new(),
            fds: vec![(theirs.as_fd(), CHANNEL_FD), (netns, NETNS_FD), (rootfs.as_fd(), ROOTFS_FD)],
            namespaces: CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID,
            // Its channel tells.
            outlives_parent: true,
        }
        .spawn_with(Steps { parent: Some(admit), ..Steps::default() })
        .map_err(Error::Spawn)?;
        drop((theirs, rootfs));
        let mut anchor = Self { pid: process.pid().as_raw(), process: Some(process), channel: None };
        let ours = crate::fd::watch(ours).map_err(Error::Spawn)?;
        let said = tokio::time::timeout(READY_DEADLINE, receive(&ours)).await;
        anchor.channel = Some(ours.into_inner());
        match said {
            Ok(Ok(Some(message))) if message == READY => Ok(anchor),
            Ok(Ok(Some(message))) => Err(enter(String::from_utf8_lossy(&message).into_owned())),
            Ok(Ok(None)) => Err(enter("it died".into())),
            Ok(Err(e)) => Err(enter(e.to_string())),
            Err(_) => Err(enter(format!("not ready after {} s", READY_DEADLINE.as_secs()))),
        }
    }

    /// Its pid on the host.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Something to hold: the process stays while it is open, if the shim has died.
    pub fn hold(&self) -> io::Result<OwnedFd> {
        match &self.channel {
            Some(channel) => channel.as_fd().try_clone_to_owned(),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Anchor {
    /// Ends the process, and waits a moment until it is gone. One that a file system holds up is reaped whenever it
    /// dies.
    pub async fn end(mut self) {
        if let Some(reaping) = self.kill() {
            drop(tokio::time::timeout(END_DEADLINE, reaping).await);
        }
    }

    /// Kills the process, once, and has it reaped.
    fn kill(&mut self) -> Option<JoinHandle<()>> {
        drop(self.channel.take());
        let (process, pid) = (self.process.take()?, self.pid);
        let failed = move |error: io::Error| tracing::error!(%error, pid, "end anchor process");
        if let Err(error) = process.kill(Signal::SIGKILL) {
            failed(error);
        }
        let reap = async move {
            let ended = async {
                let process = crate::fd::watch(process)?;
                process.readable().await?.retain_ready();
                process.get_ref().wait()
            };
            ended.await.map(drop).unwrap_or_else(failed);
        };
        // Without a runtime the shim is about to end, and init reaps.
        Some(Handle::try_current().ok()?.spawn(reap))
    }
}

impl Drop for Anchor {
    fn drop(&mut self) {
        drop(self.kill());
    }
}

async fn receive(channel: &AsyncFd<Channel>) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut ready = channel.readable().await?;
        if let Ok(received) = ready.try_io(|channel| channel.get_ref().recv()) {
            return Ok(received?.map(|message| message.bytes));
        }
    }
}

/// The process itself: `anchor NAME`.
pub fn main() -> ExitCode {
    let Ok(channel) = inherited_fd(CHANNEL_FD).map(Channel::from_fd) else { return ExitCode::FAILURE };
    let entered = inherited_fd(NETNS_FD)
        .and_then(|netns| Ok((netns, inherited_fd(ROOTFS_FD)?)))
        .map_err(|e| ("find what it is to enter", e))
        .and_then(|(netns, rootfs)| enter(&rootfs, netns));
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

/// Makes the detached mounts `rootfs` this process's root, and leaves every other mount behind: none is kept busy by
/// it.
fn enter(rootfs: &OwnedFd, netns: OwnedFd) -> Result<(), (&'static str, io::Error)> {
    const NONE: Option<&str> = None;
    let step = |name: &'static str| move |e: Errno| (name, io::Error::from(e));
    nix::sys::prctl::set_name(c"vz-anchor").map_err(step("set name"))?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(step("enter network namespace"))?;
    mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).map_err(step("make mounts private"))?;
    // Over the old root, which nothing in the image can name.
    sys::attach(rootfs.as_fd(), Path::new("/")).map_err(|e| ("attach root file system", e))?;
    fchdir(rootfs).map_err(step("enter root file system"))?;
    pivot_root(".", ".").map_err(step("pivot root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach old root"))?;
    chdir("/").map_err(step("enter root"))?;
    let place = sys::open_beneath(rootfs.as_fd(), Path::new("proc"), OFlag::O_PATH | OFlag::O_DIRECTORY);
    let place = match place {
        Ok(place) => place,
        // An image without the directory (the guest has its own), or one that is a link in it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => return Ok(()),
        Err(e) => return Err(("open proc", e)),
    };
    let proc = sys::proc().map_err(|e| ("make proc", e))?;
    sys::attach_at(proc.as_fd(), place.as_fd()).map_err(|e| ("mount proc", e))
}
