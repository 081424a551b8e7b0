//! Where everything is in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT, IDT
//! 0x0000_7000  zero page (Linux boot protocol)
//! 0x0000_9000  page tables of the boot processor
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  end of conventional memory
//! 0x000e_0000  ACPI: RSDP, then the tables; below 1 MiB, reserved
//! 0x000f_f000  generation identifier, reserved
//! 0x0010_0000  memory: the kernel at its own addresses, the initramfs as far up as it goes
//! 0xc000_0000  end of low memory; devices up to 4 GiB
//! 0xd000_0000  virtio-mmio devices, a page each
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0xfffb_c000  identity map and TSS that Intel's virtualization needs
//! 0x1_0000_0000 the rest of memory
//! ```

/// Global descriptor table of the boot processor.
pub(crate) const GDT: u64 = 0x500;
/// Its interrupt descriptor table, empty: an exception before the kernel has its own is a triple fault.
pub(crate) const IDT: u64 = 0x520;
/// `struct boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Stack of the boot processor, growing down.
pub(crate) const STACK: u64 = 0x8ff0;
/// Page map, page directory pointers and page directory, which map the first GiB to itself.
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PDPT: u64 = 0xa000;
pub(crate) const PD: u64 = 0xb000;
/// The kernel's command line, and its largest size with the zero at its end.
pub(crate) const CMDLINE: u64 = 0x2_0000;
pub(crate) const CMDLINE_SIZE: usize = 0x1_0000;
/// End of memory that a PC's firmware leaves to the system.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, the root pointer first.
pub(crate) const ACPI: u64 = 0xe_0000;
pub(crate) const ACPI_END: u64 = 0xf_f000;
/// The virtual machine's generation identifier.
pub(crate) const GENERATION_ID: u64 = 0xf_f000;
/// Memory from here on is the kernel's.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
/// End of memory below the hole.
pub(crate) const LOW_MEMORY_END: u64 = 0xc000_0000;
/// virtio-mmio devices.
pub(crate) const MMIO: u64 = 0xd000_0000;
/// Bytes for each.
pub(crate) const MMIO_SIZE: u64 = 0x1000;
/// Interrupt lines of the I/O APIC that devices get; those below are a PC's own.
pub(crate) const FIRST_GSI: u32 = 5;
pub(crate) const LAST_GSI: u32 = 23;
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page for Intel's identity map, and three for the TSS after it.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const TSS: usize = 0xfffb_d000;
/// Memory above the hole.
pub(crate) const ABOVE_HOLE: u64 = 0x1_0000_0000;

/// I/O ports.
pub(crate) mod port {
    /// First serial port, 8 registers.
    pub(crate) const SERIAL: u16 = 0x3f8;
    /// Keyboard controller's command register, by which a PC is reset.
    pub(crate) const KEYBOARD: u16 = 0x64;
    /// ACPI's sleep control, sleep status and reset registers.
    pub(crate) const SLEEP_CONTROL: u16 = 0x600;
    pub(crate) const SLEEP_STATUS: u16 = 0x601;
    pub(crate) const RESET: u16 = 0x602;
}
