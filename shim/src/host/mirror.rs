//! Mounts that the host makes and takes away below a volume while its container runs (`rslave`).
//!
//! The kernel could carry them to the guest's server by itself, as slaves of the host's mounts. Then an unmount on the
//! host would be refused (EBUSY) for as long as the guest remembers a file there, because the server holds a descriptor
//! for each. So the volume's own mounts are private, and this module does what propagation would: by the mount table of
//! the shim's namespace, which follows the host's, it clones what appears below a volume, and detaches the clone when
//! the host unmounts. [`super::mount_watch`] says when to look.
//!
//! Threat: the guest may rename directories of the volume at the same time. The place of a mount is found beneath the
//! volume's source, without links, and must be the mount that the table names. It is attached beneath the volume. The
//! worst that a guest can do is to see a mount in another of its own directories.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{fcntl::OFlag, mount::MsFlags};
use vz_sys::mount as sys;

use super::mounts::{self, Entry, HARMLESS, open_source};

/// A volume that follows the host's mounts.
#[derive(Debug)]
pub struct Volume {
    /// The host's path, without links.
    source: PathBuf,
    /// The root of the volume in the share.
    root: OwnedFd,
    /// The host's mounts below it, by their ids, with their clones; `None` for what is not to be seen.
    known: BTreeMap<i32, Option<OwnedFd>>,
}

impl Volume {
    /// A volume with the root `root` that has just been made of `source`, with all the mounts below it where
    /// `recursive`.
    pub fn new(source: &OwnedFd, root: OwnedFd, recursive: bool) -> io::Result<Self> {
        let source = std::fs::read_link(sys::path_of(source.as_fd()))?;
        let mut volume = Self { source, root, known: BTreeMap::new() };
        for mount in mounts::read()? {
            let Some(below) = volume.below(&mount) else { continue };
            if !recursive {
                volume.known.insert(mount.id, None);
                continue;
            }
            // One that the host has made since the clone is not there yet, and comes with the next update.
            if let Ok(clone) = volume.open(&below)
                && sys::is_mount_root(clone.as_fd())?
            {
                volume.known.insert(mount.id, Some(clone));
            }
        }
        Ok(volume)
    }

    /// The host's path.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// The path of a mount below this volume; `None` for all others.
    fn below(&self, mount: &Entry) -> Option<PathBuf> {
        let below = mount.point.strip_prefix(&self.source).ok()?;
        (!below.as_os_str().is_empty()).then(|| below.to_owned())
    }

    fn open(&self, below: &Path) -> io::Result<OwnedFd> {
        sys::open_beneath(self.root.as_fd(), below, OFlag::O_PATH)
    }

    /// Brings the volume up to date with the mount table. The first failure is returned, after all has been tried.
    pub fn update(&mut self, table: &[Entry]) -> io::Result<()> {
        let mut result = Ok(());
        let here: BTreeMap<i32, PathBuf> =
            table.iter().filter_map(|mount| Some((mount.id, self.below(mount)?))).collect();
        let gone: Vec<i32> = self.known.keys().filter(|id| !here.contains_key(id)).copied().collect();
        for id in gone.into_iter().rev() {
            if let Some(Some(clone)) = self.known.remove(&id) {
                // The host may have unmounted its parent first, and the clone with it.
                match sys::detach(clone.as_fd()) {
                    Err(e) if e.raw_os_error() != Some(libc::EINVAL) => result = result.and(Err(e)),
                    _ => {}
                }
            }
        }
        for (id, below) in here {
            if self.known.contains_key(&id) {
                continue;
            }
            let clone = self.clone_in(id, &below);
            match clone {
                Ok(clone) => drop(self.known.insert(id, clone)),
                Err(e) => {
                    self.known.insert(id, None);
                    result = result.and(Err(e));
                }
            }
        }
        result
    }

    /// Shows the guest the host's mount `id`. `None` where something else is there by now.
    fn clone_in(&self, id: i32, below: &Path) -> io::Result<Option<OwnedFd>> {
        // Not held for longer: it would keep the host from unmounting the volume's source.
        let source = open_source(&self.source)?;
        let place = match sys::open_beneath(source.as_fd(), below, OFlag::O_PATH) {
            Ok(place) if sys::mount_id(place.as_fd())? == u64::from(id.unsigned_abs()) => place,
            Ok(_) => return Ok(None),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let tree = sys::clone_tree_at(place.as_fd(), false)?;
        drop((place, source));
        sys::set_propagation(tree.as_fd(), MsFlags::MS_PRIVATE.bits(), false)?;
        sys::set_attributes(tree.as_fd(), HARMLESS, false)?;
        sys::attach_at(tree.as_fd(), self.open(below)?.as_fd())?;
        Ok(Some(tree))
    }
}
