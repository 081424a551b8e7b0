//! The sandbox's socket: who may listen on it, and who may take it away.
//!
//! A path says nothing about whose socket is there by now. So a socket is known by its inode too, and whoever makes,
//! judges or removes one holds a lock meanwhile: of two members of a sandbox that start at once one listens and the
//! other finds it listening, and a dead sandbox's clean-up never removes a living one's socket.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::UnixListener,
        },
    },
    path::Path,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};

/// Held by one process of the host at a time, for a few system calls, none of which waits.
///
/// It is vz's own directory that is locked. The socket's belongs to whoever calls the shim, and may be locked by them
/// while they wait for it, as the command line `vz` does.
fn lock() -> io::Result<Flock<File>> {
    let temporary = std::env::temp_dir();
    // Unit tests need not be root.
    let dir = if cfg!(test) { temporary.as_path() } else { Path::new(vz_state::ROOT) };
    fs::create_dir_all(dir)?;
    Flock::lock(File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// Listens at `path`, in the place of a socket on which nobody listens any more. `None` if somebody does.
pub fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let _lock = lock()?;
    match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map(Some),
    }
    if is_alive(path)? {
        return Ok(None);
    }
    fs::remove_file(path)?;
    UnixListener::bind(path).map(Some)
}

/// Whether somebody listens at `path`. Does not wait for them to accept.
fn is_alive(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(client.as_raw_fd(), &UnixAddr::new(path)?) {
        // With EAGAIN, there are more who wait to be accepted than the listener wants.
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// By what a socket is known beside its path.
pub fn inode(path: &Path) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
}

/// Removes the socket at `path`, unless it is another one than that with this inode by now. One that is gone is no
/// error.
pub fn remove(path: &Path, wanted: Option<u64>) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let _lock = lock()?;
    if let Some(wanted) = wanted {
        match fs::symlink_metadata(path) {
            Ok(found) if found.ino() == wanted && found.file_type().is_socket() => {}
            Ok(_) => return Ok(()),
            Err(e) => return gone(Err(e)),
        }
    }
    gone(fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, sync::Barrier, thread};

    use nix::sys::socket::bind;

    use super::*;

    /// Bound and not listening, which is what a dead listener's socket looks like. (A dropped listener may live on for
    /// a moment in a child that another test has just forked.)
    fn dead(path: &Path) -> std::os::fd::OwnedFd {
        let dead = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(dead.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        dead
    }

    #[test]
    fn a_dead_sandboxs_socket_is_taken_over_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let living = dir.path().join("s/living");
        let _listener = listen(&living).unwrap().unwrap();
        assert!(listen(&living).unwrap().is_none());
        let path = dir.path().join("s/dead");
        let _dead = dead(&path);
        assert!(listen(&path).unwrap().is_some());
    }

    #[test]
    fn of_many_who_start_at_once_one_listens() {
        const MEMBERS: usize = 8;
        let dir = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = dir.path().join(format!("s{round}"));
            let _dead = dead(&path);
            let barrier = Barrier::new(MEMBERS);
            let listeners: Vec<_> = thread::scope(|scope| {
                let member = || {
                    barrier.wait();
                    listen(&path).unwrap()
                };
                let members: Vec<_> = (0..MEMBERS).map(|_| scope.spawn(member)).collect();
                members.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(listeners.len(), 1, "in round {round}");
            // The one at the path is that one's.
            let _client = UnixStream::connect(&path).unwrap();
            listeners[0].set_nonblocking(true).unwrap();
            assert!(listeners[0].accept().is_ok());
        }
    }

    #[test]
    fn a_listener_that_accepts_nobody_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = dead(&path);
        nix::sys::socket::listen(&bound, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _waiting: Vec<_> = (0..3).map(|_| is_alive(&path).unwrap()).collect();
        let full: Vec<_> = std::iter::from_fn(|| {
            let client = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
            connect(client.as_raw_fd(), &UnixAddr::new(&path).unwrap()).ok().map(|()| client)
        })
        .take(100)
        .collect();
        assert!(full.len() < 100 && is_alive(&path).unwrap());
    }

    #[test]
    fn only_the_socket_that_was_meant_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _first = dead(&path);
        let first = inode(&path).unwrap();
        // Another one in its place, while the first one still exists.
        fs::rename(&path, dir.path().join("old")).unwrap();
        let _second = listen(&path).unwrap().unwrap();
        remove(&path, Some(first)).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        remove(&path, Some(inode(&path).unwrap())).unwrap();
        assert!(!path.exists());
        remove(&path, Some(first)).unwrap();
        remove(&path, None).unwrap();
        remove(&dir.path().join("no/s"), None).unwrap();
    }
}
