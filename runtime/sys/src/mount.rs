//! Mounts by descriptor: what `mount(2)` cannot do without races.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Clones the mount tree at `path` (with its submounts where `recursive`) into a detached mount.
///
/// The tree lives until the descriptor is closed or it is attached with [`attach`].
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: the path is NUL-terminated and outlives the call.
    #[allow(unsafe_code)]
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    descriptor(fd)
}

/// Attaches a detached mount at `target`, which exists and is of the same kind (directory or not).
pub fn attach(tree: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both paths are NUL-terminated and outlive the call.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(done)
}

/// Sets attributes (`MOUNT_ATTR_*`) on a mount and, where `recursive`, on all below it.
pub fn set_attributes(tree: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    // SAFETY: mount_attr is plain data; all zero is its empty value.
    #[allow(unsafe_code)]
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = attributes;
    set(tree, &attr, recursive)
}

/// Sets the propagation (`MS_PRIVATE`, `MS_SHARED`, `MS_SLAVE`) of a mount and, where `recursive`, of all below it.
pub fn set_propagation(tree: BorrowedFd<'_>, propagation: u64, recursive: bool) -> io::Result<()> {
    // SAFETY: as above.
    #[allow(unsafe_code)]
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.propagation = propagation;
    set(tree, &attr, recursive)
}

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
    check(done)
}

fn descriptor(result: i64) -> io::Result<OwnedFd> {
    check(result.min(0))?;
    let raw = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    #[allow(unsafe_code)]
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
