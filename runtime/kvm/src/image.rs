//! A kernel's file as the loader reads it: what only fills it up takes no memory.
//!
//! With page table isolation Linux gives its entry code, a few KiB, a large page of its own and fills that up with
//! traps (`ALIGN_ENTRY_TEXT_END` in arch/x86/kernel/vmlinux.lds.S). Nothing ever touches them, so they stay in the
//! file, which is mapped in their place.
//!
//! The mapping is private: what the guest writes there is its own, and reaches no file. Giving such a page back
//! (MADV_DONTNEED) makes it the file's again and not zero, which no driver may rely on after it has given up a page
//! (virtio 1.3, 5.5.6). Whoever saves guest memory must read these pages like all others.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    num::NonZeroUsize,
    os::unix::fs::FileExt,
    ptr::NonNull,
};

use nix::{
    errno::Errno,
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap},
};
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice, bitmap::BitmapSlice};

use crate::memory::{LARGE_PAGE, PAGE};

/// INT3, with which Linux fills its text up.
const TRAP: u8 = 0xcc;
/// The filling is looked for at one place of so many bytes each.
const STEP: usize = 64 << 10;
/// How much of such a place is looked at.
const SAMPLE: usize = 64;
/// Filling that is worth it to have its large page in small ones.
const ENOUGH: usize = LARGE_PAGE / 2;

/// A kernel's file that is read into guest memory.
pub(crate) struct Image<'a> {
    file: &'a File,
}

impl<'a> Image<'a> {
    pub(crate) const fn new(file: &'a File) -> Self {
        Self { file }
    }

    /// How many bytes at the end of these of the file seem to be nothing but filling. A mistake costs time, and changes
    /// nothing: memory has what the file has, copied or mapped.
    fn filling(&self, start: u64, length: usize) -> io::Result<usize> {
        let mut bytes = [0; SAMPLE];
        let mut filling = 0;
        while let Some(rest) = length.checked_sub(filling).and_then(|rest| rest.checked_sub(STEP)) {
            self.file.read_exact_at(&mut bytes, start.saturating_add(rest as u64))?;
            if bytes != [TRAP; SAMPLE] {
                break;
            }
            filling = filling.saturating_add(STEP);
        }
        Ok(filling)
    }

    /// Reads what a large page of guest memory gets.
    fn read_large<B: BitmapSlice>(&mut self, page: &VolatileSlice<'_, B>) -> Result<(), VolatileMemoryError> {
        let file = VolatileMemoryError::IOError;
        let start = self.stream_position().map_err(file)?;
        let filling = if start.is_multiple_of(PAGE) { self.filling(start, page.len()).map_err(file)? } else { 0 };
        if filling < ENOUGH {
            return self.file.read_exact_volatile(&mut page.offset(0)?);
        }
        let used = page.len().saturating_sub(filling);
        small_pages(page).map_err(file)?;
        self.file.read_exact_volatile(&mut page.subslice(0, used)?)?;
        self.map(&page.offset(used)?).map_err(file)
    }

    /// Puts the file's next bytes in the place of memory, without reading them.
    fn map<B: BitmapSlice>(&mut self, memory: &VolatileSlice<'_, B>) -> io::Result<()> {
        let from = self.stream_position()?.try_into().map_err(io::Error::other)?;
        let length = NonZeroUsize::new(memory.len()).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        // SAFETY: guest memory is a mapping that stays for as long as this process lives, and nothing in Rust refers to
        // its content. The new one has its permissions, and stays as long.
        #[allow(unsafe_code)]
        unsafe { mmap(Some(host(memory)?.addr()), length, prot, flags, self.file, from) }?;
        self.seek(SeekFrom::Current(memory.len().try_into().map_err(io::Error::other)?))?;
        Ok(())
    }
}

