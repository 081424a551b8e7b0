//! A child process that is waited for no longer than a deadline.
//!
//! A signal would do to leave a guest that loops. But a KVM that is to be distrusted may also kill the process that
//! uses it, or keep it in the kernel; then it had better be another one's.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill, raise},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, pipe2},
};
use vz_sys::{
    fork::{Fork, fork},
    process::Handle,
};

use crate::{Speed, Unusable};

/// How long a child that was killed may take to be gone, before it is left behind.
const FAREWELL: Duration = Duration::from_millis(200);

type Answer = Result<Speed, Unusable>;

/// Runs `f` in a child process and hands on what it found.
pub(crate) fn guarded(deadline: Duration, f: impl FnOnce() -> Answer) -> Answer {
    let system = |operation| move |errno| Unusable::failed(operation, errno);
    let end = Instant::now() + deadline;
    let (from, to) = pipe2(OFlag::O_CLOEXEC).map_err(system("make a pipe for the probe"))?;
    let forked = fork().map_err(|e| Unusable::Failed { operation: "fork the probe".into(), error: e.to_string() })?;
    match forked {
        Fork::Child => answer(to, f),
        Fork::Parent(pid) => {
            drop(to);
            let line = receive(from, end);
            // Nobody else waits for it, so its pid is its own until then.
            let _ = kill(pid, Signal::SIGKILL);
            let status = reap(pid);
            match line {
                Ok(Some(line)) => serde_json::from_slice(&line)
                    .unwrap_or_else(|e| Err(Unusable::Died { how: format!("it said nonsense: {e}") })),
                Ok(None) => Err(Unusable::Died { how: describe(status) }),
                Err(Errno::ETIMEDOUT) => {
                    Err(Unusable::Deadline { ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX) })
                }
                Err(errno) => Err(Unusable::failed("read the probe's answer", errno)),
            }
        }
    }
}

/// The child's side. It ends by a signal, so that nothing of its parent's (buffers, handlers, a panic's unwinding) runs
/// a second time in it.
fn answer(to: OwnedFd, f: impl FnOnce() -> Answer) -> ! {
    let work = || {
        prctl::set_pdeathsig(Signal::SIGKILL).ok()?;
        let mut line = serde_json::to_vec(&f()).ok()?;
        line.push(b'\n');
        File::from(to).write_all(&line).ok()
    };
    // What went wrong shows as no answer.
    drop(catch_unwind(AssertUnwindSafe(work)));
    loop {
        let _ = raise(Signal::SIGKILL);
    }
}

/// One line; `None` where the other end closed without.
fn receive(from: OwnedFd, end: Instant) -> Result<Option<Vec<u8>>, Errno> {
    let mut from = File::from(from);
    let mut line = Vec::new();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, so that the time is over when poll says so.
        let timeout = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(Errno::ETIMEDOUT),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
        }
        let mut bytes = [0; 1024];
        let count = from.read(&mut bytes).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or_default()))?;
        line.extend_from_slice(bytes.get(..count).unwrap_or_default());
        if line.last() == Some(&b'\n') {
            return Ok(Some(line));
        }
        if count == 0 {
            return Ok(None);
        }
    }
}

/// Waits for a killed child, if it can be killed.
fn reap(pid: Pid) -> Option<WaitStatus> {
    let handle = Handle::open(pid.as_raw()).ok().flatten()?;
    let timeout = PollTimeout::try_from(FAREWELL).unwrap_or(PollTimeout::MAX);
    while poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout) == Err(Errno::EINTR) {}
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => {
            tracing::warn!(pid = pid.as_raw(), "the process that tried KVM cannot be killed");
            None
        }
        status => status.ok(),
    }
}

fn describe(status: Option<WaitStatus>) -> String {
    match status {
        Some(WaitStatus::Signaled(_, signal, _)) => format!("ended by {signal} without an answer"),
        Some(status) => format!("{status:?}"),
        None => "without an answer".into(),
    }
}
