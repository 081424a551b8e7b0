//! Which process a pid means: the number alone comes to mean another process one day.

use std::{fs, io, path::Path, time::Instant};

use nix::{sys::signal::Signal, unistd::Pid};

use super::Handle;

/// A process, by its pid and the time of its start, which tells it from a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Its pid.
    pub pid: i32,
    /// [`Stat::start_time`].
    pub start_time: u64,
}

/// What /proc/PID/stat says of a process: proc_pid_stat(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Field 3: R, S, D, Z and so on.
    pub state: char,
    /// Field 22: when it was started, in clock ticks since boot.
    pub start_time: u64,
}

impl Stat {
    /// Reads that of a process.
    pub fn of(pid: i32) -> io::Result<Self> {
        Self::below(Path::new("/proc"), pid)
    }

    /// The same, with procfs mounted elsewhere.
    pub fn below(proc: &Path, pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(proc.join(pid.to_string()).join("stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat"))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name, field 2, may contain anything, but it ends with the last parenthesis.
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        Some(Self { state: fields.next()?.chars().next()?, start_time: fields.nth(18)?.parse().ok()? })
    }

    /// Whether the process has ended, and has only not been waited for.
    pub fn has_ended(self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

impl Identity {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start_time: Stat::of(pid)?.start_time })
    }

    /// The calling process.
    pub fn this() -> io::Result<Self> {
        Self::of(Pid::this().as_raw())
    }

    /// Whether it lives: one that has ended and has not been waited for does not.
    pub fn is_alive(self) -> bool {
        self.is_alive_below(Path::new("/proc"))
    }

    /// The same, with procfs mounted elsewhere.
    pub fn is_alive_below(self, proc: &Path) -> bool {
        Stat::below(proc, self.pid).is_ok_and(|stat| !stat.has_ended() && stat.start_time == self.start_time)
    }

    /// Takes hold of it; `None` where it is gone, or its pid is another's.
    pub fn hold(self) -> io::Result<Option<Handle>> {
        let Some(handle) = Handle::open(self.pid)? else { return Ok(None) };
        // The pid is held now: it means this process for good, or another one.
        match Stat::of(self.pid) {
            Ok(stat) if stat.start_time == self.start_time => Ok(Some(handle)),
            Ok(_) => Ok(None),
            // It was waited for since: before the file was opened, or before it was read.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Kills it and waits until it has ended; whether it has by the deadline. One that is gone is no error.
    pub fn kill(self, deadline: Instant) -> io::Result<bool> {
        let Some(handle) = self.hold()? else { return Ok(true) };
        handle.kill(Signal::SIGKILL)?;
        handle.ends(deadline)
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_name_may_contain_anything() {
        let text = format!("7 (a) b) S {}42 0\n", "0 ".repeat(18));
        assert_eq!(Stat::parse(&text), Some(Stat { state: 'S', start_time: 42 }));
        for wrong in ["", "7 (a", "7 (a)", "7 (a) S 1 2 3", &text.replace("42", "-1")] {
            assert_eq!(Stat::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_pid_that_was_reused_is_left_alone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let known = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(known.is_alive());
        let other = Identity { start_time: known.start_time + 1, ..known };
        assert!(!other.is_alive() && other.hold().unwrap().is_none());
        assert!(other.kill(soon()).unwrap());
        assert!(child.try_wait().unwrap().is_none());
        assert!(known.kill(soon()).unwrap());
        child.wait().unwrap();
        assert!(known.kill(soon()).unwrap());
        assert!(!known.is_alive() && known.hold().unwrap().is_none());
    }

    #[test]
    fn a_process_that_was_not_waited_for_is_held_and_does_not_live() {
        let mut child = Command::new("true").spawn().unwrap();
        let known = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let held = known.hold().unwrap().unwrap();
        assert!(held.ends(soon()).unwrap());
        assert!(Stat::of(known.pid).unwrap().has_ended() && !known.is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_runs_on_is_waited_for_until_the_deadline() {
        let this = Identity::this().unwrap();
        assert!(this.is_alive());
        assert!(!this.hold().unwrap().unwrap().ends(Instant::now() + Duration::from_millis(10)).unwrap());
    }
}
