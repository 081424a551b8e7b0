//! What a program of the host's owner finds when this process has left it: the mounts, the working directory and the
//! limit of open files that the process was started with.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt, process::CommandExt},
    },
    path::Path,
    process::Command,
    sync::Arc,
};

use rustix::{
    process::{Resource, Rlimit, chdir, fchdir, getrlimit, setrlimit},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{fork::close_range, process::Failed};

/// The surroundings of a process at one moment, held by descriptor.
///
/// Holding them keeps the mount namespace, and in it nothing busy but the directory.
#[derive(Debug)]
pub struct Surroundings {
    mounts: OwnedFd,
    directory: OwnedFd,
    open_files: Rlimit,
}

impl Surroundings {
    /// Those of the calling thread. Take them before it changes any.
    pub fn current() -> io::Result<Self> {
        let directory =
            File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC).open(".")?;
        Ok(Self {
            mounts: File::open("/proc/thread-self/ns/mnt")?.into(),
            directory: directory.into(),
            open_files: getrlimit(Resource::Nofile),
        })
    }

    /// Has a command start in these surroundings, in the directory at this path of their mounts.
    ///
    /// Descriptors that are open without being meant for it are closed. Those that are must be added to the command
    /// after this call. Takes `CAP_SYS_ADMIN` and `CAP_SYS_CHROOT`.
    pub fn surround(self: &Arc<Self>, command: &mut Command, directory: &Path) -> io::Result<()> {
        let surroundings = Arc::clone(self);
        let directory = CString::new(directory.as_os_str().as_bytes())?;
        let enter = move || {
            close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)?;
            surroundings.enter(Some(&directory)).map_err(|(_, error)| error)
        };
        // SAFETY: the closure runs between fork and exec. It makes system calls on values that were made before, and
        // neither allocates nor takes a lock.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(enter);
        }
        Ok(())
    }

    /// Moves the calling process there; it must share its root and working directory with no other. Makes system calls
    /// only. Without a path, the directory is the one that was held.
    pub(crate) fn enter(&self, directory: Option<&CStr>) -> Result<(), Failed> {
        move_into_link_name_space(self.mounts.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(|e| ("enter the host's mount namespace", e.into()))?;
        directory.map_or_else(|| fchdir(&self.directory), chdir).map_err(|e| ("change directory", e.into()))?;
        setrlimit(Resource::Nofile, self.open_files).map_err(|e| ("limit open files", e.into()))
    }
}

/// Raises this process's soft limit of open files to its hard one, and says what it is now.
pub fn raise_own_open_files() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })?;
    Ok(limit.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::{process::Stdio, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::process::{Command as Program, Steps};

    const SAY: &str = "readlink /proc/self/ns/mnt; pwd; ulimit -Sn; ls /proc/self/fd | wc -l";

    /// What a program says of its surroundings, started by a thread that has left them since.
    fn left(start: impl FnOnce(Arc<Surroundings>) -> String + Send + 'static) -> String {
        let away = move || {
            // Its own, before its mounts change.
            unshare(CloneFlags::CLONE_FS).unwrap();
            let surroundings = Arc::new(Surroundings::current().unwrap());
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            nix::unistd::chdir("/").unwrap();
            start(surroundings)
        };
        thread::spawn(away).join().unwrap()
    }

    fn expected(directory: &Path) -> Vec<String> {
        let mounts = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        let limit = getrlimit(Resource::Nofile).current.map_or_else(|| "unlimited".into(), |limit| limit.to_string());
        // 0, 1, 2, and the one that lists.
        vec![mounts.display().to_string(), directory.display().to_string(), limit, "4".into()]
    }

    #[test]
    fn a_command_starts_in_them() {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let said = left(|surroundings| {
            let kept = nix::unistd::dup(File::open("/dev/null").unwrap()).unwrap();
            let mut command = Command::new("/bin/sh");
            command.args(["-c", SAY]).stdin(Stdio::null());
            surroundings.surround(&mut command, Path::new("/etc")).unwrap();
            let output = command.output().unwrap();
            drop(kept);
            String::from_utf8(output.stdout).unwrap()
        });
        assert_eq!(said.lines().collect::<Vec<_>>(), expected(Path::new("/etc")));
    }

    #[test]
    fn a_program_starts_in_them() {
        use std::{io::Read, os::fd::AsFd};
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let said = left(|surroundings| {
            let (from, to) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
            let null = File::open("/dev/null").unwrap();
            let program = Program {
                program: c"/bin/sh".into(),
                args: vec![c"sh".into(), c"-c".into(), CString::new(SAY).unwrap()],
                env: vec![c"PATH=/bin:/usr/bin".into()],
                fds: vec![(null.as_fd(), 0), (to.as_fd(), 1), (null.as_fd(), 2)],
                namespaces: CloneFlags::empty(),
                outlives_parent: false,
            };
            let steps = Steps { surroundings: Some(&surroundings), ..Steps::default() };
            let process = program.spawn_with(steps).unwrap();
            drop(program);
            drop(to);
            let mut said = String::new();
            File::from(from).read_to_string(&mut said).unwrap();
            process.wait().unwrap();
            said
        });
        let directory = std::env::current_dir().unwrap();
        assert_eq!(said.lines().collect::<Vec<_>>(), expected(&directory));
    }

    #[test]
    fn a_directory_that_is_gone_is_an_error_of_spawn() {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let said = left(|surroundings| {
            let mut command = Command::new("/bin/true");
            surroundings.surround(&mut command, Path::new("/nowhere/to/be/found")).unwrap();
            command.spawn().unwrap_err().kind().to_string()
        });
        assert_eq!(said, io::ErrorKind::NotFound.to_string());
    }
}
