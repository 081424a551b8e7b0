//! Confinement of QEMU, from its process's start to its program's.
//!
//! Its root has programs and libraries, read-only, and its own descriptors; it is a user that nobody else is, without
//! capabilities. What it needs beyond that it inherits. Its own filters on system calls come on top, see `vz-qemu`.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::CloneFlags,
    sys::{prctl, signal::Signal, stat::Mode, stat::umask},
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid},
};
use vz_sys::{mount as sys, process::Failed};

use crate::capabilities;

/// Where hosts have programs, libraries and the data that belongs to them. Those that are links stay links.
const PROGRAMS: [&str; 9] = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix", "/gnu"];
/// What the dynamic loader reads besides.
const LOADER: [&str; 2] = ["/etc/ld.so.cache", "/etc/alternatives"];
/// First of the users that QEMU processes run as, one for each pid. Neither distributions nor systemd give these to
/// anybody: the highest ids below 2^31 that are not for containers.
const FIRST_USER: u32 = 0x7000_0000;
/// Who it is on a host that does not have so many users, which is a container itself.
const NOBODY: u32 = 65534;

/// The namespaces that QEMU's process starts in.
pub const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWCGROUP);

/// What QEMU's process is left with.
#[derive(Debug)]
pub struct Emulator {
    program: PathBuf,
    place: PathBuf,
    user: u32,
}

impl Emulator {
    /// For a program, with any directory, to make its root at; nobody but the process sees that.
    pub fn new(program: &Path, place: &Path) -> io::Result<Self> {
        let program = fs::canonicalize(program)?;
        // That of our own process, which has one QEMU, where /proc is of.
        let pid: u32 = fs::read_link("/proc/self")?.to_string_lossy().parse().map_err(io::Error::other)?;
        let user = FIRST_USER.saturating_add(pid);
        let exists = fs::read_to_string("/proc/self/uid_map")?.lines().any(|line| {
            let mut fields = line.split_whitespace().map(str::parse::<u32>);
            match (fields.next(), fields.nth(1)) {
                (Some(Ok(first)), Some(Ok(count))) => user.checked_sub(first).is_some_and(|nth| nth < count),
                _ => false,
            }
        });
        Ok(Self { program, place: place.to_owned(), user: if exists { user } else { NOBODY } })
    }

    /// The program's path, in the new root as well.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Whether the program can open a file that it inherits by its descriptor's name.
    pub fn can_reopen(file: &fs::File) -> io::Result<bool> {
        Ok(file.metadata()?.mode() & 0o004 != 0)
    }

    /// Confines the calling process, which is in [`NAMESPACES`] of its own and about to execute the program.
    pub fn confine(&self) -> Result<(), Failed> {
        self.enter_root()?;
        let failed = |step| move |e: Errno| (step, e.into());
        umask(Mode::from_bits_truncate(0o077));
        capabilities::clear_bounding().map_err(|e| ("drop capabilities", io::Error::other(e)))?;
        setgroups(&[]).map_err(failed("leave groups"))?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.user));
        setresgid(group, group, group).map_err(failed("change group"))?;
        // From another user than root, no capability stays.
        setresuid(user, user, user).map_err(failed("change user"))?;
        prctl::set_no_new_privs().map_err(failed("set no_new_privs"))?;
        // Changing the user has undone this.
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed("tie to the vmm"))
    }

    fn enter_root(&self) -> Result<(), Failed> {
        const NONE: Option<&str> = None;
        let failed = |step| move |e: Errno| (step, e.into());
        // What is made in the root is for another user.
        umask(Mode::from_bits_truncate(0o022));
        mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE).map_err(failed("make mounts private"))?;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        let options = Some("mode=755,size=64k,nr_inodes=64");
        // The descriptors are those of this process, which goes on to be the program.
        let descriptors = sys::clone_tree(Path::new("/proc/self/fd"), false).map_err(|e| ("clone /proc/self/fd", e))?;
        mount(Some("vz-qemu"), &self.place, Some("tmpfs"), flags, options).map_err(failed("mount root"))?;
        for path in PROGRAMS.iter().chain(&LOADER).map(Path::new).chain(self.own_directory()) {
            self.show(path).map_err(|e| ("show programs in root", e))?;
        }
        let target = self.inside(Path::new("/proc/self/fd"));
        fs::create_dir_all(&target).map_err(|e| ("make /proc/self/fd in root", e))?;
        sys::attach(std::os::fd::AsFd::as_fd(&descriptors), &target).map_err(|e| ("attach /proc/self/fd", e))?;
        chdir(&self.place).map_err(failed("change to root"))?;
        pivot_root(".", ".").map_err(failed("pivot root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach old root"))?;
        let readonly = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(NONE, "/", NONE, readonly, NONE).map_err(failed("make root read-only"))?;
        chdir("/").map_err(failed("change to root"))
    }

    /// Where a program that was installed by itself has its data: the directory above its `bin`.
    fn own_directory(&self) -> Option<&Path> {
        let known = PROGRAMS.iter().any(|dir| self.program.starts_with(dir));
        let prefix = self.program.parent()?.parent().filter(|dir| dir.parent().is_some())?;
        (!known).then_some(prefix)
    }

    fn inside(&self, path: &Path) -> PathBuf {
        self.place.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Binds a directory or file of the host's into the root, read-only with all below it; nothing where there is none.
    fn show(&self, path: &Path) -> io::Result<()> {
        let target = self.inside(path);
        let kind = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        if kind.is_symlink() {
            return symlink(fs::read_link(path)?, target);
        }
        if kind.is_dir() {
            fs::create_dir(&target)?;
        } else {
            fs::File::create_new(&target)?;
        }
        let tree = sys::clone_tree(path, true)?;
        let tree = std::os::fd::AsFd::as_fd(&tree);
        let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        sys::set_attributes(tree, attributes, true)?;
        sys::attach(tree, &target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_of_its_own_brings_its_directory() {
        let emulator = |program: &str| Emulator { program: program.into(), place: "/run/x".into(), user: 1 };
        assert_eq!(emulator("/usr/bin/qemu").own_directory(), None);
        assert_eq!(emulator("/opt/qemu/bin/qemu").own_directory(), Some(Path::new("/opt/qemu")));
        // Never the whole host.
        assert_eq!(emulator("/opt/qemu").own_directory(), None);
        assert_eq!(emulator("/qemu").own_directory(), None);
        assert_eq!(emulator("/qemu").inside(Path::new("/usr/lib")), Path::new("/run/x/usr/lib"));
    }

    #[test]
    fn each_process_has_a_user_of_its_own() {
        let emulator = Emulator::new(Path::new("/bin/sh"), Path::new("/run")).unwrap();
        assert!(emulator.user == NOBODY || emulator.user == FIRST_USER + std::process::id());
        assert!(emulator.program().is_absolute());
    }
}
