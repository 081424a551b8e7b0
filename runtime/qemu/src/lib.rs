//! QEMU's `microvm` machine: its command line, its process and how it ended.
//!
//! QEMU emulates processor, memory, interrupt controllers and the serial port; file system and vsock are served by our
//! process over vhost-user. It gets what it needs as inherited descriptors: kernel and initramfs are the very files
//! that were verified, and no socket has a name.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io::{self, ErrorKind, Seek},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::PermissionsExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::OFlag,
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::Signal,
        wait::WaitStatus,
    },
    unistd::pipe2,
};
use vz_jail::emulator::{Emulator, NAMESPACES};
use vz_sys::process::{Command, Process, Steps};

mod args;

pub use args::{Device, Nic, arguments};

/// First of the descriptors that QEMU inherits beyond the standard ones.
const FIRST_FD: RawFd = 3;

/// What to start.
#[derive(Debug)]
pub struct Config<'a> {
    /// QEMU's program, found by [`find`].
    pub program: &'a Path,
    /// A directory that is there; QEMU's process sees its own root in its place.
    pub root: &'a Path,
    /// Shown in its command line, for people.
    pub name: &'a str,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The kernel, an ELF file with a PVH note.
    pub kernel: &'a File,
    /// Its initramfs.
    pub initramfs: &'a File,
    /// Its command line; [`console_arguments`] are part of it.
    pub append: &'a str,
    /// Whether the guest's clocks count instructions, a nanosecond each, and everything random is the same each time.
    pub count_instructions: bool,
    /// Devices that we serve, each with QEMU's end of its connection.
    pub devices: Vec<(Device, UnixStream)>,
    /// Network cards.
    pub nics: Vec<Nic>,
}

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such program in `PATH`.
    #[error("{} not found in PATH: install QEMU (Debian: qemu-system-x86) or set qemu.path", .0.display())]
    NotInPath(PathBuf),
    /// No such program at this absolute path.
    #[error("{} cannot be executed: install QEMU (Debian: qemu-system-x86) or set qemu.path", path.display())]
    NotExecutable {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that is neither.
    #[error("qemu.path {} is neither an absolute path nor a name to look up in PATH", .0.display())]
    Relative(PathBuf),
    /// Something has a zero byte in it.
    #[error("argument for QEMU has a zero byte")]
    Zero(#[from] std::ffi::NulError),
    /// A system call failed.
    #[error("{operation} for QEMU")]
    System {
        /// Which.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The program could not be executed.
    #[error("start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Finds the program: an absolute path as it is, a plain name in `path`, as the shell would.
pub fn find(program: &Path, path: Option<&OsStr>) -> Result<PathBuf, Error> {
    if program.is_absolute() {
        executable(program).map_err(|source| Error::NotExecutable { path: program.to_owned(), source })?;
        return Ok(program.to_owned());
    }
    if program.components().count() != 1 {
        return Err(Error::Relative(program.to_owned()));
    }
    path.map(std::env::split_paths)
        .into_iter()
        .flatten()
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(program))
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| Error::NotInPath(program.to_owned()))
}

fn executable(path: &Path) -> io::Result<()> {
    let meta = std::fs::metadata(path)?;
    if meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
        Ok(())
    } else {
        Err(ErrorKind::PermissionDenied.into())
    }
}

/// A file that QEMU's user can open by its descriptor's name: itself, or a copy.
fn readable(file: &File) -> Result<File, Error> {
    let system = |operation| move |source| Error::System { operation, source };
    if Emulator::can_reopen(file).map_err(system("look at kernel"))? {
        return file.try_clone().map_err(system("share kernel"));
    }
    let copy = memfd_create(c"vz-boot", MFdFlags::MFD_CLOEXEC).map_err(|e| system("copy kernel")(e.into()))?;
    let mut copy = File::from(copy);
    let mut from = file;
    from.rewind().map_err(system("copy kernel"))?;
    io::copy(&mut from, &mut copy).map_err(system("copy kernel"))?;
    Ok(copy)
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    process: Process,
    /// What the guest writes to its console, for whoever takes it; end of file when QEMU has ended.
    pub console: Option<OwnedFd>,
    /// What QEMU itself has to say; likewise.
    pub stderr: Option<OwnedFd>,
}

