//! Pseudo terminals.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::{
        stat::{Mode, SFlag, fstat, major, minor},
        statfs::{FsType, fstatfs},
    },
    unistd::{Gid, Uid, fchown},
};
use oci_spec::runtime::Process;
use vz_sys::{channel::Channel, tty};

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS: i64 = 0x1cd1;

/// Takes the master that libcontainer's init has sent to its console socket.
pub fn receive_master(socket: &UnixListener) -> io::Result<OwnedFd> {
    let (connection, _) = socket.accept()?;
    let message = Channel::from_fd(connection.into()).recv()?;
    message
        .and_then(|m| m.fds.into_iter().next())
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "libcontainer sent no terminal"))
}

/// Makes a terminal of the container whose init is `pid`: master and slave.
///
/// The container's own instance of devpts must have it, or its name means nothing inside. The container controls all
/// that is in its root, so nothing there is followed or believed without a look.
pub fn open_in_container(pid: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let root = open(Path::new(&format!("/proc/{pid}/root")), OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let master = openat2(&root, "dev/pts/ptmx", how)?;
    let stat = fstat(&master)?;
    let is_device = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR;
    let is_ptmx = is_device && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
    if !is_ptmx || fstatfs(&master)?.filesystem_type() != FsType(DEVPTS) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the container's /dev/pts/ptmx is no such device"));
    }
    tty::unlock(&master)?;
    let slave = tty::open_slave(&master)?;
    Ok((master, slave))
}

/// Gives a terminal its owner and its first size.
pub fn prepare(slave: &OwnedFd, process: &Process) -> io::Result<()> {
    give(slave, process)?;
    if let Some(size) = process.console_size() {
        let cells = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        tty::set_size(slave, cells(size.width()), cells(size.height()))?;
    }
    Ok(())
}

/// Makes a process's user the owner of one of its stdio descriptors, so that it can open it again by its name.
pub fn give(fd: &OwnedFd, process: &Process) -> io::Result<()> {
    Ok(fchown(fd, Some(Uid::from_raw(process.user().uid())), None::<Gid>)?)
}
