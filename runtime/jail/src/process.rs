//! What the process gives up before it touches anything of the guest's. All of it with one thread.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{chdir, fchdir, pivot_root},
};

use crate::{Denied, Error, capabilities, filter};

/// Open files that are asked for, each file that the guest knows takes one; a user namespace cannot raise the limit
/// itself.
pub const OPEN_FILES: u64 = 1 << 20;

/// The limit of core dumps that forbids them, in files and for programs. A user namespace cannot raise it from 0
/// itself.
pub const NO_CORE: u64 = 1;

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System { operation, source: source.into() }
}

/// Gives up what can be given up before anything else happens. Tells how many files can be open.
pub fn prepare() -> Result<u64, Error> {
    // Guest memory, and with it secrets of containers, is in this process. The limit is 1 byte and not 0: where the
    // host has a program that takes dumps (core_pattern with a pipe), 0 does not count and 1 means none: fs/coredump.c.
    // Not being dumpable is not enough, since a thread that acts as another user sets that to the host's
    // fs.suid_dumpable.
    let none = match setrlimit(Resource::RLIMIT_CORE, NO_CORE, NO_CORE) {
        // Whoever started us had a lower one, and could not raise it either.
        Err(Errno::EPERM) => setrlimit(Resource::RLIMIT_CORE, 0, 0),
        other => other,
    };
    none.map_err(failed("limit core dumps"))?;
    prctl::set_dumpable(false).map_err(failed("forbid ptrace"))?;
    umask(Mode::from_bits_truncate(0o077));
    // Not a directory of somebody else's, which it would keep busy.
    chdir("/").map_err(failed("change to /"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(failed("make mounts private"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("read limit of open files"))?;
    let wanted = OPEN_FILES.max(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    // Over the system's own limit, or not privileged: what is there must do.
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed("raise limit of open files"))?;
    Ok(hard)
}

/// Leaves the host's files behind: the root is `share`, which is a shared mount outside, so that binds below it which
/// are made there later appear in here. The share's own directories are read-only in here, whoever takes this process
/// over: the shim alone decides which names they have. What is mounted below is as writable as its mount. Returns
/// `/proc/self/fd`, which the new root does not have.
pub fn enter_root(share: &Path) -> Result<File, Error> {
    // A mount of its own, which ends at its root: from a directory that was only opened, `..` would lead to the rest of
    // the host's /proc, and from there to its kernel's settings.
    let proc_self_fd =
        vz_sys::mount::clone_tree(Path::new("/proc/self/fd"), false).map_err(failed("clone /proc/self/fd"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare mount namespace"))?;
    // Bound to itself, so that it is a mount that can be the root, wherever it was.
    mount(Some(share), share, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(failed("bind share"))?;
    // A bind of a slave is its peer: it gets the same mounts.
    mount(None::<&str>, share, None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(failed("make share a slave"))?;
    chdir(share).map_err(failed("change to share"))?;
    let top = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(".")
        .map_err(failed("open share"))?;
    vz_sys::mount::set_attributes(top.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
        .map_err(failed("make share's directories read-only"))?;
    drop(top);
    let old = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open("/")
        .map_err(failed("open old root"))?;
    pivot_root(".", ".").map_err(failed("pivot to share"))?;
    fchdir(&old).map_err(failed("change to old root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach old root"))?;
    drop(old);
    chdir("/").map_err(failed("change to new root"))?;
    Ok(proc_self_fd.into())
}

/// Gives up every capability but those that serving files needs, every way to get one back, and every system call that
/// no role needs. Threads that are started from here on inherit that.
pub fn restrict(denied: Denied) -> Result<(), Error> {
    if denied == Denied::Report {
        vz_sys::sigsys::report_and_exit().map_err(failed("handle SIGSYS"))?;
    }
    prctl::set_no_new_privs().map_err(failed("set no_new_privs"))?;
    capabilities::keep_any()?;
    filter::install_process(denied)
}
