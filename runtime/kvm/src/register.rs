//! Offsets of a virtio-mmio device's registers, and the bits of its status: virtio 1.3, sections 4.2.2 and 2.1.

pub(crate) const MAGIC: u64 = 0x00;
pub(crate) const VERSION: u64 = 0x04;
pub(crate) const DEVICE_ID: u64 = 0x08;
pub(crate) const VENDOR_ID: u64 = 0x0c;
pub(crate) const DEVICE_FEATURES: u64 = 0x10;
pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x14;
pub(crate) const DRIVER_FEATURES: u64 = 0x20;
pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
pub(crate) const QUEUE_SEL: u64 = 0x30;
pub(crate) const QUEUE_SIZE_MAX: u64 = 0x34;
pub(crate) const QUEUE_SIZE: u64 = 0x38;
pub(crate) const QUEUE_READY: u64 = 0x44;
/// KVM listens to it itself.
pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
/// KVM takes its most frequent value.
pub(crate) const INTERRUPT_ACK: u64 = 0x64;
pub(crate) const STATUS: u64 = 0x70;
pub(crate) const QUEUE_DESC_LOW: u64 = 0x80;
pub(crate) const QUEUE_DESC_HIGH: u64 = 0x84;
pub(crate) const QUEUE_DRIVER_LOW: u64 = 0x90;
pub(crate) const QUEUE_DRIVER_HIGH: u64 = 0x94;
pub(crate) const QUEUE_DEVICE_LOW: u64 = 0xa0;
pub(crate) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
/// Length and base of a shared memory region, 64 bits each.
pub(crate) const SHM_LEN_LOW: u64 = 0xb0;
/// Behind the last of these four.
pub(crate) const SHM_END: u64 = 0xc0;
pub(crate) const CONFIG_GENERATION: u64 = 0xfc;
/// The configuration space, until the end of the page.
pub(crate) const CONFIG: u64 = 0x100;

/// Bits of [`STATUS`].
pub(crate) mod status {
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 64;
    pub(crate) const FAILED: u32 = 128;
}
