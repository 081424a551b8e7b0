//! The directory that the guest sees: one tmpfs per sandbox, in the shim's private mount namespace, with each
//! container's root file system and volumes mounted below it.
//!
//! ```text
//! share/<container>/rootfs    the root file system
//! share/<container>/mount<N>  a volume, or a single file
//! ```
//!
//! The tmpfs is a shared mount, so that what is mounted later appears in the vmm's namespace, which is its slave.
//! Nothing here is visible to the host, and all of it ends with the last process of the sandbox.
//!
//! Threat: the guest reads and writes below every mount while the shim adds others. The tmpfs itself is read-only for
//! the vmm (`vz_jail::enter_root`), so the guest cannot change the names that the shim uses. The shim does not rely on
//! that: it goes from the tmpfs's descriptor by single names, follows no link, and attaches every mount by descriptor.
//! No name of the guest's is resolved in the host's root.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use containerd_shim_protos::types::mount::Mount;
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{OFlag, openat},
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};
use vz_sys::mount as sys;

use super::{
    mirror::Volume,
    mounts::{self, HARMLESS, open_source},
};
use vz_sys::sync::lock;

/// Name of a container's root file system in its directory.
pub const ROOTFS: &str = "rootfs";
/// The same for mount(8), after all other options.
const HARMLESS_OPTIONS: [&str; 3] = ["nodev", "nosuid", "noexec"];
/// Bytes of options that mount(2) takes: a page, less its own bookkeeping.
const MOST_OPTIONS: usize = 4096 - 512;

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
    /// An overlay of more layers than fit into one mount.
    #[error("mount rootfs: options of {0} bytes are too long for mount(2): the image has too many layers")]
    Options(usize),
    /// A container's id is no name of a directory.
    #[error("container id {0:?} is not a file name")]
    Id(String),
    /// The mount table.
    #[error("read the mount table")]
    Table(#[source] io::Error),
    /// The container was deleted meanwhile.
    #[error("the container was deleted while it was created")]
    Gone,
}

fn at<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
    move |e| Error::Path { action, path: path.to_owned(), source: e.into() }
}

/// A host file or directory that the guest sees below the share.
#[derive(Debug)]
pub struct Bind {
    /// The host's path.
    pub source: PathBuf,
    /// What was found there; the path is not resolved again.
    pub file: OwnedFd,
    /// Whether that is a directory.
    pub is_dir: bool,
    /// Name in the container's directory of the share.
    pub name: PathBuf,
    /// What the guest cannot write.
    pub readonly: ReadOnly,
    /// With all that is mounted below.
    pub recursive: bool,
    /// Which later mounts of the host's the guest sees.
    pub propagation: Propagation,
    /// Whether it is one of the container's files that [`etc_files`](crate::host::etc_files) follows.
    pub is_etc_file: bool,
}

/// What of a bind is read-only, as mount(8) has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// The bind, and nothing that is mounted below (`ro`).
    Top,
    /// The bind and all mounts below (`rro`).
    All,
}

impl ReadOnly {
    /// Whether mounts below are read-only too; `None` where nothing is.
    pub fn recursive(self) -> Option<bool> {
        match self {
            Self::No => None,
            Self::Top => Some(false),
            Self::All => Some(true),
        }
    }
}

/// Whether mounts that the host makes below a bind later appear in the guest, as mount_namespaces(7) has it. What the
/// guest mounts never appears on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// They do (`slave`, `rslave`); so it is where nothing is said.
    Slave,
    /// They do not (`private`, `rprivate`).
    Private,
}

/// The share of a sandbox.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    root: OwnedFd,
    places: Mutex<HashMap<String, Arc<Mutex<Live>>>>,
    /// Whether the host's mounts are being followed.
    watched: AtomicBool,
    /// Mount points that are in use for a moment, numbered.
    stages: AtomicU32,
}

/// A container's directory in the share. What is mounted there goes when the share removes the container.
#[derive(Debug)]
pub struct Place<'s> {
    share: &'s Share,
    path: PathBuf,
    dir: OwnedFd,
    live: Arc<Mutex<Live>>,
}

