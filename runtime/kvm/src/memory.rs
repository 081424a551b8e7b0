//! Guest memory: private anonymous memory of this process, given to KVM as slots.

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};
use vz_virtio::Memory;

use crate::{
    Error,
    layout::{ABOVE_HOLE, LOW_MEMORY_END},
    window::Windows,
};

/// Bytes of a page.
const PAGE: u64 = 4096;
const PAGE_SIZE: usize = 4096;
const PAGE_MASK: usize = !(PAGE_SIZE - 1);

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
pub(crate) fn reserve(bytes: u64) -> Result<Memory, Error> {
    Memory::from_ranges(&ranges(bytes)?).map_err(|e| Error::Memory { bytes, source: Box::new(e) })
}

/// Gives the guest its memory, and its devices' registers to read. Before the interrupt controllers exist a slot costs 0.2 ms,
/// after it 7.
pub(crate) fn register(vm: &VmFd, memory: &Memory, windows: &Windows) -> Result<(), Error> {
    // Where KVM has no such slots, reads of registers are exits, which are answered with the same.
    let read_only = if vm.check_extension(Cap::ReadonlyMem) { Some(windows.memory()) } else { None };
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
        // SAFETY: the range is one mapping of `memory` or `windows`, which the machine keeps for as long as the VM exists: all end
        // with the process. The guest may write to the former at any time, and nothing else of this process is in either.
        #[allow(unsafe_code)]
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("register memory"))?;
    }
    Ok(())
}

/// Asks for large pages behind a range that is about to be filled: it takes a fraction of the faults, here and in the guest.
///
/// A host that has none to give is no worse off.
pub(crate) fn prefer_large_pages(memory: &Memory, start: GuestAddress, bytes: u64) -> Result<(), Error> {
    let length = usize::try_from(bytes).map_err(|_| Error::Layout(bytes))?;
    let slice = memory.get_slice(start, length).map_err(Error::place("large pages"))?;
    // Whole pages of the host, from the first to the last that the range touches.
    let host = slice.ptr_guard_mut();
    let address = host.as_ptr().addr();
    let from = address & PAGE_MASK;
    let to = address.saturating_add(length).next_multiple_of(PAGE_SIZE);
    // SAFETY: the pages are those of one mapping of guest memory (`get_slice` gives no range across two), which outlives the
    // call; the advice changes neither their content nor who may use them.
    #[allow(unsafe_code)]
    let advised = unsafe {
        nix::libc::madvise(host.as_ptr().with_addr(from).cast(), to.saturating_sub(from), nix::libc::MADV_HUGEPAGE)
    };
    if advised != 0 {
        let error = std::io::Error::last_os_error();
        // A kernel without them.
        if error.raw_os_error() != Some(nix::libc::EINVAL) {
            return Err(Error::System { operation: "ask for large pages", source: error });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        let low = usize::try_from(LOW_MEMORY_END).unwrap();
        assert_eq!(ranges(128 << 20).unwrap(), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ranges(LOW_MEMORY_END).unwrap(), [(GuestAddress(0), low)]);
        assert_eq!(ranges(6 << 30).unwrap(), [(GuestAddress(0), low), (GuestAddress(ABOVE_HOLE), 3 << 30)]);
        assert!(ranges(0).is_err() && ranges(4097).is_err());
    }
}
