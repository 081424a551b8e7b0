//! Mounts and paths by descriptor: what `mount(2)` and `open(2)` cannot do without races.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, umount2},
};
use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string,
        fsmount, fsopen, move_mount, open_tree,
    },
};

/// `MOUNT_ATTR_NOSYMFOLLOW`, since Linux 5.14: path resolution follows no link of this mount.
const NOSYMFOLLOW: u32 = 0x0020_0000;

/// Whether a mount of an OCI specification is a bind mount, by its type or one of its options.
pub fn is_bind<'a>(kind: Option<&str>, options: impl IntoIterator<Item = &'a str>) -> bool {
    kind == Some("bind") || options.into_iter().any(|option| matches!(option, "bind" | "rbind"))
}

/// Opens a path below `dir`. No component may be a link or lead out of `dir`; mounts are crossed.
pub fn open_beneath(dir: BorrowedFd<'_>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    resolve(dir, path, flags, ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS)
}

/// Opens a path as a process whose root is `dir` would: links are followed, and none leads out of `dir`.
pub fn open_in_root(dir: BorrowedFd<'_>, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    resolve(dir, path, flags, ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

fn resolve(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, resolve: ResolveFlag) -> io::Result<OwnedFd> {
    loop {
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        match openat2(dir, path, how) {
            // A rename or mount elsewhere on the host at the same time; the kernel asks for another try.
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// The path of an open file under which this process can name it, whatever became of its names: proc_pid_fd(5).
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Clones the mount tree at `path` (with its submounts where `recursive`) into a detached mount.
///
/// The tree lives until the descriptor is closed or it is attached with [`attach`].
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    Ok(open_tree(CWD, path, tree_flags(recursive))?)
}

/// Clones the mount tree at an open file or directory, as [`clone_tree`].
pub fn clone_tree_at(place: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    Ok(open_tree(place, c"", tree_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH)?)
}

fn tree_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Attaches a detached mount at `target`, which exists and is of the same kind (directory or not).
pub fn attach(tree: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    Ok(move_mount(tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Attaches a detached mount at an open file or directory, as [`attach`].
pub fn attach_at(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, c"", target, c"", flags)?)
}

/// A detached tmpfs (nodev, nosuid, noexec, nosymfollow) with these options.
///
/// Kernels before 5.14 know no `nosymfollow`, and get one without.
pub fn tmpfs(source: &str, options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    let file_system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&file_system, "source", source)?;
    for (key, value) in options {
        fsconfig_set_string(&file_system, *key, *value)?;
    }
    fsconfig_create(&file_system)?;
    let plain =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let strict = plain | MountAttrFlags::from_bits_retain(NOSYMFOLLOW);
    match fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, strict) {
        Err(rustix::io::Errno::INVAL) => Ok(fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, plain)?),
        other => Ok(other?),
    }
}

/// A detached proc (nodev, nosuid, noexec) of this process's pid namespace.
pub fn proc() -> io::Result<OwnedFd> {
    let file_system = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&file_system)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&file_system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Whether an open file or directory is the root of a mount.
pub fn is_mount_root(place: BorrowedFd<'_>) -> io::Result<bool> {
    let found = statx(place, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// The id of the mount that an open file or directory is on: proc_pid_mountinfo(5), field 1.
pub fn mount_id(place: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(statx(place, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?.stx_mnt_id)
}

/// Unmounts the mount whose root is open, which goes as soon as nobody uses it any more. EINVAL where it is mounted
/// nowhere.
pub fn detach(root: BorrowedFd<'_>) -> io::Result<()> {
    Ok(umount2(&path_of(root), MntFlags::MNT_DETACH)?)
}

/// Unmounts what is mounted at `name` in `dir`, the topmost mount, which goes as soon as nobody uses it any more. False
/// where nothing is mounted there. The mounted file system is not asked.
pub fn detach_below(dir: BorrowedFd<'_>, name: &Path) -> io::Result<bool> {
    match umount2(&path_of(dir).join(name), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EINVAL) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Sets attributes (`MOUNT_ATTR_*`) on a mount and, where `recursive`, on all below it.
pub fn set_attributes(tree: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    set(tree, &libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 }, recursive)
}

/// Sets the propagation (`MS_PRIVATE`, `MS_SHARED`, `MS_SLAVE`) of a mount and, where `recursive`, of all below it.
pub fn set_propagation(tree: BorrowedFd<'_>, propagation: u64, recursive: bool) -> io::Result<()> {
    set(tree, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 }, recursive)
}

// rustix has no mount_setattr(2).
fn set(tree: BorrowedFd<'_>, attr: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty path is NUL-terminated, attr is valid for its size for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_mount_says_so_by_type_or_by_option() {
        assert!(is_bind(Some("bind"), []));
        assert!(is_bind(None, ["ro", "rbind"]));
        assert!(is_bind(Some("none"), ["bind"]));
        assert!(!is_bind(Some("tmpfs"), ["ro", "rprivate"]) && !is_bind(None, []));
    }
}