/// What may still happen in a container's directory.
#[derive(Debug)]
enum Live {
    /// Mounts, and these volumes follow the host's.
    Yes(Vec<Volume>),
    /// Nothing: the container is removed, and a mount that comes late is refused.
    No,
}

impl Share {
    /// Moves this process into a mount namespace of its own, and makes an empty share at `path` in it.
    ///
    /// The process must be single-threaded still. The host's mounts keep coming in; none of ours goes out.
    pub fn create(path: PathBuf) -> Result<Self, Error> {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| Error::Namespace(e.into()))?;
        mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE).map_err(|e| Error::Namespace(e.into()))?;
        Self::mount_at(path)
    }

    /// Makes the share's file system at `path`, in this mount namespace.
    fn mount_at(path: PathBuf) -> Result<Self, Error> {
        fs::create_dir(&path).map_err(at("make", &path))?;
        // Mount points only: each takes an inode and no byte.
        let options = [("mode", "755"), ("size", "64k"), ("nr_inodes", "16k")];
        let root = sys::tmpfs("vz-share", &options).map_err(at("make tmpfs for", &path))?;
        sys::attach(root.as_fd(), &path).map_err(at("mount tmpfs at", &path))?;
        sys::set_propagation(root.as_fd(), MsFlags::MS_SHARED.bits(), false).map_err(at("share", &path))?;
        let (places, watched, stages) = Default::default();
        Ok(Self { path, root, places, watched, stages })
    }

    /// True once: whoever asks first has the volumes follow the host's mounts.
    pub fn claim_watch(&self) -> bool {
        !self.watched.swap(true, Ordering::Relaxed)
    }

    /// Where the vmm finds it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a container's directory.
    pub fn place(&self, container: &str) -> Result<Place<'_>, Error> {
        let name = Path::new(container);
        if !is_name(name) {
            return Err(Error::Id(container.to_owned()));
        }
        let path = self.path.join(name);
        let live = Arc::new(Mutex::new(Live::Yes(Vec::new())));
        lock(&self.places).insert(container.to_owned(), Arc::clone(&live));
        match mkdirat(&self.root, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => return Err(at("make", &path)(e)),
        }
        let dir = open_dir(self.root.as_fd(), name).map_err(at("open", &path))?;
        Ok(Place { share: self, path, dir, live })
    }

    /// Takes a container's mounts away, the last first, and its directory. Nothing of a file system is removed.
    ///
    /// A mount that a file system holds up comes to nothing from now on.
    pub fn remove(&self, container: &str) -> Result<(), Error> {
        let live = lock(&self.places).remove(container);
        // Held to the end: a mount that is being made comes before, and none comes after.
        let mut live = live.as_ref().map(|live| lock(live));
        if let Some(live) = &mut live {
            **live = Live::No;
        }
        let (name, path) = (Path::new(container), self.path.join(container));
        let dir = match open_dir(self.root.as_fd(), name) {
            Ok(dir) => dir,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(at("open", &path)(e)),
        };
        for entry in names(dir.as_fd()).map_err(at("list", &path))? {
            let path = path.join(&entry);
            while sys::detach_below(dir.as_fd(), &entry).map_err(at("unmount", &path))? {}
            let removed = match unlinkat(&dir, &entry, UnlinkatFlags::NoRemoveDir) {
                Err(Errno::EISDIR) => unlinkat(&dir, &entry, UnlinkatFlags::RemoveDir),
                other => other,
            };
            removed.map_err(at("remove", &path))?;
        }
        unlinkat(&self.root, name, UnlinkatFlags::RemoveDir).map_err(at("remove", &path))
    }

    /// Whether there are volumes that follow the host's mounts.
    pub fn has_followers(&self) -> bool {
        let places: Vec<_> = lock(&self.places).values().cloned().collect();
        places.iter().any(|place| matches!(&*lock(place), Live::Yes(volumes) if !volumes.is_empty()))
    }

    /// Brings the volumes that follow the host's mounts up to date. The first failure is returned, after all has been
    /// tried.
    pub fn follow(&self) -> Result<(), Error> {
        let table = mounts::read().map_err(Error::Table)?;
        let places: Vec<_> = lock(&self.places).values().cloned().collect();
        let mut result = Ok(());
        for place in places {
            let mut live = lock(&place);
            let Live::Yes(volumes) = &mut *live else { continue };
            for volume in volumes {
                result = result.and(volume.update(&table).map_err(at("follow mounts below", volume.source())));
            }
        }
        result
    }

    /// Mounts what containerd asks for, out of everybody's sight, and returns it as a detached tree.
    fn staged(&self, mounts: &[Mount]) -> Result<OwnedFd, Error> {
        let number = self.stages.fetch_add(1, Ordering::Relaxed);
        let stage = Stage::make(self.path.with_file_name(format!("stage-{number}")))?;
        for mount in mounts {
            let root = stage.root()?;
            let target = match mount.target.trim_start_matches('/') {
                "" => root,
                // A path within the image, whose links are the image's.
                path => sys::open_in_root(root.as_fd(), Path::new(path), OFlag::O_PATH)
                    .map_err(at("open", Path::new(&mount.target)))?,
            };
            let (mut options, _layers) = within_a_page(mount)?;
            options.extend(HARMLESS_OPTIONS.map(String::from));
            containerd_shim::mount::mount_rootfs(
                Some(mount.type_.as_str()).filter(|kind| !kind.is_empty()),
                Some(mount.source.as_str()).filter(|source| !source.is_empty()),
                &options,
                sys::path_of(target.as_fd()),
            )
            .map_err(|source| Error::Rootfs {
                kind: mount.type_.clone(),
                source_path: mount.source.clone(),
                source,
            })?;
        }
        let tree = sys::clone_tree_at(stage.root()?.as_fd(), true).map_err(at("clone", &stage.0))?;
        sys::set_propagation(tree.as_fd(), MsFlags::MS_PRIVATE.bits(), true).map_err(at("make private", &stage.0))?;
        Ok(tree)
    }
}

