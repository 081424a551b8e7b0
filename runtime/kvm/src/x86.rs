//! What a vCPU is before its first instruction: CPUID, model-specific registers, and for the boot processor the state
//! that the 64-bit Linux boot protocol asks for.

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vz_virtio::Memory;

use crate::{Error, layout};

mod cpuid;

pub(crate) use cpuid::for_vcpu as cpuid_for_vcpu;

/// Selectors of the boot processor's descriptors.
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
const TASK: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present and writable; and for the page directory, a page of 2 MiB.
const PAGE_TABLE: u64 = 0b11;
const PAGE_2M: u64 = 1 << 7 | PAGE_TABLE;

/// Model-specific registers by their numbers.
mod msr {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const MTRR_DEFAULT: u32 = 0x2ff;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SYSCALL_MASK: u32 = 0xc000_0084;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// MTRRs on, memory cached write-back where none says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Offsets of the local interrupt pins in the local APIC's registers, and how they deliver.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTINT: u32 = 7 << 8;

/// Writes the boot processor's descriptor and page tables into guest memory.
pub(crate) fn write_tables(memory: &Memory) -> Result<(), Error> {
    let place = Error::place("descriptor and page tables");
    let descriptors = [0, descriptor(&code()), descriptor(&data()), descriptor(&task())];
    for (at, descriptor) in (layout::GDT..).step_by(8).zip(descriptors) {
        memory.write_obj(descriptor, GuestAddress(at)).map_err(&place)?;
    }
    memory.write_obj(0u64, GuestAddress(layout::IDT)).map_err(&place)?;
    memory.write_obj(layout::PDPT | PAGE_TABLE, GuestAddress(layout::PML4)).map_err(&place)?;
    memory.write_obj(layout::PD | PAGE_TABLE, GuestAddress(layout::PDPT)).map_err(&place)?;
    let pages = (0u64..512).map(|page| page << 21 | PAGE_2M);
    let directory: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
    memory.write_slice(&directory, GuestAddress(layout::PD)).map_err(&place)
}

/// Brings a vCPU into its first state. All but the boot processor wait for it to start them.
pub(crate) fn set_up(vcpu: &VcpuFd, cpuid: &CpuId, entry: Option<GuestAddress>) -> Result<(), Error> {
    // Before all else: it decides which registers exist.
    vcpu.set_cpuid2(cpuid).map_err(Error::kvm("set CPUID"))?;
    set_msrs(vcpu)?;
    set_local_interrupts(vcpu)?;
    let Some(entry) = entry else { return Ok(()) };
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(Error::kvm("set FPU"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE,
        rsp: layout::STACK,
        rbp: layout::STACK,
        // A bit that is always set.
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("set registers"))?;
    set_system_registers(vcpu)
}

fn set_system_registers(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("get system registers"))?;
    sregs.cs = code();
    let data = data();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task();
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set system registers"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [
        entry(msr::SYSENTER_CS, 0),
        entry(msr::SYSENTER_ESP, 0),
        entry(msr::SYSENTER_EIP, 0),
        entry(msr::STAR, 0),
        entry(msr::CSTAR, 0),
        entry(msr::KERNEL_GS_BASE, 0),
        entry(msr::SYSCALL_MASK, 0),
        entry(msr::LSTAR, 0),
        entry(msr::TSC, 0),
        entry(msr::MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(msr::MTRR_DEFAULT, MTRR_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Msrs)?;
    let done = vcpu.set_msrs(&msrs).map_err(Error::kvm("set MSRs"))?;
    // KVM stops at the first that it does not take.
    entries.get(done).map_or(Ok(()), |refused| Err(Error::Msr(refused.index)))
}

/// As a PC's firmware leaves them: the old interrupt controller on the first pin, NMIs on the second.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), Error> {
    let mut apic = vcpu.get_lapic().map_err(Error::kvm("get local APIC"))?;
    for (at, mode) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        for (register, byte) in apic.regs.iter_mut().skip(at).zip(mode.to_le_bytes()) {
            *register = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&apic).map_err(Error::kvm("set local APIC"))
}

fn code() -> kvm_segment {
    kvm_segment { selector: CODE, type_: 0b1011, l: 1, db: 0, ..data() }
}

fn data() -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector: DATA,
        type_: 0b0011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn task() -> kvm_segment {
    kvm_segment { selector: TASK, s: 0, type_: 0b1011, l: 0, db: 0, ..data() }
}

/// A segment as an entry of the descriptor table (Intel SDM volume 3, 3.4.5). Bases here are 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(segment.limit >> if segment.g == 1 { 12 } else { 0 });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags =
        u64::from(segment.avl) | u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    limit & 0xffff | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_flat_segments() {
        assert_eq!(descriptor(&code()), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x008f_8b00_0000_ffff);
    }

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = crate::memory::reserve(16 << 20).unwrap();
        write_tables(&memory).unwrap();
        let read = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(read(layout::PML4), layout::PDPT | 3);
        assert_eq!(read(layout::PDPT), layout::PD | 3);
        assert_eq!((read(layout::PD), read(layout::PD + 511 * 8)), (0x83, 511 << 21 | 0x83));
    }
}
