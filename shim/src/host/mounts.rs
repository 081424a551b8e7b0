//! The mounts of this thread's mount namespace (proc_pid_mountinfo(5)), and what holds for each that is shared.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::OpenOptionsExt,
        },
    },
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;
use procfs::{
    FromRead,
    process::{MountInfo, MountInfos},
};

/// What a mount that the guest reaches never does on the host: the guest has its own devices, programs and privileges.
pub const HARMLESS: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its id, which is another's after its end.
    pub id: i32,
    /// Where it is mounted.
    pub point: PathBuf,
}

impl From<MountInfo> for Entry {
    fn from(mount: MountInfo) -> Self {
        Self { id: mount.mnt_id, point: unescape(mount.mount_point.as_os_str().as_bytes()) }
    }
}

/// All mounts, in the order in which the kernel lists them: parents first.
pub fn read() -> io::Result<Vec<Entry>> {
    let table = MountInfos::from_file("/proc/thread-self/mountinfo").map_err(io::Error::other)?;
    Ok(table.0.into_iter().map(Entry::from).collect())
}

/// A path as it is: the kernel writes space, tab, line feed and backslash as three octal digits, which procfs leaves
/// so.
fn unescape(text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let value = digits.map(|digits| digits.iter().fold(0u32, |value, digit| value * 8 + u32::from(digit - b'0')));
        match value.and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &after[3..];
            }
            None => {
                path.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

/// Opens the source of a bind, once: the link, if it is one, is followed here. What has this descriptor decides on all
/// else.
pub fn open_source(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH.bits();
    fs::File::options().read(true).custom_flags(flags).open(path).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_unescaped() {
        for (text, path) in [
            ("/plain", "/plain"),
            (r"/with\040a\011tab\134and\012more", "/with a\ttab\\and\nmore"),
            (r"/not\9\04", r"/not\9\04"),
            (r"/big\777", r"/big\777"),
        ] {
            assert_eq!(unescape(text.as_bytes()), PathBuf::from(path), "{text}");
        }
    }

    #[test]
    fn this_namespace_has_a_root() {
        assert!(read().unwrap().iter().any(|mount| mount.point.as_path() == Path::new("/")));
    }
}