impl Place<'_> {
    /// Mounts the root file system from containerd's mounts; without mounts, binds `fallback`, the directory that the
    /// container's spec names.
    pub fn mount_rootfs(&self, mounts: &[Mount], fallback: &Path) -> Result<(), Error> {
        let tree = if mounts.is_empty() {
            let source = open_source(fallback).map_err(at("open", fallback))?;
            let tree = sys::clone_tree_at(source.as_fd(), true).map_err(at("bind", fallback))?;
            sys::set_propagation(tree.as_fd(), MsFlags::MS_SLAVE.bits(), true).map_err(at("make slave", fallback))?;
            tree
        } else {
            self.share.staged(mounts)?
        };
        self.attach(&tree, Path::new(ROOTFS), true, None)
    }

    /// The mounted root file system.
    pub fn rootfs(&self) -> Result<OwnedFd, Error> {
        open_dir(self.dir.as_fd(), Path::new(ROOTFS)).map_err(at("open", &self.path.join(ROOTFS)))
    }

    /// The root file system's mounts once more, detached from everything, for a process that is to have them as its
    /// root.
    pub fn rootfs_tree(&self) -> Result<OwnedFd, Error> {
        let (rootfs, path) = (self.rootfs()?, self.path.join(ROOTFS));
        let tree = sys::clone_tree_at(rootfs.as_fd(), true).map_err(at("clone", &path))?;
        sys::set_propagation(tree.as_fd(), MsFlags::MS_PRIVATE.bits(), true).map_err(at("make private", &path))?;
        Ok(tree)
    }

    /// Binds a volume. Returns the root of what was bound, which it stays whatever becomes of its names on the host.
    pub fn bind(&self, bind: &Bind) -> Result<OwnedFd, Error> {
        let source = &bind.source;
        let tree = sys::clone_tree_at(bind.file.as_fd(), bind.recursive).map_err(at("bind", source))?;
        // What the host mounts later is cloned one by one where it is to be seen (`mirror`). A slave would keep the
        // host from unmounting, and the clone of a shared mount would be its peer and show the host what is mounted
        // here.
        sys::set_propagation(tree.as_fd(), MsFlags::MS_PRIVATE.bits(), true).map_err(at("make private", source))?;
        if let Some(recursive) = bind.readonly.recursive() {
            sys::set_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, recursive).map_err(at("set ro on", source))?;
        }
        let volume = || {
            let root = tree.try_clone().map_err(at("hold", source))?;
            Volume::new(&bind.file, root, bind.recursive).map_err(at("look at mounts below", source))
        };
        let follows = bind.is_dir && bind.propagation == Propagation::Slave;
        self.attach(&tree, &bind.name, bind.is_dir, if follows { Some(&volume) } else { None })?;
        Ok(tree)
    }

    /// Attaches a detached tree under a name of its own. From here on the guest sees it. `volume` makes what follows
    /// the host.
    fn attach(
        &self,
        tree: &OwnedFd,
        name: &Path,
        is_dir: bool,
        volume: Option<&dyn Fn() -> Result<Volume, Error>>,
    ) -> Result<(), Error> {
        let path = self.path.join(name);
        sys::set_attributes(tree.as_fd(), HARMLESS, true).map_err(at("set nodev,nosuid,noexec on", &path))?;
        let mut live = lock(&self.live);
        let Live::Yes(volumes) = &mut *live else { return Err(Error::Gone) };
        if is_dir {
            mkdirat(&self.dir, name, Mode::from_bits_truncate(0o755)).map_err(at("make", &path))?;
        } else {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(&self.dir, name, flags, Mode::from_bits_truncate(0o644)).map_err(at("make", &path))?;
        }
        let target =
            sys::open_beneath(self.dir.as_fd(), name, OFlag::O_PATH | OFlag::O_NOFOLLOW).map_err(at("open", &path))?;
        sys::attach_at(tree.as_fd(), target.as_fd()).map_err(at("attach", &path))?;
        if let Some(volume) = volume {
            volumes.push(volume()?);
        }
        Ok(())
    }
}

