//! Which device is behind a physical address that is not memory.

use crate::{
    layout::{MMIO, MMIO_SIZE},
    mmio::Registers,
};

/// The virtio-mmio devices, one page each from [`MMIO`] on.
#[derive(Debug, Default)]
pub(crate) struct Bus {
    devices: Vec<Registers>,
}

impl Bus {
    pub(crate) fn new(devices: Vec<Registers>) -> Self {
        Self { devices }
    }

    /// The device at this address, and the offset into its registers.
    fn find(&self, address: u64) -> Option<(&Registers, u64)> {
        let offset = address.checked_sub(MMIO)?;
        let device = usize::try_from(offset / MMIO_SIZE).ok().and_then(|slot| self.devices.get(slot))?;
        Some((device, offset % MMIO_SIZE))
    }

    /// A read of the guest; where nothing is, all ones.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, bytes),
            None => bytes.fill(0xff),
        }
    }

    /// A write of the guest; where nothing is, it is lost.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, bytes);
        }
    }
}
