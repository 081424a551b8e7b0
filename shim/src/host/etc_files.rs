//! /etc/hosts, /etc/resolv.conf and /etc/hostname of a container, kept as their owner has them on the host.
//!
//! Such a file is bound by itself, so whatever its owner writes into it is seen. An owner who moves another file over
//! it leaves the container with the old one, as with any bind. A VM cannot be shown another file in its place, so what
//! the new file has is then written into the old one, on three conditions:
//!
//! - the old file has no name left. `mv hosts hosts.bak; mv new hosts` must not change hosts.bak; the container follows
//!   once that name is gone too.
//! - its bind is writable. A file that is bound read-only is never opened for writing: the container keeps the old one.
//! - the new file is a regular file of at most [`MOST`] bytes, in the directory in which the old one was when it was
//!   bound.
//!
//! Threat: a container that can write in that directory, through a volume. It can put a link, a FIFO or a device in the
//! place of the file, replace it all the time, or make reading it hang. So the path is resolved once more after the
//! bind and counts only if it leads to the bound inode. From then on the directory's descriptor is used, no link is
//! followed, nothing but a regular file is opened, and files are touched on threads of their own.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::{
        inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor},
        stat::{Mode, SFlag, fstat, fstatat},
    },
};
use tokio::{
    io::unix::AsyncFd,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use vz_sys::rate::Limit;

/// Where containers have these files.
pub const PATHS: [&str; 3] = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];
/// Bytes of a file; what people have in there is a thousandth of it.
const MOST: u64 = 1 << 20;
/// Time between two looks: bounds the work that a container causes which replaces a file all the time.
const PAUSE: Duration = Duration::from_millis(100);
/// How long it may take to find the files, which a file system that hangs prevents.
const OPEN: Duration = Duration::from_secs(5);
/// Events that are taken at a time; the kernel queues about as many, and says if it has dropped some.
const EVENTS: usize = 1 << 14;
/// Lines of the log in ten seconds.
const COMPLAINTS: u32 = 5;

/// A file that has just been bound.
#[derive(Debug)]
pub struct Source {
    /// Its path on the host, as the spec has it.
    pub path: PathBuf,
    /// The file itself, through its bind.
    pub bound: OwnedFd,
    /// Whether it is bound read-only.
    pub readonly: bool,
}

/// Keeps a container's files up to date until it is dropped.
#[derive(Debug)]
pub struct EtcFiles(JoinHandle<()>);

#[derive(Debug)]
struct Kept {
    /// For messages.
    source: PathBuf,
    /// Where it was when it was bound, and under which name.
    dir: OwnedFd,
    name: OsString,
    /// The file that the container sees; `O_PATH`, so that it keeps no file system from being made read-only.
    bound: OwnedFd,
    id: (u64, u64),
    /// Watches of the directory and of the file.
    watches: [WatchDescriptor; 2],
}

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
enum News {
    /// It is still the bound one, or there is none.
    None,
    /// Its content is in the bound one now.
    Written,
    /// The bound one has a name still, and keeps its content.
    Named,
}

/// Why a container keeps an old version.
#[derive(Debug, thiserror::Error)]
enum Stale {
    #[error("it is not a regular file")]
    Kind,
    #[error("it has more than {MOST} bytes")]
    Size,
    #[error(transparent)]
    System(#[from] io::Error),
}

impl From<Errno> for Stale {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

#[derive(Debug)]
struct Events(Inotify);

impl EtcFiles {
    /// Keeps these files. `None` if there are none that can be replaced.
    pub async fn keep(sources: Vec<Source>) -> io::Result<Option<Self>> {
        if sources.is_empty() {
            return Ok(None);
        }
        let opened = timeout(OPEN, spawn_blocking(move || open(sources))).await;
        let (inotify, kept) = opened.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)??;
        if kept.is_empty() {
            return Ok(None);
        }
        let events = crate::fd::watch(Events(inotify))?;
        Ok(Some(Self(tokio::spawn(follow(events, kept)))))
    }
}

impl Drop for EtcFiles {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

fn open(sources: Vec<Source>) -> io::Result<(Inotify, Vec<Arc<Kept>>)> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let mut kept = Vec::new();
    for source in sources {
        if source.readonly {
            continue;
        }
        let path = source.path.clone();
        match Kept::open(source, &inotify) {
            Ok(Some(file)) => kept.push(Arc::new(file)),
            Ok(None) => {
                tracing::info!(path = %path.display(), "file was replaced while it was bound; it is not followed");
            }
            // Nothing can be moved over it either.
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
            Err(e) => return Err(e),
        }
    }
    Ok((inotify, kept))
}

impl Kept {
    /// `None` if the path leads to another file by now.
    fn open(source: Source, inotify: &Inotify) -> io::Result<Option<Self>> {
        let id = regular(source.bound.as_fd())?.ok_or(io::ErrorKind::InvalidInput)?;
        // A link is followed here, as it was for the bind. Which file that is was decided by the bind, not by this.
        let path = fs::canonicalize(&source.path)?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
        let dir = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(parent)?;
        match fstatat(&dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) if (found.st_dev, found.st_ino) == id => {}
            Ok(_) | Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        // Nothing of a file that has no name any more: what is written into the bound one would be news, again and
        // again.
        let only = AddWatchFlags::IN_ONLYDIR | AddWatchFlags::from_bits_retain(libc::IN_EXCL_UNLINK);
        let replaced = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE;
        let watches = [
            inotify.add_watch(&by_descriptor(dir.as_fd()), replaced | only)?,
            // Its number of names.
            inotify.add_watch(&by_descriptor(source.bound.as_fd()), AddWatchFlags::IN_ATTRIB)?,
        ];
        let (name, dir, bound) = (name.to_owned(), dir.into(), source.bound);
        Ok(Some(Self { source: source.path, dir, name, bound, id, watches }))
    }