/// A directory of the shim's own in which something is mounted for a moment. Its parent is private to this namespace.
struct Stage(PathBuf);

impl Stage {
    fn make(path: PathBuf) -> Result<Self, Error> {
        DirBuilder::new().mode(0o700).create(&path).map_err(at("make", &path))?;
        Ok(Self(path))
    }

    fn root(&self) -> Result<OwnedFd, Error> {
        fs::File::options()
            .read(true)
            .custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits())
            .open(&self.0)
            .map(OwnedFd::from)
            .map_err(at("open", &self.0))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let detached = || -> io::Result<()> {
            let parent = self.0.parent().unwrap_or(Path::new("/"));
            let parent = fs::File::open(parent)?;
            let name = Path::new(self.0.file_name().unwrap_or_default());
            while sys::detach_below(parent.as_fd(), name)? {}
            fs::remove_dir(&self.0)
        };
        if let Err(error) = detached() {
            // The journal's unwinding tries again.
            tracing::error!(%error, path = %self.0.display(), "take down the mount of a root file system");
        }
    }
}

fn open_dir(dir: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    sys::open_beneath(dir, name, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW)
}

/// The entries of a directory.
fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<PathBuf>> {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let listed = sys::open_beneath(dir, Path::new("."), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let mut names = Vec::new();
    for entry in Dir::from_fd(listed)?.iter() {
        let entry = entry?;
        match entry.file_name().to_bytes() {
            b"." | b".." => {}
            name => names.push(PathBuf::from(OsStr::from_bytes(name))),
        }
    }
    Ok(names)
}

/// Whether a path is one name that a directory can have.
fn is_name(path: &Path) -> bool {
    use std::path::Component;
    let mut components = path.components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == path.as_os_str())
}

