//! Processes by their identity: a pid, and the time at which it was started, which tells it from a later one.

use std::{fs, io, os::fd::AsFd, time::Instant};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use vz_sys::process::Handle;

/// Kills a process and waits until it is gone. A pid that belongs to another process by now is left alone, and so is
/// the caller itself.
pub fn kill(pid: i32, wanted: u64, deadline: Instant) -> io::Result<()> {
    if pid == nix::unistd::Pid::this().as_raw() {
        return Ok(());
    }
    let Some(handle) = hold(pid, wanted)? else { return Ok(()) };
    handle.kill(Signal::SIGKILL)?;
    match wait(&handle, deadline)? {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, "it has been killed and does not end")),
    }
}

/// Whether a process ends, or has ended, in time.
pub fn ends(pid: i32, wanted: u64, deadline: Instant) -> io::Result<bool> {
    hold(pid, wanted)?.map_or(Ok(true), |handle| wait(&handle, deadline))
}

/// Whether a process lives. One that has ended, and has only not been waited for, does not.
pub fn is_alive(pid: i32, wanted: u64) -> bool {
    stat(pid).is_ok_and(|(state, start_time)| state != 'Z' && state != 'X' && start_time == wanted)
}

/// Takes hold of the process with this pid and start time, unless it has ended.
pub fn hold(pid: i32, wanted: u64) -> io::Result<Option<Handle>> {
    let Some(handle) = Handle::open(pid)? else { return Ok(None) };
    match start_time(pid) {
        Ok(found) if found == wanted => Ok(Some(handle)),
        Ok(_) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a process ends in time.
pub fn wait(handle: &Handle, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// When a process was started, in clock ticks since boot.
pub fn start_time(pid: i32) -> io::Result<u64> {
    stat(pid).map(|(_, start_time)| start_time)
}

/// The state of a process, and when it was started: proc_pid_stat(5), fields 3 and 22.
fn stat(pid: i32) -> io::Result<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may contain anything, but it ends with the last parenthesis.
    let fields = || {
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        Some((fields.next()?.chars().next()?, fields.nth(18)?.parse().ok()?))
    };
    fields().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "malformed /proc/PID/stat"))
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use super::*;

    #[test]
    fn a_pid_that_was_reused_is_left_alone() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let soon = Instant::now() + Duration::from_secs(5);
        kill(pid, start_time(pid).unwrap() + 1, soon).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        kill(pid, 1, soon).unwrap();
    }
}
