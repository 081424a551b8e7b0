//! What the process gives up before it touches anything of the guest's.
//!
//! In order: resource limits and dumpability; mounts that do not propagate back; then, once QEMU runs outside, a mount
//! namespace of its own whose root is the share and nothing else. Binds that the shim makes below the share later appear
//! in here, because the share is a shared mount there and ours is its slave.
//!
//! Everything that is opened after [`enter`] is inside of the share; what must come from outside is opened before and
//! passed along. Filters on system calls and capabilities belong after this, per thread.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
    unistd::{chdir, fchdir, pivot_root},
};

use crate::devices::ShareRoot;

/// Open files that are asked for; each file that the guest knows takes one.
const NOFILE: u64 = 1 << 20;

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("confine vmm: {operation}")]
pub(super) struct Error {
    operation: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error { operation, source: source.into() }
}

/// What can be given up before anything else happens. Tells how many files can be open.
pub(super) fn prepare() -> Result<u64, Error> {
    // Guest memory, and with it secrets of containers, is in this process.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("limit core dumps"))?;
    prctl::set_dumpable(false).map_err(failed("forbid ptrace"))?;
    umask(Mode::from_bits_truncate(0o077));
    // Not a directory of somebody else's, which it would keep busy.
    chdir("/").map_err(failed("change to /"))?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
        .map_err(failed("make mounts private"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("read limit of open files"))?;
    let wanted = NOFILE.max(hard);
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(wanted);
    }
    // Over the system's own limit, or not privileged: what is there must do.
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed("raise limit of open files"))?;
    Ok(hard)
}

/// Leaves the host's files behind: the root is the share. For a process with one thread.
pub(super) fn enter(share: &Path, nofile: u64) -> Result<ShareRoot, Error> {
    let proc_self_fd = File::options()
        .read(true)
        .custom_flags(nix::libc::O_PATH | nix::libc::O_NOFOLLOW)
        .open("/proc/self/fd")
        .map_err(failed("open /proc/self/fd"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare mount namespace"))?;
    // Bound to itself, so that it is a mount that can be the root, wherever it was.
    mount(Some(share), share, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(failed("bind share"))?;
    // A bind of a slave is its peer: it gets the same mounts.
    mount(None::<&str>, share, None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .map_err(failed("make share a slave"))?;
    chdir(share).map_err(failed("change to share"))?;
    let old = File::options()
        .read(true)
        .custom_flags(nix::libc::O_PATH | nix::libc::O_DIRECTORY)
        .open("/")
        .map_err(failed("open old root"))?;
    pivot_root(".", ".").map_err(failed("pivot to share"))?;
    fchdir(&old).map_err(failed("change to old root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach old root"))?;
    drop(old);
    chdir("/").map_err(failed("change to new root"))?;
    Ok(ShareRoot { path: "/".into(), proc_self_fd, nofile })
}
