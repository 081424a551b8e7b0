//! The ACPI tables by which the guest finds its processors, devices and power switch.
//!
//! Hardware-reduced ACPI: no timer, no interrupt controller and no event block of a PC, which makes the kernel leave
//! those alone. Virtio devices are `LNRO0005`, which Linux' virtio-mmio driver binds to.

use acpi_tables::{
    Aml, aml,
    aml::{Device, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope},
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress};
use vz_virtio::Memory;

use crate::{
    Error,
    layout::{self, port},
};

const OEM: [u8; 6] = *b"VZ    ";
const TABLE: [u8; 8] = *b"VZMICROV";
const REVISION: u32 = 1;
/// Sleep type of "soft off" in our `\_S5`.
pub(crate) const SLEEP_OFF: u8 = 5;
/// What is written to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;

/// A virtio-mmio device, for its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Address of its registers.
    pub(crate) base: u64,
    /// Its interrupt.
    pub(crate) gsi: u32,
}

/// Writes all tables, and the generation identifier that one of them points to.
pub(crate) fn write(memory: &Memory, vcpus: u8, slots: &[Slot], generation: [u8; 16]) -> Result<(), Error> {
    let place = Error::place("ACPI tables");
    memory.write_slice(&generation, GuestAddress(layout::GENERATION_ID)).map_err(&place)?;
    // The root pointer is 36 bytes at a multiple of 16.
    let mut at = layout::ACPI.saturating_add(64);
    let mut put = |table: &dyn Aml| -> Result<u64, Error> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let here = at;
        let end = here.saturating_add(bytes.len() as u64);
        if end > layout::ACPI_END {
            return Err(Error::Layout(end));
        }
        memory.write_slice(&bytes, GuestAddress(here)).map_err(&place)?;
        at = end.next_multiple_of(16);
        Ok(here)
    };
    let dsdt = put(&dsdt(slots)?)?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.write_slice(&root, GuestAddress(layout::ACPI)).map_err(&place)
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = register(port::RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(port::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(port::SLEEP_STATUS);
    // No keyboard controller of a PC, no VGA, no real-time clock of a PC.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(slots: &[Slot]) -> Result<Sdt, Error> {
    let mut code = Vec::new();
    let name = |n: usize| format!("V{n:03X}");
    for (number, slot) in slots.iter().enumerate() {
        let base = u32::try_from(slot.base).map_err(|_| Error::Layout(slot.base))?;
        let size = u32::try_from(layout::MMIO_SIZE).map_err(|_| Error::Layout(layout::MMIO_SIZE))?;
        let number_word = u32::try_from(number).map_err(|_| Error::Layout(number as u64))?;
        let device = Device::new(
            Path::new(&name(number)),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &number_word),
                &Name::new("_CCA".into(), &aml::ONE),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, size),
                        &Interrupt::new(true, true, false, false, slot.gsi),
                    ]),
                ),
            ],
        )
        .scoped();
        code.extend(device);
    }
    // VMGenID: "Virtual Machine Generation ID" by Microsoft. The address is a package of its low and its high half.
    let address = u32::try_from(layout::GENERATION_ID).map_err(|_| Error::Layout(layout::GENERATION_ID))?;
    let generation = Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &aml::ZERO])),
        ],
    )
    .scoped();
    code.extend(generation);
    // Sleep type for "soft off".
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_OFF])).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    dsdt.append_slice(&code);
    Ok(dsdt)
}

/// A device in the system bus' scope.
trait Scoped {
    fn scoped(&self) -> Vec<u8>;
}

impl Scoped for Device<'_> {
    fn scoped(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        Scope::new("_SB_".into(), vec![self]).to_aml_bytes(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(memory: &Memory, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(memory: &Memory, at: u64, len: usize) -> u8 {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_root_and_adds_up() {
        let memory = crate::memory::reserve(16 << 20).unwrap();
        let slots: Vec<Slot> =
            (0..19).map(|n| Slot { base: layout::MMIO + n * layout::MMIO_SIZE, gsi: 5 + n as u32 }).collect();
        write(&memory, 254, &slots, [9; 16]).unwrap();
        assert_eq!(read::<16>(&memory, layout::GENERATION_ID), [9; 16]);
        assert_eq!(&read::<8>(&memory, layout::ACPI), b"RSD PTR ");
        assert_eq!(sum(&memory, layout::ACPI, 20), 0);
        let xsdt = u64::from_le_bytes(read(&memory, layout::ACPI + 24));
        let table = |at: u64, name: &[u8; 4]| {
            assert_eq!(&read::<4>(&memory, at), name);
            let len = u32::from_le_bytes(read(&memory, at + 4));
            assert_eq!(sum(&memory, at, len as usize), 0, "{name:?}");
            len
        };
        assert_eq!(table(xsdt, b"XSDT"), 36 + 2 * 8);
        let fadt = u64::from_le_bytes(read(&memory, xsdt + 36));
        table(fadt, b"FACP");
        let madt = u64::from_le_bytes(read(&memory, xsdt + 44));
        assert_eq!(table(madt, b"APIC"), 44 + 254 * 8 + 12);
        let dsdt = u64::from_le_bytes(read(&memory, fadt + 140));
        assert!(table(dsdt, b"DSDT") > 19 * 60);
    }
}