/// How QEMU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// The guest ended: it rebooted or powered off.
    Guest,
    /// QEMU gave up, with this status.
    Status(i32),
    /// QEMU was killed, by this signal.
    Signal(Signal),
}

impl Qemu {
    /// Starts it, confined. It is killed when the calling thread ends, so call this from the main thread, while it is
    /// the only one.
    pub fn start(config: &Config<'_>) -> Result<Self, Error> {
        let system = |operation| move |e: nix::Error| Error::System { operation, source: e.into() };
        let (console, console_to) = pipe2(OFlag::O_CLOEXEC).map_err(system("make console pipe"))?;
        let (stderr, stderr_to) = pipe2(OFlag::O_CLOEXEC).map_err(system("make pipe"))?;
        let null = File::open("/dev/null").map_err(|source| Error::System { operation: "open /dev/null", source })?;

        let (kernel, initramfs) = (readable(config.kernel)?, readable(config.initramfs)?);
        let mut inherited: Vec<BorrowedFd<'_>> = vec![kernel.as_fd(), initramfs.as_fd()];
        inherited.extend(config.devices.iter().map(|(_, socket)| socket.as_fd()));
        inherited.extend(config.nics.iter().flat_map(|nic| &nic.queues).map(AsFd::as_fd));
        let numbered: Vec<(BorrowedFd<'_>, RawFd)> = inherited.into_iter().zip(FIRST_FD..).collect();
        let mut fds = vec![(null.as_fd(), 0), (console_to.as_fd(), 1), (stderr_to.as_fd(), 2)];
        fds.extend(numbered.iter().copied());

        let start = |source| Error::Start { program: config.program.to_owned(), source };
        let emulator = Emulator::new(config.program, config.root).map_err(start)?;
        let program = CString::new(emulator.program().as_os_str().as_bytes())?;
        let mut args = vec![CString::new(config.program.as_os_str().as_bytes())?];
        for argument in arguments(config, FIRST_FD) {
            args.push(CString::new(argument)?);
        }
        let process = Command { program, args, env: Vec::new(), fds, namespaces: NAMESPACES, outlives_parent: false }
            .spawn_with(Steps { child: Some(&|| emulator.confine()), ..Steps::default() })
            .map_err(start)?;
        Ok(Self { process, console: Some(console), stderr: Some(stderr) })
    }

    /// Ends it at once.
    pub fn kill(&self) -> io::Result<()> {
        self.process.kill(Signal::SIGKILL)
    }

    /// Waits for its end.
    pub fn wait(&self) -> io::Result<Exit> {
        Ok(match self.process.wait()? {
            WaitStatus::Exited(_, 0) => Exit::Guest,
            WaitStatus::Exited(_, status) => Exit::Status(status),
            WaitStatus::Signaled(_, signal, _) => Exit::Signal(signal),
            other => return Err(io::Error::other(format!("wait for QEMU: {other:?}"))),
        })
    }
}

impl AsFd for Qemu {
    /// Readable once it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_the_shell_would() {
        assert_eq!(find(Path::new("sh"), Some(OsStr::new("/nowhere:bin:/bin"))).unwrap(), Path::new("/bin/sh"));
        assert_eq!(find(Path::new("/bin/sh"), None).unwrap(), Path::new("/bin/sh"));
        let missing = find(Path::new("qemu-system-x86_64"), Some(OsStr::new("/nowhere"))).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "qemu-system-x86_64 not found in PATH: install QEMU (Debian: qemu-system-x86) or set qemu.path"
        );
        assert!(matches!(find(Path::new("/etc/passwd"), None), Err(Error::NotExecutable { .. })));
        assert!(matches!(find(Path::new("bin/sh"), None), Err(Error::Relative(_))));
    }
}
