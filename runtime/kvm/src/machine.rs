//! The machine, put together.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, OnceLock},
};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use nix::sys::eventfd::EfdFlags;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vz_jail::Role;
use vz_virtio::{Memory, Worker};

use crate::{
    End, Error, OnFailure,
    acpi::{self, Slot},
    boot,
    bus::Bus,
    device::{Device, Interrupt, Pin, Serving},
    join::join,
    layout, memory,
    mmio::Registers,
    ports::{Output, Ports, SERIAL_GSI},
    register,
    register_page::RegisterPages,
    vcpu::Vcpu,
    x86,
};

/// Most vCPUs: their numbers are APIC ids of 8 bits, of which the last means all.
pub const MAX_VCPUS: u32 = 254;
/// Most devices: each has an interrupt line of its own.
pub const MAX_DEVICES: usize = SLOTS as usize;
const SLOTS: u32 = layout::LAST_GSI - layout::FIRST_GSI + 1;
/// What the kernel needs to know about this machine. The rest it finds in ACPI; no 8250 is probed, since the console is
/// a virtio one, and what comes before that or in a panic goes out through the first serial port.
const KERNEL_ARGUMENTS: &str = "quiet console=hvc0 earlyprintk=ttyS0 8250.nr_uarts=0 panic=-1 reboot=a,k pci=off swiotlb=noforce cryptomgr.notests";

/// Bytes of memory for each of the buckets in which the kernel looks names up, and for each of those of inodes: a
/// quarter of the buckets of its own choice, which keeps 1.1 MiB of 1 GiB free.
const MEMORY_PER_NAME: u64 = 32 << 10;
const MEMORY_PER_INODE: u64 = 64 << 10;

/// The beginning of the kernel's command line on a machine with so many bytes of memory.
pub fn kernel_arguments(memory: u64) -> String {
    let (names, inodes) = (memory / MEMORY_PER_NAME, memory / MEMORY_PER_INODE);
    format!("{KERNEL_ARGUMENTS} dhash_entries={names} ihash_entries={inodes}")
}

/// What to make.
#[derive(Debug)]
pub struct Config<'a> {
    /// vCPUs, from 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Bytes of guest memory, whole pages.
    pub memory: u64,
    /// The kernel, an ELF file.
    pub kernel: &'a File,
    /// Its initramfs.
    pub initramfs: &'a File,
    /// Its whole command line; [`kernel_arguments`] are part of it.
    pub cmdline: &'a str,
}

/// A machine without devices, whose memory holds the kernel. Everything of the host that it needs is open.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    cpuid: CpuId,
    memory: Memory,
    pages: RegisterPages,
    vcpus: u8,
    entry: GuestAddress,
    ending: Ending,
}

/// A machine that runs, until it ends by itself or the process does.
#[derive(Debug)]
pub struct Running {
    /// Notifications and interrupts are connected for as long as this is open.
    _vm: Arc<VmFd>,
    /// What KVM's memory slots are made of.
    _memory: Memory,
    _windows: RegisterPages,
}

/// How a running machine tells its end.
#[derive(Debug, Clone)]
pub struct Ending(Arc<EndingState>);

#[derive(Debug)]
struct EndingState {
    end: OnceLock<End>,
    event: nix::sys::eventfd::EventFd,
}

impl Ending {
    fn new() -> Result<Self, Error> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = nix::sys::eventfd::EventFd::from_value_and_flags(0, flags)
            .map_err(|e| Error::System { operation: "make eventfd", source: e.into() })?;
        Ok(Self(Arc::new(EndingState { end: OnceLock::new(), event })))
    }

    /// Ends it for this reason; the first one counts.
    pub fn end(&self, end: End) {
        // A later reason is a consequence of the first.
        drop(self.0.end.set(end));
        let _ = self.0.event.write(1);
    }

    /// Why it ended; `None` while it runs.
    pub fn reason(&self) -> Option<&End> {
        self.0.end.get()
    }
}

impl AsFd for Ending {
    /// Readable from the end on.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

impl Machine {
    /// Makes the machine and loads the kernel.
    pub fn new(config: &Config<'_>) -> Result<Self, Error> {
        let vcpus = u8::try_from(config.vcpus).ok().filter(|n| (1..=MAX_VCPUS).contains(&u32::from(*n)));
        let vcpus = vcpus.ok_or(Error::Vcpus(config.vcpus))?;
        let kvm = Kvm::new().map_err(Error::kvm("open /dev/kvm"))?;
        let memory = memory::reserve(config.memory)?;
        let pages = RegisterPages::reserve(SLOTS)?;
        // KVM has its part of the work done while memory is filled.
        let load = || boot::load(&memory, config.kernel, config.initramfs, config.cmdline);
        let (entry, (vm, cpuid)) = join("loader", load, || prepare(&kvm, &memory, &pages))?;
        x86::write_tables(&memory)?;
        Ok(Self { kvm, vm, cpuid, memory, pages, vcpus, entry, ending: Ending::new()? })
    }

