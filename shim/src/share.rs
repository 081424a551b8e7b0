//! The directory that the guest sees: one tmpfs per sandbox, in the shim's private mount namespace, with each
//! container's root file system and volumes bound below it.
//!
//! The tmpfs is a shared mount, so that what is bound later appears in the vmm's namespace, which is its slave. Nothing
//! here is visible to the host, and all of it ends with the last process of the sandbox.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use containerd_shim_protos::types::mount::Mount;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use vz_sys::mount as sys;

use crate::spec::{Bind, rootfs_name, share_name};

/// Why something could not be shared. Each names the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The private mount namespace.
    #[error("enter a private mount namespace")]
    Namespace(#[source] io::Error),
    /// A step on a path.
    #[error("{action} {path}")]
    Path {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The root file system.
    #[error("mount rootfs ({kind} {source_path})")]
    Rootfs {
        /// The file system's type.
        kind: String,
        /// What was to be mounted.
        source_path: String,
        /// Why not.
        source: containerd_shim::Error,
    },
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Path { action, path: path.to_owned(), source }
}

/// The share of a sandbox.
#[derive(Debug)]
pub struct Share {
    root: PathBuf,
}

impl Share {
    /// Moves this process into a mount namespace of its own, and makes an empty share at `root` in it.
    ///
    /// The process must be single-threaded still. The host's mounts keep coming in; none of ours goes out.
    pub fn create(root: PathBuf) -> Result<Self, Error> {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| Error::Namespace(e.into()))?;
        mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE).map_err(|e| Error::Namespace(e.into()))?;
        fs::create_dir(&root).map_err(at("make", &root))?;
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some("vz-share"), &root, Some("tmpfs"), flags, Some("mode=755,size=16m"))
            .map_err(|e| at("mount tmpfs at", &root)(e.into()))?;
        mount(NONE, &root, NONE, MsFlags::MS_SHARED, NONE).map_err(|e| at("share", &root)(e.into()))?;
        Ok(Self { root })
    }

    /// Its root, on the host.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a container's root file system is, on the host, in the shim's namespace.
    pub fn rootfs(&self, container: &str) -> PathBuf {
        self.root.join(rootfs_name(container))
    }

    /// Makes a container's directory, and mounts its root file system from containerd's mounts; without mounts, binds
    /// `fallback`, the directory that its spec names.
    pub fn mount_rootfs(&self, container: &str, mounts: &[Mount], fallback: &Path) -> Result<(), Error> {
        let target = self.rootfs(container);
        DirBuilder::new().recursive(true).mode(0o755).create(&target).map_err(at("make", &target))?;
        if mounts.is_empty() {
            return self.attach(fallback, &target, false, true).map(drop);
        }
        for mount in mounts {
            let target = if mount.target.is_empty() {
                target.clone()
            } else {
                target.join(mount.target.trim_start_matches('/'))
            };
            containerd_shim::mount::mount_rootfs(
                Some(mount.type_.as_str()).filter(|kind| !kind.is_empty()),
                Some(mount.source.as_str()).filter(|source| !source.is_empty()),
                &mount.options,
                &target,
            )
            .map_err(|source| Error::Rootfs {
                kind: mount.type_.clone(),
                source_path: mount.source.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Binds a volume. Returns the root of what was bound, which it stays whatever becomes of its names on the host.
    pub fn bind(&self, bind: &Bind) -> Result<OwnedFd, Error> {
        let target = self.root.join(&bind.name);
        let is_dir = fs::metadata(&bind.source).map_err(at("look at", &bind.source))?.is_dir();
        if is_dir {
            fs::create_dir(&target).map_err(at("make", &target))?;
        } else {
            File::create_new(&target).map_err(at("make", &target))?;
        }
        self.attach(&bind.source, &target, bind.readonly, bind.recursive)
    }

    fn attach(&self, source: &Path, target: &Path, readonly: bool, recursive: bool) -> Result<OwnedFd, Error> {
        // The link, if it is one, is followed here, once, on the host.
        let source = fs::canonicalize(source).map_err(at("resolve", source))?;
        let tree = sys::clone_tree(&source, recursive).map_err(at("bind", &source))?;
        // A clone of a shared mount would be its peer, and the guest's view would leak into the host's.
        sys::set_propagation(tree.as_fd(), MsFlags::MS_SLAVE.bits(), true).map_err(at("make slave", &source))?;
        sys::set_attributes(tree.as_fd(), libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID, true)
            .map_err(at("set nodev,nosuid on", &source))?;
        if readonly {
            sys::set_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, false).map_err(at("set ro on", &source))?;
        }
        sys::attach(tree.as_fd(), target).map_err(at("attach", target))?;
        Ok(tree)
    }

    /// Takes a container's mounts away, the last first. Nothing of a file system is removed.
    pub fn remove(&self, container: &str) -> Result<(), Error> {
        let dir = self.root.join(share_name(container));
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(at("list", &dir)(e)),
        };
        for entry in entries {
            let path = entry.map_err(at("list", &dir))?.path();
            loop {
                match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                    Ok(()) => {}
                    // Not (or no longer) a mount point.
                    Err(nix::errno::Errno::EINVAL) => break,
                    Err(e) => return Err(at("unmount", &path)(e.into())),
                }
            }
            let is_dir = fs::symlink_metadata(&path).map_err(at("look at", &path))?.is_dir();
            let removed = if is_dir { fs::remove_dir(&path) } else { fs::remove_file(&path) };
            removed.map_err(at("remove", &path))?;
        }
        fs::remove_dir(&dir).map_err(at("remove", &dir))
    }
}
