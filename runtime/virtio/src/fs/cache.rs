//! Which opened files may keep the pages that the guest has cached, and what closing them costs.
//!
//! By default every open drops a file's cached pages, since the host may have changed it: each program start would read
//! its libraries again, and drop them under everybody who has them mapped. A file that is the same as when it was
//! opened before may keep its pages. "The same" is inode change time, modification time and size; the change time moves
//! with every write, whatever `cp -p` or `touch` make of the other.
//!
//! Time stamps are coarse: two writes within one tick look like one. So a file counts only where its last change is
//! [`QUIET`] ago at both opens, by which time a further change must show.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::{filesystem::OpenOptions, fuse::Attr};

/// Much longer than any file system's tick.
const QUIET: Duration = Duration::from_secs(2);

/// What tells two states of a file apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    changed: (u64, u32),
    modified: (u64, u32),
}

/// Options for a file that is opened with these flags and had these attributes right before, at `now`. `known` is how
/// it was when the guest opened it last.
pub(super) fn options(known: &mut Option<Stamp>, flags: u32, attr: &Attr, now: SystemTime) -> OpenOptions {
    let flags = flags.cast_signed();
    let mut options = OpenOptions::empty();
    // There is nothing to report at the end of reading.
    options.set(OpenOptions::NOFLUSH, flags & libc::O_ACCMODE == libc::O_RDONLY);
    let stamp =
        Stamp { size: attr.size, changed: (attr.ctime, attr.ctimensec), modified: (attr.mtime, attr.mtimensec) };
    if flags & libc::O_TRUNC != 0 || !is_quiet(stamp.changed, now) {
        *known = None;
    } else {
        options.set(OpenOptions::KEEP_CACHE, known.replace(stamp) == Some(stamp));
    }
    options
}

fn is_quiet((seconds, nanos): (u64, u32), now: SystemTime) -> bool {
    UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanos.min(999_999_999)))
        .and_then(|changed| now.duration_since(changed).ok())
        .is_some_and(|age| age >= QUIET)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(ctime: u64) -> Attr {
        Attr { size: 10, ctime, mtime: 5, ..Attr::default() }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    const READ: u32 = 0;

    #[test]
    fn pages_are_kept_from_the_second_open_of_a_quiet_file_on() {
        let mut known = None;
        let mut keeps = |attr: &Attr, now| options(&mut known, READ, attr, now).contains(OpenOptions::KEEP_CACHE);
        assert!(!keeps(&file(100), at(101)));
        assert!(!keeps(&file(100), at(102)));
        assert!(keeps(&file(100), at(102)));
        assert!(keeps(&file(100), at(5000)));
        // Changed: not before it is quiet again, and then not the first time.
        assert!(!keeps(&file(5001), at(5001)));
        assert!(!keeps(&file(5001), at(6000)));
        assert!(keeps(&file(5001), at(6000)));
        assert!(!keeps(&Attr { size: 11, ..file(5001) }, at(6000)));
        // A clock that was set back, or a file of the future.
        assert!(!keeps(&file(9000), at(6000)));
        assert!(!keeps(&file(u64::MAX), at(6000)));
    }

    #[test]
    fn truncated_files_start_over() {
        let mut known = None;
        let mut keeps = |flags: i32| {
            options(&mut known, flags.cast_unsigned(), &file(1), at(100)).contains(OpenOptions::KEEP_CACHE)
        };
        assert!(!keeps(libc::O_RDONLY) && keeps(libc::O_RDWR));
        assert!(!keeps(libc::O_RDWR | libc::O_TRUNC) && !keeps(libc::O_RDONLY) && keeps(libc::O_RDONLY));
    }

    #[test]
    fn only_readers_need_no_flush() {
        for (flags, wanted) in [(libc::O_RDONLY, true), (libc::O_WRONLY, false), (libc::O_RDWR, false)] {
            let options = options(&mut None, flags.cast_unsigned(), &file(1), at(100));
            assert_eq!(options.contains(OpenOptions::NOFLUSH), wanted);
        }
    }
}