    /// How it will tell its end.
    pub fn ending(&self) -> &Ending {
        &self.ending
    }

    /// Adds the devices, each given by its workers, and starts the guest. `output` gets what it writes to its serial
    /// port; `generation` is the VM's generation identifier, which no other VM ever had.
    pub fn start(
        self,
        devices: Vec<Vec<Worker<Role>>>,
        output: Output,
        generation: [u8; 16],
        on_failure: &OnFailure,
    ) -> Result<Running, Error> {
        let Self { kvm, vm, cpuid: supported, memory, pages, vcpus, entry, ending } = self;
        let vm = Arc::new(vm);
        let mut bus = Vec::new();
        let mut slots = Vec::new();
        let mut servings: Vec<Serving> = Vec::new();
        if devices.len() > MAX_DEVICES {
            return Err(Error::Devices(devices.len()));
        }
        for (index, workers) in (0u32..).zip(devices) {
            let slot = Slot {
                base: layout::MMIO.saturating_add(layout::MMIO_SIZE.saturating_mul(index.into())),
                gsi: layout::FIRST_GSI.saturating_add(index),
            };
            let pin = Pin { vm: Arc::clone(&vm), gsi: slot.gsi };
            let (device, serving) = Device::new(workers, &memory, pages.of(index), Box::new(pin))?;
            connect(&vm, &device, slot)?;
            servings.extend(serving);
            slots.push(slot);
            bus.push(Registers::new(Arc::new(device), memory.clone()));
        }
        let serial_line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("make eventfd"))?;
        vm.register_irqfd(&serial_line, SERIAL_GSI).map_err(Error::kvm("connect interrupt"))?;
        let ports = Arc::new(Ports::new(&serial_line, output)?);
        acpi::write(&memory, vcpus, &slots, generation)?;

        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let bus = Arc::new(Bus::new(bus));
        let mut ready = Vec::new();
        for number in 0..vcpus {
            let fd = vm.create_vcpu(number.into()).map_err(Error::kvm("create vCPU"))?;
            let cpuid = x86::cpuid_for_vcpu(&supported, number, vcpus, tsc_deadline).ok_or(Error::Cpuid)?;
            x86::set_up(&fd, &cpuid, (number == 0).then_some(entry))?;
            ready.push(Vcpu { number, fd, bus: Arc::clone(&bus), ports: Arc::clone(&ports) });
        }
        for serving in servings {
            serving.start(on_failure)?;
        }
        // The boot processor last: nothing runs before everything is there.
        for vcpu in ready.into_iter().rev() {
            let ending = ending.clone();
            vcpu.start(move |end| ending.end(end), Arc::clone(on_failure))?;
        }
        Ok(Running { _vm: vm, _memory: memory, _windows: pages })
    }
}

/// The VM with its memory, interrupt controllers and timer, and what its processors can do.
fn prepare(kvm: &Kvm, memory: &Memory, pages: &RegisterPages) -> Result<(VmFd, CpuId), Error> {
    let vm = create_vm(kvm)?;
    memory::register(&vm, memory, pages)?;
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(Error::kvm("set identity map"))?;
    vm.set_tss_address(layout::TSS).map_err(Error::kvm("set TSS"))?;
    vm.create_irq_chip().map_err(Error::kvm("create interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::kvm("create timer"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("get CPUID"))?;
    Ok((vm, cpuid))
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            // A signal came in while the kernel waited for a lock.
            Err(e) if e.errno() == nix::libc::EINTR => {}
            Err(e) => return Err(Error::kvm("create VM")(e)),
        }
    }
}

/// Lets KVM turn the guest's notifications into events; it also swallows the acknowledgements that mean nothing here.
fn connect(vm: &VmFd, device: &Device, slot: Slot) -> Result<(), Error> {
    let register = IoEventAddress::Mmio(slot.base.saturating_add(register::QUEUE_NOTIFY));
    for (index, notification) in (0u32..).zip(&device.notifications) {
        vm.register_ioevent(notification, &register, index).map_err(Error::kvm("connect notification"))?;
    }
    // Nobody reads it, and a full counter stops nobody.
    let nobody = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::system("make eventfd"))?;
    let register = IoEventAddress::Mmio(slot.base.saturating_add(register::INTERRUPT_ACK));
    vm.register_ioevent(&nobody, &register, Interrupt::USED).map_err(Error::kvm("connect acknowledgement"))
}

#[cfg(test)]
mod tests;
