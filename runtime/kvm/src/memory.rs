//! Guest memory: private anonymous memory of this process, given to KVM as slots.

use std::{io, num::NonZeroUsize};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use nix::{
    errno::Errno,
    libc,
    sys::mman::{MapFlags, ProtFlags, mmap_anonymous},
};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap, MmapRegion, bitmap::NewBitmap};
use vz_virtio::Memory;

use crate::{
    Error,
    layout::{ABOVE_HOLE, LOW_MEMORY_END},
    register_page::RegisterPages,
};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of a large page.
pub(crate) const LARGE_PAGE: usize = 2 << 20;

/// The ranges of guest memory of this size: below the hole, and above it what does not fit there.
pub(crate) fn ranges(bytes: u64) -> Result<Vec<(GuestAddress, usize)>, Error> {
    let bad = || Error::MemorySize(bytes);
    if bytes == 0 || !bytes.is_multiple_of(PAGE) {
        return Err(bad());
    }
    let low = bytes.min(LOW_MEMORY_END);
    let mut ranges = vec![(GuestAddress(0), usize::try_from(low).map_err(|_| bad())?)];
    if let Some(high) = bytes.checked_sub(low).filter(|high| *high > 0) {
        ranges.push((GuestAddress(ABOVE_HOLE), usize::try_from(high).map_err(|_| bad())?));
    }
    Ok(ranges)
}

/// Reserves memory; nothing of it is used before the guest touches it.
///
/// It stays reserved for as long as the process lives, as KVM's slots need it.
pub(crate) fn reserve(bytes: u64) -> Result<Memory, Error> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Memory { bytes, source };
    let regions = ranges(bytes)?.into_iter().map(|(start, length)| {
        let mapping = map(length).map_err(|e| failed(e.into()))?;
        GuestRegionMmap::new(mapping, start).ok_or(Error::MemorySize(bytes))
    });
    Memory::from_regions(regions.collect::<Result<_, _>>()?).map_err(|e| failed(e.into()))
}

/// Memory that begins where a large page can, as all ranges of guest memory do: only where a large page of the host is
/// one of the guest's too, KVM gives it to the guest as one, with one fault in the place of 512. Hosts before Linux 6.7
/// map anywhere.
fn map<B: NewBitmap>(length: usize) -> io::Result<MmapRegion<B>> {
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    let with_slack = NonZeroUsize::new(length.saturating_add(LARGE_PAGE)).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a new mapping at an address of the kernel's choice: nothing else is there.
    #[allow(unsafe_code)]
    let mapping = unsafe { mmap_anonymous(None, with_slack, prot, flags) }?;
    let start = mapping.as_ptr().map_addr(|address| address.next_multiple_of(LARGE_PAGE)).cast::<u8>();
    // More than was asked for is no worse: a host without large pages says so by an error, and nothing changes. SAFETY:
    // the range is in the mapping of above, which nothing unmaps; advice changes neither content nor permissions.
    #[allow(unsafe_code)]
    let advised = unsafe { libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE) };
    match Errno::result(advised) {
        Ok(_) | Err(Errno::EINVAL) => {}
        Err(e) => return Err(e.into()),
    }
    // SAFETY: the same range, of which nobody else knows, with these very flags.
    #[allow(unsafe_code)]
    let region = unsafe { MmapRegion::build_raw(start, length, prot.bits(), flags.bits() | libc::MAP_ANONYMOUS) };
    region.map_err(io::Error::other)
}

/// Gives the guest its memory, and its devices' registers to read. Before the interrupt controllers exist a slot costs
/// 0.2 ms, after it 7.
pub(crate) fn register(vm: &VmFd, memory: &Memory, pages: &RegisterPages) -> Result<(), Error> {
    // Where KVM has no such slots, reads of registers are exits, which are answered with the same.
    let read_only = if vm.check_extension(Cap::ReadonlyMem) { Some(pages.memory()) } else { None };
    let regions = memory.iter().map(|region| (memory, region, 0));
    let read_only =
        read_only.into_iter().flat_map(|pages| pages.iter().map(move |region| (pages, region, KVM_MEM_READONLY)));
    for (slot, (memory, region, flags)) in (0u32..).zip(regions.chain(read_only)) {
        let host = memory
            .get_host_address(region.start_addr())
            .map_err(|e| Error::Memory { bytes: region.len(), source: Box::new(e) })?;
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the range is one mapping of `memory` or `pages`, which the machine keeps for as long as the VM
        // exists: all end with the process. The guest may write to the former at any time, and nothing else of this
        // process is in either.
        #[allow(unsafe_code)]
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("register memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        let low = usize::try_from(LOW_MEMORY_END).unwrap();
        assert_eq!(ranges(128 << 20).unwrap(), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ranges(LOW_MEMORY_END).unwrap(), [(GuestAddress(0), low)]);
        assert_eq!(ranges(6 << 30).unwrap(), [(GuestAddress(0), low), (GuestAddress(ABOVE_HOLE), 3 << 30)]);
        assert!(ranges(0).is_err() && ranges(4097).is_err());
    }

    #[test]
    fn large_pages_are_at_one_place_for_host_and_guest() {
        // Also of sizes that no host puts there by itself.
        for bytes in [(4 << 20) + PAGE, 12 << 20, (4 << 30) + PAGE] {
            let memory = reserve(bytes).unwrap();
            for region in memory.iter() {
                let host = memory.get_host_address(region.start_addr()).unwrap().addr();
                assert!(host.is_multiple_of(LARGE_PAGE), "{bytes} bytes: {host:#x} for {:?}", region.start_addr());
                // All of it is there.
                let last = region.last_addr();
                memory.write_obj(1u8, last).unwrap();
                assert_eq!(memory.read_obj::<u8>(last).unwrap(), 1);
            }
        }
    }
}