/// Options that fit into the page of mount(2): an overlay whose layers' paths are too long for it gets them as
/// descriptors, which the caller keeps until it has mounted.
fn within_a_page(mount: &Mount) -> Result<(Vec<String>, Vec<OwnedFd>), Error> {
    let length = |options: &[String]| options.iter().map(|option| option.len() + 1).sum::<usize>();
    if mount.type_ != "overlay" || length(&mount.options) <= MOST_OPTIONS {
        return Ok((mount.options.clone(), Vec::new()));
    }
    let mut layers = Vec::new();
    let mut options = Vec::new();
    for option in &mount.options {
        let Some(lower) = option.strip_prefix("lowerdir=") else {
            options.push(option.clone());
            continue;
        };
        let mut short = Vec::new();
        for path in split_layers(lower) {
            let layer = open_source(&path).map_err(at("open layer", &path))?;
            short.push(sys::path_of(layer.as_fd()).display().to_string());
            layers.push(layer);
        }
        options.push(format!("lowerdir={}", short.join(":")));
    }
    let length = length(&options);
    if length > MOST_OPTIONS { Err(Error::Options(length)) } else { Ok((options, layers)) }
}

/// The paths of an overlay's `lowerdir`, in which a backslash takes the next character's meaning.
fn split_layers(lower: &str) -> Vec<PathBuf> {
    let mut layers = vec![String::new()];
    let mut characters = lower.chars();
    while let Some(character) = characters.next() {
        let last = layers.last_mut();
        match (character, last) {
            (':', _) => layers.push(String::new()),
            ('\\', Some(layer)) => layer.extend(characters.next()),
            (other, Some(layer)) => layer.push(other),
            (_, None) => {}
        }
    }
    layers.into_iter().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, thread};

    use super::*;

    /// Runs `test` as the shim runs, in a mount namespace of its own, with the path of a share to be made.
    fn in_a_namespace(test: impl FnOnce(&Path) + Send) {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        // The namespace is the thread's.
        thread::scope(|scope| {
            scope.spawn(|| test(&dir.path().join("share"))).join().unwrap();
        });
    }

    fn bind(source: &Path, name: &str) -> Bind {
        let file = open_source(source).unwrap();
        Bind {
            source: source.to_owned(),
            file,
            is_dir: source.is_dir(),
            name: name.into(),
            readonly: ReadOnly::No,
            recursive: true,
            propagation: Propagation::Slave,
            is_etc_file: false,
        }
    }

    fn tmpfs(target: &Path) {
        fs::create_dir_all(target).unwrap();
        mount(Some("t"), target, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    }

    fn attributes(path: &Path) -> u64 {
        nix::sys::statvfs::statvfs(path).unwrap().flags().bits()
    }

    const HARMLESS_FLAGS: u64 = libc::ST_NODEV | libc::ST_NOSUID | libc::ST_NOEXEC;

    /// A share without a file system of its own: for what mounts nothing.
    fn unmounted(path: &Path) -> Share {
        let root = fs::File::open(path).unwrap().into();
        let (places, watched, stages) = Default::default();
        Share { path: path.to_owned(), root, places, watched, stages }
    }

    #[test]
    fn a_container_has_one_directory_of_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let share = unmounted(dir.path());
        for id in ["..", ".", "", "a/b", "/", "/a", "a/", "./a"] {
            assert!(matches!(share.place(id), Err(Error::Id(named)) if named == id), "{id}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        drop(share.place("...").unwrap());
        drop(share.place("a b").unwrap());
        assert!(dir.path().join("...").is_dir() && dir.path().join("a b").is_dir());
        for id in ["...", "a b"] {
            share.remove(id).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        share.remove("a b").unwrap();
    }

    #[test]
    fn a_place_that_is_a_link_is_neither_used_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, host) = (dir.path().join("share"), dir.path().join("host"));
        for path in [&path, &host] {
            fs::create_dir(path).unwrap();
        }
        fs::write(host.join("mount0"), "kept").unwrap();
        symlink(&host, path.join("c1")).unwrap();
        let share = unmounted(&path);
        assert!(matches!(share.place("c1"), Err(Error::Path { action: "open", .. })));
        assert!(matches!(share.remove("c1"), Err(Error::Path { action: "open", .. })));
        assert_eq!(fs::read_to_string(host.join("mount0")).unwrap(), "kept");
    }

    #[test]
    fn a_removed_container_has_no_place_for_what_comes_late() {
        let dir = tempfile::tempdir().unwrap();
        let share = unmounted(dir.path());
        let place = share.place("c1").unwrap();
        assert!(matches!(&*lock(&place.live), Live::Yes(volumes) if volumes.is_empty()));
        assert!(!share.has_followers());
        share.remove("c1").unwrap();
        assert!(matches!(&*lock(&place.live), Live::No));
        // A later one of this name is another one.
        let later = share.place("c1").unwrap();
        assert!(matches!(&*lock(&later.live), Live::Yes(_)));
        assert!(matches!(&*lock(&place.live), Live::No));
    }

    #[test]
    fn the_hosts_mounts_are_followed_once() {
        let dir = tempfile::tempdir().unwrap();
        let share = unmounted(dir.path());
        assert_eq!([(); 3].map(|()| share.claim_watch()), [true, false, false]);
    }

    #[test]
    fn layers_are_split_where_overlayfs_splits_them() {
        let split = |lower: &str| -> Vec<String> {
            split_layers(lower).into_iter().map(|layer| layer.display().to_string()).collect()
        };
        assert_eq!(split("/a"), ["/a"]);
        assert_eq!(split("/a:/b:/c"), ["/a", "/b", "/c"]);
        assert_eq!(split(r"/a\:b:/c"), ["/a:b", "/c"]);
        assert_eq!(split(r"/a\\:/b"), [r"/a\", "/b"]);
        assert_eq!(split(r"/a\"), ["/a"]);
        assert_eq!(split("/ä:/b c"), ["/ä", "/b c"]);
    }

    /// An overlay of `count` layers below `dir`, which makes those of them that `made` names.
    fn overlay(dir: &Path, count: usize, made: impl Fn(usize) -> bool) -> Mount {
        let mut lower = Vec::new();
        for n in 0..count {
            let layer = dir.join(format!("{n}-{}", "y".repeat(150)));
            if made(n) {
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join("number"), n.to_string()).unwrap();
            }
            lower.push(layer.display().to_string());
        }
        let options = ["index=off".into(), format!("lowerdir={}", lower.join(":")), "upperdir=/u".into()];
        Mount { type_: "overlay".into(), options: options.into(), ..Default::default() }
    }

    #[test]
    fn options_that_fit_or_are_not_an_overlays_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        // None of the layers is there: nobody looks.
        let short = overlay(dir.path(), 2, |_| false);
        let long = Mount { type_: "other".into(), ..overlay(dir.path(), 60, |_| false) };
        for mount in [short, long] {
            let (options, layers) = within_a_page(&mount).unwrap();
            assert_eq!((options, layers.len()), (mount.options, 0));
        }
    }

    #[test]
    fn long_options_name_the_same_layers_in_their_order_by_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let (options, layers) = within_a_page(&overlay(dir.path(), 60, |_| true)).unwrap();
        assert_eq!((options[0].as_str(), options[2].as_str(), options.len()), ("index=off", "upperdir=/u", 3));
        assert!(options.iter().map(|option| option.len() + 1).sum::<usize>() <= MOST_OPTIONS);
        let lower = split_layers(options[1].strip_prefix("lowerdir=").unwrap());
        assert_eq!((lower.len(), layers.len()), (60, 60));
        for (n, layer) in lower.iter().enumerate() {
            assert_eq!(fs::read_to_string(layer.join("number")).unwrap(), n.to_string());
        }
    }

    #[test]
    fn layers_that_are_too_many_or_missing_are_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = within_a_page(&overlay(dir.path(), 60, |n| n != 7)).unwrap_err();
        let Error::Path { action: "open layer", path, source } = error else { panic!("{error}") };
        assert!(path.starts_with(dir.path().join(format!("7-{}", "y".repeat(150)))), "{}", path.display());
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
        let mut many = overlay(dir.path(), 1, |_| true);
        many.options.push("x".repeat(MOST_OPTIONS));
        assert!(matches!(within_a_page(&many), Err(Error::Options(length)) if length > MOST_OPTIONS));
    }

    #[test]
    fn what_is_shared_is_harmless_and_goes_with_its_container() {
        in_a_namespace(|path| {
            let parent = path.parent().unwrap();
            let share = Share::create(path.to_owned()).unwrap();
            let volume = parent.join("volume");
            tmpfs(&volume.join("below"));
            fs::write(volume.join("file"), "text").unwrap();
            let root = Mount { type_: "tmpfs".into(), source: "root".into(), ..Default::default() };
            let place = share.place("c1").unwrap();
            place.mount_rootfs(&[root], Path::new("/")).unwrap();
            place.bind(&bind(&volume, "mount0")).unwrap();
            place.bind(&bind(&volume.join("file"), "mount1")).unwrap();
            for name in ["rootfs", "mount0", "mount0/below", "mount1"] {
                let flags = attributes(&path.join("c1").join(name));
                assert_eq!(flags & HARMLESS_FLAGS, HARMLESS_FLAGS, "{name}: {flags:x}");
            }
            assert!(!parent.join("stage-0").exists());
            share.remove("c1").unwrap();
            assert_eq!(fs::read_dir(path).unwrap().count(), 0);
            assert_eq!(fs::read_to_string(volume.join("file")).unwrap(), "text");
            share.remove("c1").unwrap();
        });
    }

    #[test]
    fn a_link_in_the_place_of_a_containers_directory_leads_nowhere() {
        in_a_namespace(|path| {
            let host = path.with_file_name("host");
            fs::create_dir_all(host.join("rootfs")).unwrap();
            fs::write(host.join("mount0"), "kept").unwrap();
            let share = Share::create(path.to_owned()).unwrap();
            drop(share.place("c1").unwrap());
            fs::rename(path.join("c1"), path.join("away")).unwrap();
            symlink(&host, path.join("c1")).unwrap();
            assert!(share.remove("c1").is_err() && share.place("c1").is_err());
            assert_eq!(fs::read_to_string(host.join("mount0")).unwrap(), "kept");
            assert!(host.join("rootfs").is_dir());
            for id in ["..", ".", "", "a/b", "/"] {
                assert!(matches!(share.place(id), Err(Error::Id(_))), "{id}");
            }
        });
    }

    #[test]
    fn nothing_is_mounted_for_a_container_that_is_gone() {
        in_a_namespace(|path| {
            let share = Share::create(path.to_owned()).unwrap();
            let volume = path.with_file_name("volume");
            fs::create_dir(&volume).unwrap();
            let place = share.place("c1").unwrap();
            share.remove("c1").unwrap();
            assert!(matches!(place.bind(&bind(&volume, "mount0")), Err(Error::Gone)));
            assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        });
    }

    #[test]
    fn read_only_and_propagation_are_what_was_asked_for() {
        in_a_namespace(|path| {
            const NONE: Option<&str> = None;
            let share = Share::create(path.to_owned()).unwrap();
            // The host's side: a shared mount, of which a bind is made.
            let volume = path.with_file_name("volume");
            tmpfs(&volume);
            mount(NONE, &volume, NONE, MsFlags::MS_SHARED, NONE).unwrap();
            tmpfs(&volume.join("early"));
            let place = share.place("c1").unwrap();
            let variants: [(&str, ReadOnly, Propagation); 3] = [
                ("mount0", ReadOnly::Top, Propagation::Slave),
                ("mount1", ReadOnly::All, Propagation::Private),
                ("mount2", ReadOnly::No, Propagation::Private),
            ];
            for (name, readonly, propagation) in variants {
                place.bind(&Bind { readonly, propagation, ..bind(&volume, name) }).unwrap();
            }
            assert!(share.has_followers());
            tmpfs(&volume.join("late"));
            tmpfs(&volume.join("late/deep"));
            share.follow().unwrap();
            let seen = |name: &str| {
                fs::metadata(path.join("c1").join(name).join("late")).is_ok_and(|late| {
                    use std::os::unix::fs::MetadataExt;
                    late.dev() != fs::metadata(path.join("c1").join(name)).unwrap().dev()
                })
            };
            assert_eq!(["mount0", "mount1", "mount2"].map(seen), [true, false, false]);
            let writable = |name: &str| fs::write(path.join("c1").join(name), "").is_ok();
            assert_eq!(["mount0/x", "mount0/early/x"].map(writable), [false, true]);
            assert_eq!(["mount1/x", "mount1/early/x"].map(writable), [false, false]);
            assert_eq!(["mount2/x", "mount2/early/x"].map(writable), [true, true]);
            // What the guest has open does not keep the host from unmounting.
            let held =
                ["early", "late", "late/deep"].map(|name| fs::File::open(path.join("c1/mount0").join(name)).unwrap());
            for name in ["late/deep", "late", "early"] {
                nix::mount::umount(&volume.join(name)).unwrap();
            }
            drop(held);
            share.follow().unwrap();
            assert!(!seen("mount0"));
            assert!(!writable("mount0/early/x"));
            // A name of another mount, and what the guest has put in the place of a mount point.
            let odd = volume.join("with space");
            tmpfs(&odd);
            share.follow().unwrap();
            fs::write(odd.join("file"), "").unwrap();
            assert!(path.join("c1/mount0/with space/file").exists());
            share.remove("c1").unwrap();
            share.follow().unwrap();
            assert_eq!(fs::read_dir(path).unwrap().count(), 0);
        });
    }

    #[test]
    fn layers_with_long_paths_fit_into_a_page() {
        in_a_namespace(|path| {
            let parent = path.parent().unwrap();
            let share = Share::create(path.to_owned()).unwrap();
            let base = parent.join("x".repeat(120));
            // overlayfs takes no overlay as its upper directory, which the temporary directory may be on.
            tmpfs(&base);
            let mut lower = Vec::new();
            for n in 0..60 {
                let layer = base.join(format!("{n}:{}", "y".repeat(60)));
                fs::create_dir(&layer).unwrap();
                fs::write(layer.join(format!("f{n}")), "").unwrap();
                lower.push(layer.display().to_string().replace(':', "\\:"));
            }
            for name in ["upper", "work"] {
                fs::create_dir(base.join(name)).unwrap();
            }
            let options = [
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={}", base.join("upper").display()),
                format!("workdir={}", base.join("work").display()),
            ];
            let overlay = Mount {
                type_: "overlay".into(),
                source: "overlay".into(),
                options: options.into(),
                ..Default::default()
            };
            let before = std::env::current_dir().unwrap();
            let place = share.place("c1").unwrap();
            match place.mount_rootfs(&[overlay], Path::new("/")) {
                Err(Error::Rootfs { source, .. }) if source.to_string().contains("ENODEV") => {
                    return vz_tally::skip!(test: "host::share::tests::layers_with_long_paths_fit_into_a_page", "no overlayfs");
                }
                other => other.unwrap(),
            }
            let rootfs = path.join("c1/rootfs");
            assert!((0..60).all(|n| rootfs.join(format!("f{n}")).exists()));
            assert_eq!(std::env::current_dir().unwrap(), before);
        });
    }

    #[test]
    fn a_mount_within_an_image_stays_in_it() {
        in_a_namespace(|path| {
            let host = path.with_file_name("host");
            fs::create_dir(&host).unwrap();
            let image = path.with_file_name("image");
            fs::create_dir_all(image.join("inner")).unwrap();
            fs::write(image.join("inner/image"), "").unwrap();
            symlink(&host, image.join("link")).unwrap();
            symlink("/inner", image.join("good")).unwrap();
            let share = Share::create(path.to_owned()).unwrap();
            let below = |target: &str| {
                let place = share.place("c1").unwrap();
                let root = Mount {
                    type_: "bind".into(),
                    source: image.display().to_string(),
                    options: vec!["rbind".into()],
                    ..Default::default()
                };
                let inner =
                    Mount { type_: "tmpfs".into(), source: "t".into(), target: target.into(), ..Default::default() };
                let done = place.mount_rootfs(&[root, inner], Path::new("/"));
                let mounted = fs::read_to_string(path.join("c1/rootfs/inner/image")).is_err();
                share.remove("c1").unwrap();
                (done.is_ok(), mounted)
            };
            assert_eq!(below("/good"), (true, true));
            assert!(!below("/link").0);
            assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
        });
    }
}
