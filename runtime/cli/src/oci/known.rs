//! Processes, by pid and the time when they were started: a pid alone comes to mean another process one day.

use std::{io, os::fd::AsFd, path::Path};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use serde::{Deserialize, Serialize};
use vz_sys::process::Handle;

use crate::sandboxes::started;

/// How long a killed process may take to end, in milliseconds.
const KILL_DEADLINE: u16 = 10_000;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Its pid.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub start: u64,
}

impl Known {
    /// The calling process.
    pub fn this() -> io::Result<Self> {
        let pid = nix::unistd::Pid::this().as_raw();
        Ok(Self { pid, start: started(Path::new("/proc"), pid).ok_or(io::ErrorKind::NotFound)? })
    }

    /// Whether it lives.
    pub fn lives(self) -> bool {
        started(Path::new("/proc"), self.pid) == Some(self.start)
    }

    /// Kills it, and waits until it has ended.
    pub fn end(self) -> io::Result<()> {
        let Some(handle) = Handle::open(self.pid)? else { return Ok(()) };
        // The pid is held now: this is the same process for good, or another one.
        if !self.lives() {
            return Ok(());
        }
        handle.kill(Signal::SIGKILL)?;
        match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], PollTimeout::from(KILL_DEADLINE))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_that_was_reused_is_left_alone() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let known = Known { pid, start: started(Path::new("/proc"), pid).unwrap() };
        assert!(known.lives());
        Known { start: known.start + 1, ..known }.end().unwrap();
        assert!(child.try_wait().unwrap().is_none());
        known.end().unwrap();
        child.wait().unwrap();
        known.end().unwrap();
        assert!(!known.lives());
    }
}
