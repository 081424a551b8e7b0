//! CPUID as each vCPU sees it: what KVM can give, with the topology of this VM instead of the host's.
//!
//! The guest has one package with as many cores as vCPUs, one thread each. What would only mislead it is taken away:
//! the performance counters, and virtualization of its own.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// KVM tells that a leaf has subleaves by this.
const SIGNIFICANT_INDEX: u32 = 1;

/// Fields of leaf 1.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Field of leaf 0x8000_0001.
const EXTENDED_ECX_SVM: u32 = 1 << 2;

/// Levels of leaf 0xb.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The entries for the vCPU `id` of `count`.
pub(crate) fn for_vcpu(supported: &CpuId, id: u8, count: u8, tsc_deadline: bool) -> Option<CpuId> {
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.as_slice().iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f)).copied().collect();
    let id = u32::from(id);
    let count = u32::from(count);
    // Bits of an APIC id that number the cores.
    let bits = count.next_power_of_two().trailing_zeros();
    let others = count.saturating_sub(1);
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
                entry.ecx |= ECX_HYPERVISOR;
                entry.ecx &= !(ECX_VMX | ECX_TSC_DEADLINE);
                if tsc_deadline {
                    entry.ecx |= ECX_TSC_DEADLINE;
                }
                entry.edx &= !EDX_HTT;
                if count > 1 {
                    entry.edx |= EDX_HTT;
                }
            }
            // Caches: those of the last level are everybody's, the others a core's own.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level >= 3 { others } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | (sharing & 0xfff) << 14 | (others & 0x3f) << 26;
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level >= 3 { others } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | (sharing & 0xfff) << 14;
            }
            // Performance counters.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => entry.ecx &= !EXTENDED_ECX_SVM,
            0x8000_0008 => entry.ecx = others & 0xff | bits << 12,
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // AMD's topology: APIC id; core, one thread each; node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    let topology = |index, level: u32, shift, processors| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: level << 8 | index,
        edx: id,
        ..Default::default()
    };
    entries.push(topology(0, LEVEL_THREAD, 0, 1));
    entries.push(topology(1, LEVEL_CORE, bits, count));
    // No level: the end.
    entries.push(topology(2, 0, 0, 0));
    CpuId::from_entries(&entries).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn a_vcpu_knows_who_it_is_and_how_many_there_are() {
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 { function, eax, ebx: 0x1234_0800, ecx, ..Default::default() };
        let host = CpuId::from_entries(&[
            leaf(1, 0, ECX_VMX),
            leaf(4, 0x1234_0123, 0),
            kvm_cpuid_entry2 { index: 3, ..leaf(4, 0xffff_c163, 0) },
            leaf(0xa, 7, 7),
            leaf(0xb, 7, 7),
            leaf(0x8000_0001, 0, EXTENDED_ECX_SVM),
            leaf(0x8000_0008, 0, 0xffff),
        ])
        .unwrap();
        let third = for_vcpu(&host, 2, 3, true).unwrap();
        let one = entry(&third, 1, 0);
        assert_eq!(one.ebx, 0x0203_0800);
        assert_eq!(one.ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE);
        assert_eq!(one.edx, EDX_HTT);
        assert_eq!(entry(&third, 4, 0).eax >> 14, 2 << 12);
        assert_eq!(entry(&third, 4, 3).eax >> 14, 2 << 12 | 2);
        assert_eq!(entry(&third, 0xa, 0).eax, 0);
        assert_eq!(entry(&third, 0x8000_0001, 0).ecx, 0);
        assert_eq!(entry(&third, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        let core = entry(&third, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        let alone = for_vcpu(&host, 0, 1, false).unwrap();
        assert_eq!(entry(&alone, 1, 0).edx, 0);
        assert_eq!(entry(&alone, 0xb, 1).eax, 0);
    }
}