/// Has what comes into this memory take small pages.
fn small_pages<B: BitmapSlice>(memory: &VolatileSlice<'_, B>) -> io::Result<()> {
    // SAFETY: the range is mapped, as guest memory; advice changes neither content nor permissions.
    #[allow(unsafe_code)]
    let advised = unsafe { madvise(host(memory)?.cast(), memory.len(), MmapAdvise::MADV_NOHUGEPAGE) };
    match advised {
        // A host without large pages has no others.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn host<B: BitmapSlice>(memory: &VolatileSlice<'_, B>) -> io::Result<NonNull<u8>> {
    NonNull::new(memory.ptr_guard_mut().as_ptr()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Read for Image<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.file.read(bytes)
    }
}

impl Seek for Image<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl ReadVolatile for Image<'_> {
    /// All of it, as a file's are read: what reads into guest memory takes less for an error.
    fn read_volatile<B: BitmapSlice>(&mut self, to: &mut VolatileSlice<'_, B>) -> Result<usize, VolatileMemoryError> {
        let mut done = 0;
        while done < to.len() {
            let rest = to.offset(done)?;
            let start = host(&rest).map_err(VolatileMemoryError::IOError)?.addr().get();
            let end = start.saturating_add(1).next_multiple_of(LARGE_PAGE);
            let mut page = rest.subslice(0, end.saturating_sub(start).min(rest.len()))?;
            if page.len() == LARGE_PAGE {
                self.read_large(&page)?;
            } else {
                self.file.read_exact_volatile(&mut page)?;
            }
            done = done.saturating_add(page.len());
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress, GuestMemory};

    use super::*;
    use crate::memory;

    /// Pages of this process's memory that are in use, as the kernel says.
    fn resident(host: *const u8, bytes: usize) -> usize {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut entries = vec![0; bytes / 4096 * 8];
        pagemap.read_exact_at(&mut entries, (host.addr() / 4096 * 8) as u64).unwrap();
        entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
    }

    /// What is read is what the file has, whatever it has; the pages that it takes in guest memory, by large page.
    fn check(content: &[u8], at: u64) -> Vec<usize> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file.write_all(content).unwrap();
        file.write_all(b"behind").unwrap();
        let memory = memory::reserve(16 << 20).unwrap();
        let mut image = Image::new(&file);
        image.seek(SeekFrom::Start(4096)).unwrap();
        memory.read_exact_volatile_from(GuestAddress(at), &mut image, content.len()).unwrap();
        let mut next = Vec::new();
        image.read_to_end(&mut next).unwrap();
        assert_eq!(next, b"behind");
        let host = memory.get_host_address(GuestAddress(0)).unwrap();
        let used = (0..8).map(|page| resident(host.wrapping_add(page * LARGE_PAGE), LARGE_PAGE)).collect();
        let mut read = vec![0; content.len()];
        memory.read_slice(&mut read, GuestAddress(at)).unwrap();
        assert!(read == content);
        used
    }

    #[test]
    fn filling_takes_no_memory() {
        const LARGE: u64 = LARGE_PAGE as u64;
        let mut content = vec![7; 3 * LARGE_PAGE];
        content[LARGE_PAGE + 5000..2 * LARGE_PAGE].fill(TRAP);
        let used = check(&content, 2 * LARGE);
        assert_eq!(used[2..5], [512, STEP / 4096, 512], "{used:?}");
    }

    #[test]
    fn other_content_is_copied() {
        const LARGE: u64 = LARGE_PAGE as u64;
        // Too little of it, in no large page of its own, not at its end.
        let mut content = vec![7; 2 * LARGE_PAGE];
        content[LARGE_PAGE + ENOUGH + 1..].fill(TRAP);
        assert_eq!(check(&content, LARGE)[2], 512);
        let content = vec![TRAP; LARGE_PAGE + 4096];
        assert_eq!(check(&content, LARGE - 4096)[1], 0);
        // All but the page that nothing was read into, where the host has no large pages.
        assert!(check(&content, LARGE + 4096)[1] >= 511);
        // Something else among it, whether it is seen or not.
        let mut content = vec![TRAP; LARGE_PAGE];
        content[LARGE_PAGE - STEP] = 0;
        assert_eq!(check(&content, LARGE)[1], 512);
        content[LARGE_PAGE - STEP] = TRAP;
        content[LARGE_PAGE - 1] = 0;
        check(&content, LARGE);
    }

    #[test]
    fn a_short_file_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![TRAP; LARGE_PAGE]).unwrap();
        let memory = memory::reserve(16 << 20).unwrap();
        let read = memory.read_exact_volatile_from(GuestAddress(0), &mut Image::new(&file), LARGE_PAGE + 1);
        assert!(read.is_err());
    }
}
