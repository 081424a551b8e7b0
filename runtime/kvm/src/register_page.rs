//! What the guest reads of its devices' registers, as memory.
//!
//! A read of a register changes nothing, so it need not come here: each device's registers are a page that the machine
//! keeps up to date, and KVM gives all of them to the guest as memory that only we can write. A driver looks at the
//! interrupt status with each interrupt; without the page, each look is an exit of the vCPU to this process and back.
//! Writes come here as before, or are KVM's (notifications and acknowledgements).
//!
//! The guest maps registers uncached, and we write the page through the cache. On Intel, KVM has the guest's mapping
//! cached too; AMD's processors ask the caches where only page tables, not the MTRRs, make memory uncached. The flash
//! of a VM with UEFI firmware is the same: a page that the VMM writes, and the guest reads uncached.
//!
//! Invariant: a register, and a field of a configuration space, is stored whole. A driver that reads several fields of
//! a configuration space knows by its generation that it read across a change, where only one field changes at a time:
//! so it is with all devices here (the balloon's two numbers).

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vz_virtio::Memory;

use crate::{
    Error,
    layout::{MMIO, MMIO_SIZE},
    register::CONFIG,
};

/// The pages of all devices, one after the other.
#[derive(Debug, Clone)]
pub(crate) struct RegisterPages(Memory);

impl RegisterPages {
    /// Pages for this many devices, all zeros.
    pub(crate) fn reserve(devices: u32) -> Result<Self, Error> {
        let bytes = MMIO_SIZE.saturating_mul(devices.into());
        let length = usize::try_from(bytes).map_err(|_| Error::MemorySize(bytes))?;
        let pages = Memory::from_ranges(&[(GuestAddress(MMIO), length)]);
        pages.map(Self).map_err(|e| Error::Memory { bytes, source: Box::new(e) })
    }

    /// What KVM makes a slot of.
    pub(crate) fn memory(&self) -> &Memory {
        &self.0
    }

    /// The page of the device of this number.
    pub(crate) fn of(&self, device: u32) -> RegisterPage {
        RegisterPage { pages: self.0.clone(), base: MMIO.saturating_add(MMIO_SIZE.saturating_mul(device.into())) }
    }
}

/// One device's page.
#[derive(Debug, Clone)]
pub(crate) struct RegisterPage {
    pages: Memory,
    base: u64,
}

impl RegisterPage {
    /// Shows a register's value.
    pub(crate) fn set(&self, register: u64, value: u32) {
        let stored =
            self.pages.store(value.to_le(), GuestAddress(self.base.saturating_add(register)), Ordering::SeqCst);
        debug_assert!(stored.is_ok(), "register {register:#x}: {stored:?}");
    }

    /// Shows a configuration space; what is behind its end reads as zeros.
    pub(crate) fn set_config(&self, bytes: &[u8]) {
        for (word, register) in bytes.chunks(4).zip((CONFIG..MMIO_SIZE).step_by(4)) {
            let mut whole = [0; 4];
            for (to, from) in whole.iter_mut().zip(word) {
                *to = *from;
            }
            self.set(register, u32::from_le_bytes(whole));
        }
    }

    /// What the guest reads at this offset; zeros behind the page.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let inside = usize::try_from(MMIO_SIZE.saturating_sub(offset)).unwrap_or(0).min(bytes.len());
        if let Some(bytes) = bytes.get_mut(..inside).filter(|bytes| !bytes.is_empty()) {
            let read = self.pages.read_slice(bytes, GuestAddress(self.base.saturating_add(offset)));
            debug_assert!(read.is_ok(), "offset {offset:#x}: {read:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_what_was_set_and_no_other_devices() {
        let pages = RegisterPages::reserve(2).unwrap();
        let (first, second) = (pages.of(0), pages.of(1));
        first.set(0, 0x0403_0201);
        first.set_config(&[1, 2, 3, 4, 5]);
        second.set(0xffc, u32::MAX);
        let read = |page: &RegisterPage, offset| {
            let mut bytes = [0xaa; 8];
            page.read(offset, &mut bytes);
            bytes
        };
        assert_eq!(read(&first, 0), [1, 2, 3, 4, 0, 0, 0, 0]);
        assert_eq!(read(&first, 0x101), [2, 3, 4, 5, 0, 0, 0, 0]);
        assert_eq!(read(&second, 0), [0; 8]);
        // Behind its page is the next device's, or nothing.
        assert_eq!(read(&second, 0xffc), [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(read(&second, u64::MAX), [0; 8]);
    }
}
