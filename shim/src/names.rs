//! /etc/hosts, /etc/resolv.conf and /etc/hostname of a container, kept as their owner has them on the host.
//!
//! Such a file is bound by itself, so whatever its owner writes into it is seen. An owner who writes another file and moves
//! it over the old one leaves the container with the old one, as with any bind: then what the new one has is written into
//! the old one.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor},
};
use tokio::{io::unix::AsyncFd, task::JoinHandle};

/// Where containers have these files.
pub const PATHS: [&str; 3] = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];
/// Bytes that are taken of a file; what people have in there is a thousandth of it.
const MOST: u64 = 1 << 20;

/// Keeps a container's files up to date until it is dropped.
#[derive(Debug)]
pub struct Names(JoinHandle<()>);

#[derive(Debug)]
struct Kept {
    source: PathBuf,
    dir: WatchDescriptor,
    name: OsString,
    /// The file that the container sees.
    bound: File,
}

struct Events(Inotify);

impl Names {
    /// Keeps the files at these paths of the host, which have just been bound. Nothing where there are none.
    pub fn keep(sources: &[PathBuf]) -> io::Result<Option<Self>> {
        if sources.is_empty() {
            return Ok(None);
        }
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let mut kept = Vec::new();
        for source in sources {
            // The link, if it is one, was followed for the bind too.
            let source = fs::canonicalize(source)?;
            let (Some(dir), Some(name)) = (source.parent(), source.file_name()) else { continue };
            let bound = match File::options().read(true).write(true).open(&source) {
                // Nothing can be moved over it either.
                Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => continue,
                other => other?,
            };
            let dir = inotify.add_watch(dir, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE)?;
            kept.push(Kept { dir, name: name.to_owned(), bound, source });
        }
        let events = crate::fd::watch(Events(inotify))?;
        Ok(Some(Self(tokio::spawn(follow(events, kept)))))
    }
}

impl Drop for Names {
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

async fn follow(events: AsyncFd<Events>, kept: Vec<Kept>) {
    loop {
        let mut ready = match events.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "watch names"),
        };
        let news = match events.get_ref().0.read_events() {
            Ok(news) => news,
            Err(Errno::EAGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(error) => return tracing::error!(%error, "watch names"),
        };
        for kept in &kept {
            let is = |wd: WatchDescriptor, name: &Option<OsString>| wd == kept.dir && name.as_ref() == Some(&kept.name);
            if news.iter().any(|event| is(event.wd, &event.name))
                && let Err(error) = kept.refresh()
            {
                tracing::warn!(%error, path = %kept.source.display(), "container keeps an old version of its file");
            }
        }
    }
}

impl Kept {
    fn refresh(&self) -> io::Result<()> {
        let new = match File::open(&self.source) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino()));
        if id(&new)? == id(&self.bound)? {
            return Ok(());
        }
        let mut text = Vec::new();
        new.take(MOST).read_to_end(&mut text)?;
        self.bound.write_all_at(&text, 0)?;
        self.bound.set_len(text.len() as u64)
    }
}

/// Whether a container has one of these files at a path.
pub fn is_name(destination: &Path) -> bool {
    PATHS.iter().any(|path| destination == Path::new(path))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_file_that_is_moved_over_another_is_written_into_it() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("hosts");
        fs::write(&source, "old, and longer\n").unwrap();
        // What the container sees.
        let bound = File::open(&source).unwrap();
        let seen = || {
            let mut text = vec![0; bound.metadata().unwrap().len() as usize];
            bound.read_exact_at(&mut text, 0).map(|()| String::from_utf8(text).unwrap())
        };
        let _names = Names::keep(std::slice::from_ref(&source)).unwrap().unwrap();
        for text in ["new\n", "newer\n"] {
            fs::write(dir.path().join("next"), text).unwrap();
            fs::rename(dir.path().join("next"), &source).unwrap();
            let found = async {
                while seen().ok().as_deref() != Some(text) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), found).await.unwrap();
        }
        // In place, into the file that the container does not see.
        fs::write(&source, "last\n").unwrap();
        let found = async {
            while seen().ok().as_deref() != Some("last\n") {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), found).await.unwrap();
    }
}