    fn is_meant(&self, event: &InotifyEvent) -> bool {
        let [dir, bound] = self.watches;
        event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
            || event.wd == dir && event.name.as_deref() == Some(self.name.as_os_str())
            || event.wd == bound
    }

    /// Brings the bound file up to date. Blocks as long as the file system does.
    fn refresh(&self) -> Result<News, Stale> {
        let new = match find(self.dir.as_fd(), &self.name) {
            Err(Errno::ENOENT) => return Ok(News::None),
            other => other?,
        };
        let id = regular(new.as_fd())?.ok_or(Stale::Kind)?;
        if id == self.id {
            return Ok(News::None);
        }
        if fstat(&self.bound)?.st_nlink != 0 {
            return Ok(News::Named);
        }
        // What was looked at is what is opened: a descriptor does not come to mean another file.
        let new = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(by_descriptor(new.as_fd()))?;
        let mut text = Vec::new();
        new.take(MOST + 1).read_to_end(&mut text)?;
        if text.len() as u64 > MOST {
            return Err(Stale::Size);
        }
        // Without a name it never gets one again, and whoever has it open shares the container's view.
        let bound =
            File::options().write(true).custom_flags(libc::O_NONBLOCK).open(by_descriptor(self.bound.as_fd()))?;
        bound.write_all_at(&text, 0)?;
        bound.set_len(text.len() as u64)?;
        Ok(News::Written)
    }
}

/// A file in a directory, a link as itself. Opens nothing: a device or FIFO does not notice.
fn find(dir: BorrowedFd<'_>, name: &OsStr) -> nix::Result<OwnedFd> {
    openat(dir, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
}

/// Device and inode of a regular file; `None` for anything else.
fn regular(file: BorrowedFd<'_>) -> nix::Result<Option<(u64, u64)>> {
    let stat = fstat(file)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    Ok((kind == SFlag::S_IFREG).then_some((stat.st_dev, stat.st_ino)))
}

fn by_descriptor(file: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

async fn follow(events: AsyncFd<Events>, kept: Vec<Arc<Kept>>) {
    let complaints = Limit::new(COMPLAINTS);
    loop {
        let news = match read(&events).await {
            Ok(news) => news,
            Err(error) => return tracing::error!(%error, "watch names"),
        };
        for file in kept.iter().filter(|kept| news.iter().any(|event| kept.is_meant(event))) {
            let refreshing = file.clone();
            let refreshed = match spawn_blocking(move || refreshing.refresh()).await {
                Ok(refreshed) => refreshed,
                Err(error) => Err(Stale::System(io::Error::other(error))),
            };
            let why = match refreshed {
                Ok(News::None | News::Written) => continue,
                Ok(News::Named) => "its file has another name on the host".to_owned(),
                Err(error) => error.to_string(),
            };
            if complaints.admit().is_some() {
                let path = file.source.display();
                tracing::warn!(%path, why, "file was replaced, and the container keeps what it has");
            }
        }
        sleep(PAUSE).await;
    }
}

/// All events that there are; waits for the first.
async fn read(events: &AsyncFd<Events>) -> io::Result<Vec<InotifyEvent>> {
    let mut found = Vec::new();
    loop {
        let mut ready = events.readable().await?;
        match events.get_ref().0.read_events() {
            Ok(some) => {
                found.extend(some);
                if found.len() >= EVENTS {
                    return Ok(found);
                }
            }
            Err(Errno::EAGAIN) => {
                ready.clear_ready();
                if !found.is_empty() {
                    return Ok(found);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a container has one of these files at a path.
pub fn is_etc_file(destination: &Path) -> bool {
    PATHS.iter().any(|path| destination == Path::new(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    /// A directory with a file `hosts` that a container sees.
    struct Host {
        dir: tempfile::TempDir,
        bound: File,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("hosts"), "old, and longer\n").unwrap();
            let bound = File::open(dir.path().join("hosts")).unwrap();
            Self { dir, bound }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn source(&self, readonly: bool) -> Source {
            let bound = File::options().read(true).custom_flags(libc::O_PATH).open(self.path("hosts")).unwrap();
            Source { path: self.path("hosts"), bound: bound.into(), readonly }
        }

        fn kept(&self) -> Kept {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
            Kept::open(self.source(false), &inotify).unwrap().unwrap()
        }

        fn replace(&self, text: &str) {
            fs::write(self.path("next"), text).unwrap();
            fs::rename(self.path("next"), self.path("hosts")).unwrap();
        }

        fn seen(&self) -> String {
            let mut text = vec![0; self.bound.metadata().unwrap().len() as usize];
            match self.bound.read_exact_at(&mut text, 0) {
                Ok(()) => String::from_utf8(text).unwrap(),
                // It has just become shorter.
                Err(_) => String::new(),
            }
        }

        async fn sees(&self, text: &str) {
            let found = async {
                while self.seen() != text {
                    sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(Duration::from_secs(10), found).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_file_that_is_moved_over_another_is_written_into_it() {
        let host = Host::new();
        let _names = EtcFiles::keep(vec![host.source(false)]).await.unwrap().unwrap();
        for text in ["new\n", "newer\n"] {
            host.replace(text);
            host.sees(text).await;
        }
        // In place, into the file that the container does not see.
        fs::write(host.path("hosts"), "last\n").unwrap();
        host.sees("last\n").await;
        // What the container writes stays: nothing has happened on the host.
        sleep(2 * PAUSE).await;
        fs::write(by_descriptor(host.bound.as_fd()), "mine\n").unwrap();
        sleep(3 * PAUSE).await;
        assert_eq!(host.seen(), "mine\n");
    }

    #[tokio::test]
    async fn a_file_with_another_name_keeps_its_content_until_that_is_gone() {
        let host = Host::new();
        let _names = EtcFiles::keep(vec![host.source(false)]).await.unwrap().unwrap();
        fs::rename(host.path("hosts"), host.path("hosts.bak")).unwrap();
        host.replace("new\n");
        assert_eq!(host.kept_elsewhere().refresh().unwrap(), News::Named);
        assert_eq!(fs::read_to_string(host.path("hosts.bak")).unwrap(), "old, and longer\n");
        assert_eq!(host.seen(), "old, and longer\n");
        fs::remove_file(host.path("hosts.bak")).unwrap();
        host.sees("new\n").await;
    }

    impl Host {
        /// The bound file as [`Kept`] has it, after it was renamed to hosts.bak.
        fn kept_elsewhere(&self) -> Kept {
            let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).unwrap();
            let bound = File::options().read(true).custom_flags(libc::O_PATH).open(self.path("hosts.bak")).unwrap();
            let source = Source { path: self.path("hosts.bak"), bound: bound.into(), readonly: false };
            Kept { name: "hosts".into(), ..Kept::open(source, &inotify).unwrap().unwrap() }
        }
    }

    #[test]
    fn only_a_regular_file_is_looked_into() {
        let secret = tempfile::NamedTempFile::new().unwrap();
        fs::write(secret.path(), "secret\n").unwrap();
        let host = Host::new();
        let kept = host.kept();
        let hosts = host.path("hosts");
        fs::remove_file(&hosts).unwrap();
        assert_eq!(kept.refresh().unwrap(), News::None);
        let kinds: [&dyn Fn(); 4] = [
            &|| symlink(secret.path(), &hosts).unwrap(),
            // Nobody will ever write to it.
            &|| mkfifo(&hosts, Mode::S_IRWXU).unwrap(),
            &|| fs::create_dir(&hosts).unwrap(),
            &|| drop(std::os::unix::net::UnixListener::bind(&hosts).unwrap()),
        ];
        for make in kinds {
            make();
            assert!(matches!(kept.refresh(), Err(Stale::Kind)));
            assert_eq!(host.seen(), "old, and longer\n");
            if hosts.is_dir() { fs::remove_dir(&hosts).unwrap() } else { fs::remove_file(&hosts).unwrap() }
        }
        // Another directory in the place of the one that was held.
        host.replace("new\n");
        assert_eq!(kept.refresh().unwrap(), News::Written);
        assert_eq!(host.seen(), "new\n");
    }

    #[test]
    fn a_large_file_is_left_where_it_is() {
        let host = Host::new();
        let kept = host.kept();
        let text = "x".repeat(MOST as usize);
        host.replace(&text);
        assert_eq!(kept.refresh().unwrap(), News::Written);
        host.replace(&format!("{text}x"));
        assert!(matches!(kept.refresh(), Err(Stale::Size)));
        assert_eq!(host.seen(), text);
    }

    #[test]
    fn a_file_that_was_replaced_before_it_is_watched_is_not_followed() {
        let host = Host::new();
        let source = host.source(false);
        host.replace("another\n");
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        assert!(Kept::open(source, &inotify).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_file_that_is_bound_read_only_is_not_followed() {
        let host = Host::new();
        assert!(EtcFiles::keep(vec![host.source(true)]).await.unwrap().is_none());
        assert!(EtcFiles::keep(Vec::new()).await.unwrap().is_none());
    }
}
