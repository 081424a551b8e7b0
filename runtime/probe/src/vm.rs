//! The tiny VM: one vCPU in 64-bit mode, with the parts that the built-in machine has too.

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_INTERNAL_ERROR_EMULATION, KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use nix::{
    errno::Errno,
    time::{ClockId, clock_gettime},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::{
    Speed, Unusable,
    payload::{BITS, DATA, Exit, ITERATIONS, Payload},
};

/// Guest memory: tables, code, data.
const MEMORY: usize = 0x8000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x4000;
const DATA_AT: u64 = 0x5000;
const STACK: u64 = 0x8000;
/// Three pages that Intel's processors need, out of the way.
const TSS: usize = 0xfffb_d000;

/// Page table entries: present, writable; and a 2 MiB page.
const TABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// CR0: protection, coprocessor monitored, its type and errors, write protection, paging.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR4: physical address extension, SSE and its exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// EFER: long mode, enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// What the built-in machine cannot do without.
const NEEDED: [(Cap, &str); 15] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
];

/// Version and capabilities.
pub(crate) fn check(kvm: &Kvm) -> Result<(), Unusable> {
    let wanted = KVM_API_VERSION.cast_signed();
    let found = kvm.get_api_version();
    if found != wanted {
        return Err(Unusable::Version { found, wanted });
    }
    let names: Vec<String> =
        NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| (*name).to_owned()).collect();
    if names.is_empty() { Ok(()) } else { Err(Unusable::Capabilities { names }) }
}

fn failed(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Unusable {
    move |e| Unusable::failed(operation, Errno::from_raw(e.errno()))
}

/// Makes the VM and runs it to its verdict, or for ever.
pub(crate) fn run(kvm: &Kvm, payload: &Payload<'_>) -> Result<Speed, Unusable> {
    let memory = memory(payload.code())?;
    let (_vm, mut vcpu) = make(kvm, &memory)?;
    let mut judge = payload.judge();
    judge.begin(cpu_time()?);
    loop {
        let exit = match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let mut value = [0; 4];
                value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
                Exit::Out { port, value: u32::from_le_bytes(value) }
            }
            Ok(VcpuExit::InternalError) => internal(&mut vcpu),
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::FailEntry { reason, cpu },
            Ok(exit) => Exit::Other(format!("{exit:?}")),
            Err(e) if matches!(e.errno(), nix::libc::EINTR | nix::libc::EAGAIN) => continue,
            Err(e) => return Err(failed("run a vCPU (KVM_RUN)")(e)),
        };
        if let Some(verdict) = judge.take(exit, cpu_time()?) {
            return verdict;
        }
    }
}

/// Not the time that others had the processor.
fn cpu_time() -> Result<Duration, Unusable> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_err(|e| Unusable::failed("read CPU time", e))?;
    Ok(time.into())
}

/// Guest memory with page tables, code and data in it.
fn memory(code: &[u8]) -> Result<GuestMemoryMmap, Unusable> {
    let failed = |error: &dyn std::fmt::Display| Unusable::Failed {
        operation: "make guest memory".into(),
        error: error.to_string(),
    };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(|e| failed(&e))?;
    let words = [(PML4, PDPT | TABLE), (PDPT, PD | TABLE), (PD, TABLE | LARGE)];
    let data = DATA.iter().zip((DATA_AT..).step_by(8)).map(|(word, at)| (at, *word));
    for (at, word) in words.into_iter().chain(data) {
        memory.write_obj(word, GuestAddress(at)).map_err(|e| failed(&e))?;
    }
    memory.write_slice(code, GuestAddress(CODE)).map_err(|e| failed(&e))?;
    Ok(memory)
}

fn make(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<(VmFd, VcpuFd), Unusable> {
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(e) if e.errno() == nix::libc::EINTR => {}
            Err(e) if e.errno() == nix::libc::EBUSY => return Err(Unusable::Busy),
            Err(e) => return Err(failed("make a VM (KVM_CREATE_VM)")(e)),
        }
    };
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|e| Unusable::Failed { operation: "find guest memory".into(), error: e.to_string() })?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
        flags: 0,
    };
    // SAFETY: `memory` maps MEMORY bytes there, nothing of Rust's own is in them, and it is borrowed by our caller for
    // longer than the VM that is made here runs.
    #[allow(unsafe_code)]
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("give memory to a VM (KVM_SET_USER_MEMORY_REGION)"))?;
    vm.set_tss_address(TSS).map_err(failed("set TSS address (KVM_SET_TSS_ADDR)"))?;
    vm.create_irq_chip().map_err(failed("make interrupt controllers (KVM_CREATE_IRQCHIP)"))?;
    vm.create_pit2(kvm_pit_config::default()).map_err(failed("make a timer (KVM_CREATE_PIT2)"))?;
    let vcpu = vm.create_vcpu(0).map_err(failed("make a vCPU (KVM_CREATE_VCPU)"))?;
    set_up(kvm, &vcpu)?;
    Ok((vm, vcpu))
}

/// 64-bit mode, all of memory mapped as it is, and what the code expects in its registers.
fn set_up(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(), Unusable> {
    let cpuid: CpuId =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("read CPUID (KVM_GET_SUPPORTED_CPUID)"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID (KVM_SET_CPUID2)"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("read registers (KVM_GET_SREGS)"))?;
    let flat = kvm_segment { base: 0, limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x8, type_: 0b1011, l: 1, ..flat };
    let data = kvm_segment { selector: 0x10, type_: 0b0011, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4, EFER);
    vcpu.set_sregs(&sregs).map_err(failed("set registers (KVM_SET_SREGS)"))?;
    let mut regs = vcpu.get_regs().map_err(failed("read registers (KVM_GET_REGS)"))?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 0x2);
    (regs.rbx, regs.rdi, regs.rsi) = (BITS, DATA_AT, ITERATIONS.into());
    vcpu.set_regs(&regs).map_err(failed("set registers (KVM_SET_REGS)"))
}

/// The details of an internal error; kernel's Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR.
fn internal(vcpu: &mut VcpuFd) -> Exit {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so this is the member that KVM has filled in; any value is
    // valid.
    #[allow(unsafe_code)]
    let (suberror, count, data) = unsafe {
        let internal = &run.__bindgen_anon_1.internal;
        (internal.suberror, internal.ndata, internal.data)
    };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    Exit::Internal { suberror, bytes: instruction(suberror, data.get(..count).unwrap_or(&data)) }
}

/// The instruction that could not be emulated, where KVM tells it: flags, then a byte of length and the bytes.
fn instruction(suberror: u32, data: &[u64]) -> Vec<u8> {
    const HAS_BYTES: u64 = 1;
    match data {
        [flags, rest @ ..] if suberror == KVM_INTERNAL_ERROR_EMULATION && flags & HAS_BYTES != 0 => {
            let mut bytes = rest.iter().flat_map(|word| word.to_le_bytes());
            let length = bytes.next().unwrap_or(0).min(15);
            bytes.take(length.into()).collect()
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_is_read_where_it_is_told() {
        let data = [1, u64::from_le_bytes([5, 0xf3, 0x48, 0x0f, 0xb8, 0xc3, 0xe7, 0xe0])];
        assert_eq!(instruction(1, &data), [0xf3, 0x48, 0x0f, 0xb8, 0xc3]);
        assert_eq!(instruction(1, &[0, 0x05]), [0_u8; 0]);
        assert_eq!(instruction(3, &data), [0_u8; 0]);
        assert_eq!(instruction(1, &[]), [0_u8; 0]);
        assert_eq!(instruction(1, &[1, 0xff]).len(), 7);
    }
}
