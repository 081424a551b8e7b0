//! Programs started straight into new namespaces, tied to the life of their parent.

use std::{
    ffi::{CString, c_char, c_int},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::CloneFlags,
    sys::{
        signal::Signal,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{Pid, pipe2},
};
use rustix::{
    io::fcntl_dupfd_cloexec,
    process::{PidfdFlags, Resource, Rlimit, pidfd_open, pidfd_send_signal, prlimit},
};

use crate::{fork::close_range, surroundings::Surroundings};

mod identity;

pub use identity::{Identity, Stat};

/// What to start, and how.
#[derive(Debug)]
pub struct Command<'a> {
    /// Path of the program.
    pub program: CString,
    /// Its arguments, its own name first.
    pub args: Vec<CString>,
    /// Its whole environment, `NAME=value` each.
    pub env: Vec<CString>,
    /// Descriptors that it gets, and under which number; everything else is closed on exec.
    pub fds: Vec<(BorrowedFd<'a>, RawFd)>,
    /// Namespaces that it starts in, made anew.
    pub namespaces: CloneFlags,
    /// Whether it goes on when its parent dies, instead of being killed.
    pub outlives_parent: bool,
}

/// Raises the limits of open files of a process; where the system allows no more than there is, that must do.
pub fn raise_open_files(pid: Pid, wanted: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: wanted, rlim_max: wanted };
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both structures live for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe {
        match libc::prlimit(pid.as_raw(), libc::RLIMIT_NOFILE, ptr::null(), &raw mut old) {
            0 if old.rlim_max < wanted => {
                libc::prlimit(pid.as_raw(), libc::RLIMIT_NOFILE, &raw const limit, ptr::null_mut())
            }
            other => other,
        }
    };
    match Errno::result(done) {
        Ok(_) | Err(Errno::EPERM) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Sets the limit of a process's core dumps, in bytes; where the system does not allow that, what there is must do.
pub fn limit_core(pid: Pid, bytes: u64) -> io::Result<()> {
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    match prlimit(rustix::process::Pid::from_raw(pid.as_raw()), Resource::Core, limit) {
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Sets how likely the kernel is to end a process for want of memory: oom_score_adj of proc_pid_oom_score_adj(5), from
/// -1000 (never) to 1000.
pub fn set_oom_score(pid: Pid, score: i32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

/// The calling process's oom_score_adj.
pub fn own_oom_score() -> io::Result<i32> {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj")?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, text))
}

/// What happens between a process's start and its program.
#[derive(Default, Clone, Copy)]
pub struct Steps<'a> {
    /// In the parent, with the process's pid, while the process waits: it can be put somewhere before it does anything.
    pub parent: Option<&'a dyn Fn(Pid) -> io::Result<()>>,
    /// In the process itself: the surroundings that it goes back to, which this process has left.
    pub surroundings: Option<&'a Surroundings>,
    /// In the process itself, with its descriptors in place; what fails is told by name. The parent must have one
    /// thread.
    pub child: Option<&'a dyn Fn() -> Result<(), Failed>>,
}

impl std::fmt::Debug for Steps<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut steps = f.debug_struct("Steps");
        steps.field("parent", &self.parent.is_some()).field("surroundings", &self.surroundings);
        steps.field("child", &self.child.is_some()).finish()
    }
}

/// A step that failed: which, and why.
pub type Failed = (&'static str, io::Error);

/// A started process. Dropping it neither kills nor reaps.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

/// A process that somebody else started, held so that its pid cannot come to mean another one.
#[derive(Debug)]
pub struct Handle(OwnedFd);

impl Handle {
    /// Takes hold of a process; `None` where there is none with this pid.
    pub fn open(pid: i32) -> io::Result<Option<Self>> {
        let pid = Some(pid).filter(|pid| *pid > 0).and_then(rustix::process::Pid::from_raw).ok_or(Errno::EINVAL)?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self(fd))),
            // EINVAL is what a number that only a process group, a session or a thread still has means to kernels
            // before 6.15.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends a signal; a process that has ended already is no error.
    pub fn kill(&self, signal: Signal) -> io::Result<()> {
        send(self.0.as_fd(), signal)
    }

    /// Waits until it has ended; whether it has by the deadline.
    pub fn ends(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Handle {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn send(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    let signal = rustix::process::Signal::from_named_raw(signal as c_int).ok_or(Errno::EINVAL)?;
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

impl Process {
    /// Its pid in the caller's pid namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal; a process that has ended already is no error.
    pub fn kill(&self, signal: Signal) -> io::Result<()> {
        send(self.pidfd.as_fd(), signal)
    }

    /// Waits until it has ended and reaps it.
    pub fn wait(&self) -> io::Result<WaitStatus> {
        loop {
            match waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED) {
                Err(Errno::EINTR) => {}
                status => return Ok(status?),
            }
        }
    }

    /// Reaps it where it has ended; [`WaitStatus::StillAlive`] where not.
    pub fn try_wait(&self) -> io::Result<WaitStatus> {
        Ok(waitid(Id::PIDFd(self.pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)?)
    }
}

impl AsFd for Process {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.pidfd.as_raw_fd()
    }
}

impl Command<'_> {
    /// Starts the program. Unless it outlives its parent, it is killed when the *thread* that calls this ends, so call
    /// this from one that stays.
    ///
    /// An error of exec itself comes back here, and no process is left then.
    ///
    /// In a new user namespace every user is who they are in the caller's.
    pub fn spawn(&self) -> io::Result<Process> {
        self.spawn_with(Steps::default())
    }

    /// The same, with more steps on the way.
    pub fn spawn_with(&self, steps: Steps<'_>) -> io::Result<Process> {
        if steps.child.is_some() && std::fs::read_dir("/proc/self/task")?.count() != 1 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "fork in a process with threads"));
        }
        let args = pointers(&self.args);
        let env = pointers(&self.env);
        let (report, report_to) = pipe2(OFlag::O_CLOEXEC)?;
        // Numbers above every target, so that no dup2 below overwrites one that is still needed.
        let floor = self.fds.iter().map(|(_, target)| *target).max().unwrap_or(0).max(2) + 1;
        let mut moved = Vec::with_capacity(self.fds.len());
        for (fd, target) in &self.fds {
            moved.push((fcntl_dupfd_cloexec(fd, floor)?, *target));
        }
        let failed = fcntl_dupfd_cloexec(&report_to, floor)?;
        // The read below ends when the child's copy is gone: keep none.
        drop(report_to);
        let (low, low_to) = pipe2(OFlag::O_CLOEXEC)?;
        let proceed = fcntl_dupfd_cloexec(&low, floor)?;
        let proceed_to = fcntl_dupfd_cloexec(&low_to, floor)?;
        drop((low, low_to));
        let parent = Pid::this();

        let mut pidfd: c_int = -1;
        let clone = libc::clone_args {
            flags: u64::from(self.namespaces.bits().cast_unsigned()) | libc::CLONE_PIDFD.cast_unsigned() as u64,
            pidfd: (&raw mut pidfd) as u64,
            child_tid: 0,
            parent_tid: 0,
            exit_signal: libc::SIGCHLD.cast_unsigned().into(),
            stack: 0,
            stack_size: 0,
            tls: 0,
            set_tid: 0,
            set_tid_size: 0,
            cgroup: 0,
        };
        // SAFETY: without CLONE_VM this is fork: the child has its own copy of everything prepared above, and up to
        // exec it makes system calls only (no allocation, no locks), which a child of a threaded process may.
        #[allow(unsafe_code)]
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const clone, size_of::<libc::clone_args>()) };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            // SAFETY: as above; never returns.
            #[allow(unsafe_code)]
            unsafe {
                libc::close(proceed_to.as_raw_fd());
                become_program(self, steps, &args, &env, &moved, (proceed.as_raw_fd(), failed.as_raw_fd()), parent)
            }
        }
        drop(failed);
        // SAFETY: the kernel stored a new descriptor there, since clone3 succeeded with CLONE_PIDFD.
        #[allow(unsafe_code)]
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let process = Process { pid: Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?), pidfd };
        drop(proceed);
        if let Err(e) = self.admit(process.pid, steps) {
            process.kill(Signal::SIGKILL)?;
            process.wait()?;
            return Err(e);
        }
        match nix::unistd::write(&proceed_to, &[1]) {
            // The child has ended already; the report says why.
            Ok(_) | Err(Errno::EPIPE) => {}
            Err(e) => return Err(e.into()),
        }
        let mut said = [0u8; REPORT];
        loop {
            return match nix::unistd::read(&report, &mut said) {
                Ok(0) => Ok(process),
                Ok(len) => {
                    process.wait()?;
                    Err(failure(&said[..len]))
                }
                Err(Errno::EINTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }

    /// The parent's side, while the child waits.
    fn admit(&self, pid: Pid, steps: Steps<'_>) -> io::Result<()> {
        if self.namespaces.contains(CloneFlags::CLONE_NEWUSER) {
            for map in ["uid_map", "gid_map"] {
                // Everybody that there is here, as themselves.
                let ours = std::fs::read_to_string(format!("/proc/self/{map}"))?;
                let lines = ours.lines().filter_map(|line| {
                    let mut fields = line.split_whitespace();
                    let (first, _, count) = (fields.next()?, fields.next()?, fields.next()?);
                    Some(format!("{first} {first} {count}\n"))
                });
                // In one write, as the kernel wants it.
                std::fs::write(format!("/proc/{pid}/{map}"), lines.collect::<String>())?;
            }
        }
        steps.parent.map_or(Ok(()), |step| step(pid))
    }
}

/// Bytes of a child's report: errno, and the name of the step that failed.
const REPORT: usize = 128;

fn failure(report: &[u8]) -> io::Error {
    let Some((errno, step)) = report.split_first_chunk() else { return io::ErrorKind::UnexpectedEof.into() };
    let error = io::Error::from_raw_os_error(i32::from_ne_bytes(*errno));
    if step.is_empty() {
        error
    } else {
        io::Error::new(error.kind(), format!("{}: {error}", String::from_utf8_lossy(step)))
    }
}

/// The child's side: descriptors, signals, exec. Waits for a byte from `proceed` first; reports errno through `failed`
/// and exits where it cannot.
///
/// # Safety
/// Only in a child that was just forked, of a process with one thread where there is a step. Pointers in `args` and
/// `env` are NUL-terminated strings, null last.
#[allow(unsafe_code)]
unsafe fn become_program(
    command: &Command<'_>,
    steps: Steps<'_>,
    args: &[*const c_char],
    env: &[*const c_char],
    fds: &[(OwnedFd, RawFd)],
    (proceed, failed): (RawFd, RawFd),
    parent: Pid,
) -> ! {
    // SAFETY: system calls on descriptors and strings that the caller owns.
    unsafe {
        'failed: {
            if !command.outlives_parent {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                    break 'failed;
                }
                // The parent may have died before the prctl. In a new pid namespace it is invisible (0) either way,
                // and there the control channel's end of file tells.
                let visible = !command.namespaces.contains(CloneFlags::CLONE_NEWPID);
                if visible && libc::getppid() != parent.as_raw() {
                    libc::_exit(0);
                }
            }
            let mut byte = 0u8;
            loop {
                match libc::read(proceed, (&raw mut byte).cast(), 1) {
                    1 => break,
                    -1 if *libc::__errno_location() == libc::EINTR => {}
                    // The parent is gone, or does not want it.
                    _ => libc::_exit(0),
                }
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            // Whoever started the parent may have left it descriptors that survive exec.
            if close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC).is_err() {
                break 'failed;
            }
            for (fd, target) in fds {
                if libc::dup2(fd.as_raw_fd(), *target) < 0 {
                    break 'failed;
                }
            }
            let surrounded = steps.surroundings.map_or(Ok(()), |surroundings| surroundings.enter(None));
            if let Err((name, error)) = surrounded.and_then(|()| steps.child.map_or(Ok(()), |step| step())) {
                let mut report = [0u8; REPORT];
                report[..4].copy_from_slice(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
                let len = name.len().min(REPORT - 4);
                report[4..4 + len].copy_from_slice(&name.as_bytes()[..len]);
                libc::write(failed, report.as_ptr().cast(), 4 + len);
                libc::_exit(127);
            }
            libc::execve(command.program.as_ptr(), args.as_ptr(), env.as_ptr());
        }
        let errno = (*libc::__errno_location()).to_ne_bytes();
        libc::write(failed, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Takes over a descriptor that the parent process left under a fixed number, and makes it close-on-exec.
///
/// Fails where nothing is open there. Call it once for each number, at the start of `main`.
pub fn inherited_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD and F_SETFD take no pointers; the kernel checks the number.
    #[allow(unsafe_code)]
    let done = unsafe {
        match libc::fcntl(number, libc::F_GETFD) {
            -1 => -1,
            flags => libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC),
        }
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the caller's contract nothing else in this process owns it.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;

    fn shell<'a>(script: &str, fds: Vec<(BorrowedFd<'a>, RawFd)>) -> Command<'a> {
        Command {
            program: c"/bin/sh".into(),
            args: vec![c"sh".into(), c"-c".into(), CString::new(script).unwrap()],
            env: vec![c"A=b".into()],
            fds,
            namespaces: CloneFlags::empty(),
            outlives_parent: false,
        }
    }

    #[test]
    fn a_pid_that_only_its_group_still_has_is_no_process() {
        use std::os::unix::process::CommandExt;
        let mut command = std::process::Command::new("sh");
        // The second one stays in the group after the first one's end.
        command.args(["-c", "sleep 1000 >&- 2>&- & echo $!"]).process_group(0).stdout(std::process::Stdio::piped());
        let leader = command.spawn().unwrap();
        let pid = i32::try_from(leader.id()).unwrap();
        let output = leader.wait_with_output().unwrap();
        let left: i32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
        let held = Handle::open(left).unwrap().unwrap();
        assert!(Handle::open(pid).unwrap().is_none());
        held.kill(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_program_gets_its_descriptors_and_environment_only() {
        let (from, to) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let process = shell("echo $A $HOME >&7", vec![(to.as_fd(), 7)]).spawn().unwrap();
        drop(to);
        let mut said = String::new();
        File::from(from).read_to_string(&mut said).unwrap();
        assert_eq!(said, "b\n");
        assert_eq!(process.wait().unwrap(), WaitStatus::Exited(process.pid(), 0));
    }

    #[test]
    fn a_program_gets_no_descriptor_that_the_parent_was_left() {
        let left = nix::unistd::dup(File::open("/dev/null").unwrap()).unwrap();
        let process = shell(&format!("[ ! -e /proc/self/fd/{} ]", left.as_raw_fd()), Vec::new()).spawn().unwrap();
        assert_eq!(process.wait().unwrap(), WaitStatus::Exited(process.pid(), 0));
    }

    #[test]
    fn descriptors_that_swap_places_arrive_where_they_should() {
        let (from_a, a) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (from_b, b) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (na, nb) = (a.as_raw_fd(), b.as_raw_fd());
        // By path: a POSIX shell need not take `>&` with more than one digit.
        let script = format!("printf a >/proc/self/fd/{nb}; printf b >/proc/self/fd/{na}");
        let process = shell(&script, vec![(a.as_fd(), nb), (b.as_fd(), na)]);
        let process = process.spawn().unwrap();
        drop((a, b));
        for (from, wanted) in [(from_a, "a"), (from_b, "b")] {
            let mut said = String::new();
            File::from(from).read_to_string(&mut said).unwrap();
            assert_eq!(said, wanted);
        }
        process.wait().unwrap();
    }

    #[test]
    fn a_program_in_a_user_namespace_of_its_own_is_who_it_was() {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let (from, to) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut command =
            shell("read _ _ n </proc/self/uid_map; echo $(id -u) $n; grep CapEff /proc/self/status", Vec::new());
        command.fds = vec![(to.as_fd(), 1)];
        command.namespaces = CloneFlags::CLONE_NEWUSER;
        let pid = std::cell::Cell::new(None);
        let process = command
            .spawn_with(Steps {
                parent: Some(&|of| {
                    pid.set(Some(of));
                    Ok(())
                }),
                ..Steps::default()
            })
            .unwrap();
        drop(command);
        drop(to);
        assert_eq!(pid.get(), Some(process.pid()));
        let mut said = String::new();
        File::from(from).read_to_string(&mut said).unwrap();
        let ours = std::fs::read_to_string("/proc/self/uid_map").unwrap();
        let count = ours.split_whitespace().nth(2).unwrap();
        assert!(said.starts_with(&format!("0 {count}\nCapEff:")), "{said}");
        assert!(!said.contains("0000000000000000"), "{said}");
        process.wait().unwrap();
    }

    #[test]
    fn a_parent_that_says_no_leaves_no_process() {
        let pid = std::cell::Cell::new(None);
        let no = |of| {
            pid.set(Some(of));
            Err(io::Error::other("no"))
        };
        let error = shell("exec sleep 1000", Vec::new())
            .spawn_with(Steps { parent: Some(&no), ..Steps::default() })
            .unwrap_err();
        assert_eq!(error.to_string(), "no");
        assert!(Handle::open(pid.get().unwrap().as_raw()).unwrap().is_none());
    }

    #[test]
    fn a_step_that_fails_is_named() {
        let mut report = libc::EPERM.to_ne_bytes().to_vec();
        report.extend(b"change root");
        assert_eq!(failure(&report).to_string(), "change root: Operation not permitted (os error 1)");
        assert_eq!(failure(&report).kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(failure(&report[..4]).raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let mut command = shell("", Vec::new());
        command.program = c"/nowhere/to/be/found".into();
        assert_eq!(command.spawn().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn kill_ends_it_and_is_no_error_afterwards() {
        let process = shell("exec sleep 1000", Vec::new()).spawn().unwrap();
        assert_eq!(process.try_wait().unwrap(), WaitStatus::StillAlive);
        process.kill(Signal::SIGKILL).unwrap();
        assert_eq!(process.wait().unwrap(), WaitStatus::Signaled(process.pid(), Signal::SIGKILL, false));
        process.kill(Signal::SIGKILL).unwrap();
    }
}
