//! Forks that run on in the same program: only for processes that have one thread.

use std::{io, os::fd::RawFd};

use nix::{
    errno::Errno,
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
    unistd::Pid,
};
use rustix::process::{WaitOptions, wait};

/// Which side of a fork the caller is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// In the process that called, which now has this child.
    Parent(Pid),
    /// In the child, where no signal is blocked.
    Child,
}

/// Forks. Fails with `InvalidInput` in a process that has more than one thread, where the child could deadlock.
///
/// A caller may block signals for a signalfd; the child starts without, as what it executes would inherit them.
pub fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "fork in a process with threads"));
    }
    // SAFETY: the process has one thread, so no lock can be held by one that the child does not have.
    #[allow(unsafe_code)]
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(Fork::Parent(child)),
        nix::unistd::ForkResult::Child => {
            // Fails for a bad argument only.
            let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
            Ok(Fork::Child)
        }
    }
}

/// Gives `SIGPIPE` its default action, for a process that is about to execute another program: Rust ignores it from the
/// start, and what is executed would inherit that.
pub fn default_sigpipe() {
    // SAFETY: sets a disposition, touches no memory.
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Has the kernel reap this process's children by itself.
pub fn reap_nobody() -> nix::Result<()> {
    // SAFETY: sets a disposition, touches no memory.
    #[allow(unsafe_code)]
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(Errno::last()) } else { Ok(()) }
}

/// Closes every descriptor from 3 on, except those in `keep`.
///
/// For a child of [`fork`] that never returns into its parent's frames: owners of the closed descriptors, which are in
/// those frames, must not be used or dropped any more.
pub fn close_other_fds(keep: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut from = 3;
    for fd in kept {
        if fd > from {
            close_range(from, fd - 1, 0)?;
        }
        from = fd.saturating_add(1);
    }
    close_range(from, u32::MAX, 0)
}

/// Closes descriptors, or marks them where `flags` is `CLOSE_RANGE_CLOEXEC`. One system call: a child may make it
/// before exec.
pub(crate) fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: plain numbers. Flags of descriptors change, or by the caller's contract nothing uses them any more.
    #[allow(unsafe_code)]
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends a signal by number, real-time ones included. 0 only asks whether the process exists.
pub fn kill(pid: Pid, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    #[allow(unsafe_code)]
    let done = unsafe { libc::kill(pid.as_raw(), signal) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// A child that has ended: its pid, and its exit code or 128 + the signal that killed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// What its pid was; it may be given to another process from now on.
    pub pid: Pid,
    /// Exit code, or 128 + signal.
    pub status: u32,
}

/// Reaps any one child that has ended; `None` where none has, or there are no children.
///
/// Unlike `nix::sys::wait` it knows real-time signals.
pub fn reap() -> io::Result<Option<Ended>> {
    loop {
        return match wait(WaitOptions::NOHANG) {
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
            Ok(Some((pid, status))) => {
                Ok(Some(Ended { pid: Pid::from_raw(pid.as_raw_pid()), status: code(status.as_raw()) }))
            }
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => Err(e.into()),
        };
    }
}

/// The exit status of a process that was killed (SIGKILL), as shells and containerd have it.
pub const KILLED: u32 = 128 + libc::SIGKILL.cast_unsigned();

fn code(status: libc::c_int) -> u32 {
    let code = if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    code.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        // The test harness runs tests on threads of their own.
        assert_eq!(fork().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_status_is_what_a_shell_says() {
        assert_eq!(code(0), 0);
        assert_eq!(code(7 << 8), 7);
        assert_eq!(code(9), 137);
        assert_eq!(code(9), KILLED);
        assert_eq!(code(libc::SIGSEGV | 0x80), 139);
        assert_eq!(code(64), 192);
    }

    #[test]
    fn kill_tells_whether_a_process_exists() {
        kill(Pid::this(), 0).unwrap();
        assert_eq!(kill(Pid::from_raw(i32::MAX), 0).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
