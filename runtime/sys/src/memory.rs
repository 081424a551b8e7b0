//! Guest memory: vectored I/O straight into it, and giving it back to the host.
//!
//! Guest memory is shared with a guest that writes to it at any time, so no reference to it exists: a [`VolatileSlice`]
//! is a pointer whose validity its mapping guarantees.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    errno::Errno,
    unistd::{SysconfVar, sysconf},
};
use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

/// Pieces that one call of [`readv`] or [`writev`] takes; more are left out.
pub const MAX_PIECES: usize = 1024;

/// How the pages of a mapping are given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Private and anonymous: pages are dropped.
    Private,
    /// Shared, of a memfd or tmpfs: a hole is punched, which is what all its mappings see.
    Shared,
}

/// Reads into pieces of memory, at the file's position or, where one is given, at an offset.
pub fn readv<B: BitmapSlice>(
    file: impl AsFd,
    pieces: &[VolatileSlice<'_, B>],
    offset: Option<u64>,
) -> io::Result<usize> {
    let file = file.as_fd().as_raw_fd();
    let iovecs = iovecs(pieces);
    let count = i32::try_from(iovecs.len()).map_err(|_| Errno::EINVAL)?;
    let offset = offset.map(libc::off64_t::try_from).transpose().map_err(|_| Errno::EINVAL)?;
    // SAFETY: each iovec is the memory of a VolatileSlice, valid for writes for the slice's life, which `pieces` holds
    // for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe {
        match offset {
            Some(offset) => libc::preadv64(file, iovecs.as_ptr(), count, offset),
            None => libc::readv(file, iovecs.as_ptr(), count),
        }
    };
    let done = usize::try_from(Errno::result(done)?).unwrap_or(0);
    let mut left = done;
    for piece in pieces {
        let part = piece.len().min(left);
        piece.bitmap().mark_dirty(0, part);
        left = left.saturating_sub(part);
    }
    Ok(done)
}

/// Writes from pieces of memory, at the file's position or, where one is given, at an offset.
pub fn writev<B: BitmapSlice>(
    file: impl AsFd,
    pieces: &[VolatileSlice<'_, B>],
    offset: Option<u64>,
) -> io::Result<usize> {
    let file = file.as_fd().as_raw_fd();
    let iovecs = iovecs(pieces);
    let count = i32::try_from(iovecs.len()).map_err(|_| Errno::EINVAL)?;
    let offset = offset.map(libc::off64_t::try_from).transpose().map_err(|_| Errno::EINVAL)?;
    // SAFETY: each iovec is the memory of a VolatileSlice, valid for reads for the slice's life, which `pieces` holds
    // for the whole call.
    #[allow(unsafe_code)]
    let done = unsafe {
        match offset {
            Some(offset) => libc::pwritev64(file, iovecs.as_ptr(), count, offset),
            None => libc::writev(file, iovecs.as_ptr(), count),
        }
    };
    Ok(usize::try_from(Errno::result(done)?).unwrap_or(0))
}

fn iovecs<B: BitmapSlice>(pieces: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    let iovec = |piece: &VolatileSlice<'_, B>| libc::iovec {
        // On Linux the guard is the pointer, and there is nothing to keep.
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    };
    pieces.iter().take(MAX_PIECES).map(iovec).collect()
}

/// Gives whole pages back to the host; they read as zeros afterwards.
///
/// A slice that is not whole pages is refused with `EINVAL`.
pub fn discard<B: BitmapSlice>(pages: &VolatileSlice<'_, B>, mapping: Mapping) -> io::Result<()> {
    let address = pages.ptr_guard_mut().as_ptr();
    let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| usize::try_from(size).ok()).ok_or(Errno::EINVAL)?;
    // The kernel would round the length up, beyond the slice.
    if !address.addr().is_multiple_of(page) || !pages.len().is_multiple_of(page) {
        return Err(Errno::EINVAL.into());
    }
    let advice = match mapping {
        Mapping::Private => libc::MADV_DONTNEED,
        Mapping::Shared => libc::MADV_REMOVE,
    };
    // SAFETY: the range is the slice's, whose holder may write to it: that it becomes zeros is a write. Its pages stay
    // mapped, so no pointer to them becomes invalid.
    #[allow(unsafe_code)]
    let done = unsafe { libc::madvise(address.cast(), pages.len(), advice) };
    Errno::result(done)?;
    pages.bitmap().mark_dirty(0, pages.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Seek,
        os::{fd::OwnedFd, unix::fs::MetadataExt},
    };

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};

    use super::*;

    fn file(size: u64) -> File {
        let fd: OwnedFd = memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(size).unwrap();
        file
    }

    fn slices<'a>(memory: &'a GuestMemoryMmap, parts: &[(u64, usize)]) -> Vec<VolatileSlice<'a>> {
        parts.iter().flat_map(|(at, len)| memory.get_slices(GuestAddress(*at), *len).map(Result::unwrap)).collect()
    }

    #[test]
    fn bytes_go_from_pieces_to_a_file_and_back() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let mut file = file(0);
        let from = slices(&memory, &[(10, 3), (100, 4)]);
        from[0].copy_from(b"abc".as_slice());
        from[1].copy_from(b"defg".as_slice());
        assert_eq!(writev(&file, &from, None).unwrap(), 7);
        assert_eq!(writev(&file, &from[1..], Some(100)).unwrap(), 4);
        file.rewind().unwrap();
        let to = slices(&memory, &[(200, 2), (300, 5)]);
        assert_eq!(readv(&file, &to, None).unwrap(), 7);
        let mut bytes = [0u8; 5];
        to[1].copy_to(&mut bytes[..]);
        assert_eq!(&bytes, b"cdefg");
        assert_eq!(readv(&file, &to, Some(102)).unwrap(), 2);
        to[0].copy_to(&mut bytes[..2]);
        assert_eq!(&bytes[..2], b"fg");
        assert_eq!(readv(&file, &to, Some(u64::MAX)).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn discarded_pages_are_zeros() {
        let private = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
        let shared_file = file(1 << 16);
        let backing = FileOffset::new(shared_file.try_clone().unwrap(), 0);
        let shared =
            GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(0), 1 << 16, Some(backing))]).unwrap();
        for (memory, mapping) in [(&private, Mapping::Private), (&shared, Mapping::Shared)] {
            let all = slices(memory, &[(0, 1 << 16)]);
            all[0].copy_from(vec![7u8; 1 << 16].as_slice());
            let blocks = || shared_file.metadata().unwrap().blocks();
            let before = blocks();
            discard(&slices(memory, &[(4096, 8192)])[0], mapping).unwrap();
            // A hole in the file, not zeros written to it. To look at it through the mapping will fill it.
            let punched = if mapping == Mapping::Shared { 16 } else { 0 };
            assert_eq!(before - blocks(), punched);
            let mut bytes = vec![0u8; 1 << 16];
            all[0].copy_to(&mut bytes[..]);
            let zeros: Vec<usize> = bytes.chunks(4096).map(|page| page.iter().filter(|b| **b == 0).count()).collect();
            assert_eq!(zeros[..4], [0, 4096, 4096, 0], "{mapping:?}");
            for part in [(1, 4096), (0, 4095), (0, 1)] {
                let refused = discard(&slices(memory, &[part])[0], mapping).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
            }
        }
    }
}
