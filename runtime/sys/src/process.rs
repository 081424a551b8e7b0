//! Programs started straight into new namespaces, tied to the life of their parent.

use std::{
    ffi::{CString, c_char, c_int},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

use nix::{
    fcntl::OFlag,
    sched::CloneFlags,
    sys::{
        signal::Signal,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{Pid, pipe2},
};

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
        // SAFETY: pidfd_open takes no pointers.
        #[allow(unsafe_code)]
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
                e => Err(e),
            };
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made this descriptor for us.
        #[allow(unsafe_code)]
        Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Sends a signal; a process that has ended already is no error.
    pub fn kill(&self, signal: Signal) -> io::Result<()> {
        send(self.0.as_fd(), signal)
    }
}

impl AsFd for Handle {
    /// The pidfd: readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn send(pidfd: BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    // SAFETY: the pidfd is open for as long as it is borrowed; a null siginfo is what kill(2) would send.
    #[allow(unsafe_code)]
    let done =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal as c_int, ptr::null::<()>(), 0) };
    match done {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        },
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
                Err(nix::errno::Errno::EINTR) => {}
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
    pub fn spawn(&self) -> io::Result<Process> {
        let args = pointers(&self.args);
        let env = pointers(&self.env);
        let (report, report_to) = pipe2(OFlag::O_CLOEXEC)?;
        // Numbers above every target, so that no dup2 below overwrites one that is still needed.
        let floor = self.fds.iter().map(|(_, target)| *target).max().unwrap_or(0).max(2) + 1;
        let mut moved = Vec::with_capacity(self.fds.len());
        for (fd, target) in &self.fds {
            moved.push((duplicate(*fd, floor)?, *target));
        }
        let failed = duplicate(report_to.as_fd(), floor)?;
        // The read below ends when the child's copy is gone: keep none.
        drop(report_to);
        let parent = Pid::this();

        let mut pidfd: c_int = -1;
        // SAFETY: clone_args is plain data; all zero is its empty value.
        #[allow(unsafe_code)]
        let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
        clone.flags = u64::from(self.namespaces.bits().cast_unsigned()) | libc::CLONE_PIDFD.cast_unsigned() as u64;
        clone.pidfd = (&raw mut pidfd) as u64;
        clone.exit_signal = libc::SIGCHLD.cast_unsigned().into();
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
                become_program(self, &args, &env, &moved, failed.as_raw_fd(), parent)
            }
        }
        drop(failed);
        // SAFETY: the kernel stored a new descriptor there, since clone3 succeeded with CLONE_PIDFD.
        #[allow(unsafe_code)]
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let process = Process { pid: Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?), pidfd };
        let mut errno = [0u8; 4];
        loop {
            return match nix::unistd::read(&report, &mut errno) {
                Ok(0) => Ok(process),
                Ok(_) => {
                    process.wait()?;
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                }
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }
}

/// The child's side: descriptors, signals, exec. Reports errno through `failed` and exits where it cannot.
///
/// # Safety
/// Only in a child that was just forked. Pointers in `args` and `env` are NUL-terminated strings, null last.
#[allow(unsafe_code)]
unsafe fn become_program(
    command: &Command<'_>,
    args: &[*const c_char],
    env: &[*const c_char],
    fds: &[(OwnedFd, RawFd)],
    failed: RawFd,
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
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            // Whoever started the parent may have left it descriptors that survive exec.
            if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
                break 'failed;
            }
            for (fd, target) in fds {
                if libc::dup2(fd.as_raw_fd(), *target) < 0 {
                    break 'failed;
                }
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

fn duplicate(fd: BorrowedFd<'_>, floor: RawFd) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    let raw = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(floor))?;
    // SAFETY: fcntl has just made this descriptor for us.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
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
