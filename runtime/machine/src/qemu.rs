//! The machine `qemu`: QEMU's `microvm` by software emulation, our backends over vhost-user.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use vz_jail::Role;
use vz_qemu::{Config, Device, Nic, Qemu};
use vz_vhost::{Endpoint, OnFailure};
use vz_virtio::{Worker, blk::BlkQueue};

use crate::{
    Exit, LaunchError, Machine, Outputs,
    control::{BootConfig, MachineKind},
    devices::{Devices, Files, request_queues},
    vmm::Alarm,
};

mod clock;

/// Size of the file system's queues, as QEMU tells the guest: a request of 1 MiB takes some 260 descriptors.
const FS_QUEUE_SIZE: u16 = 1024;
/// The board has room for eight devices; the others are file system, vsock, entropy and balloon.
const MOST_NICS_AND_DISKS: usize = 4;
/// Queues of the vsock device that QEMU leaves to us; the event queue it keeps.
const VSOCK_QUEUES: usize = 2;

#[derive(Debug)]
pub(crate) struct QemuMachine {
    qemu: Qemu,
    outputs: Outputs,
    fs: Option<Endpoint>,
    vsock: Option<Endpoint>,
    disks: Vec<(Vec<BlkQueue>, Endpoint)>,
}

impl QemuMachine {
    pub(crate) fn launch(config: &BootConfig, bundle: &vz_linux::Bundle, files: Files) -> Result<Self, LaunchError> {
        let (nics, disks) = (files.nics.len(), files.disks.len());
        if nics.saturating_add(disks) > MOST_NICS_AND_DISKS {
            return Err(LaunchError::TooMany { nics, disks, most: MOST_NICS_AND_DISKS });
        }
        let program = vz_qemu::find(&config.qemu, std::env::var_os("PATH").as_deref())?;
        let (fs, fs_socket) = Endpoint::new(&config.state_dir, "fs")?;
        let (vsock, vsock_socket) = Endpoint::new(&config.state_dir, "vsock")?;
        let fs_device = Device::Fs {
            tag: config.share_tag.clone(),
            request_queues: request_queues(config),
            queue_size: FS_QUEUE_SIZE,
        };
        let mut devices = vec![(fs_device, fs_socket), (Device::Vsock, vsock_socket)];
        let mut disks = Vec::new();
        for (number, queues) in files.disks.into_iter().enumerate() {
            let (ours, socket) = Endpoint::new(&config.state_dir, "disk")?;
            devices.push((Device::Disk { number, queues: request_queues(config) }, socket));
            disks.push((queues, ours));
        }
        let mut append = kernel_arguments(config.vcpus, config.count_instructions);
        if !config.kernel_args.is_empty() {
            append.push(' ');
            append.push_str(&config.kernel_args);
        }
        let mut qemu = Qemu::start(&Config {
            program: &program,
            root: &config.state_dir,
            name: &config.sandbox,
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            kernel: &bundle.kernel,
            initramfs: &bundle.initramfs,
            append: &append,
            count_instructions: config.count_instructions,
            devices,
            nics: files.nics.into_iter().map(|(nic, queues)| Nic { mac: nic.mac, queues }).collect(),
        })?;
        let outputs = Outputs { console: qemu.console.take(), complaints: qemu.stderr.take() };
        Ok(Self { qemu, outputs, fs: Some(fs), vsock: Some(vsock), disks })
    }
}

/// The guest kernel's command line for this machine; kernel/README.md has what each word saves.
///
/// Nothing is measured against an emulated timer: on a busy host such measurements fail, and then the kernel gives up
/// its clock (and with it high resolution timers, and time that is right), or does not boot at all.
fn kernel_arguments(vcpus: u32, count_instructions: bool) -> String {
    let mut arguments = String::from("console=ttyS0 quiet");
    // A reboot by triple fault is the one way for a guest without ACPI to end QEMU; a panic reboots at once.
    arguments.push_str(" reboot=t panic=-1 acpi=off");
    // The emulated counter is the host's, unless it counts instructions, a nanosecond each.
    let khz = if count_instructions { 1_000_000 } else { clock::khz() };
    arguments.push_str(&format!(" tsc=reliable tsc_early_khz={khz} no_timer_check"));
    if count_instructions {
        // While the guest waits for a device, QEMU would put its clock forward to the next timer at once.
        arguments.push_str(" idle=poll");
    }
    if vcpus == 1 {
        // The other timer, whose frequency is fixed, does as well, except for waking several processors.
        arguments.push_str(" nolapic_timer");
    }
    // Nothing to speculate; and patching, or setting memory aside, for hardware that is not there.
    arguments.push_str(" mitigations=off noreplace-smp swiotlb=noforce");
    // There is no PCI bus to look for.
    arguments.push_str(" pci=off");
    arguments
}

impl Machine for QemuMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Qemu
    }

    fn outputs(&mut self) -> Outputs {
        std::mem::take(&mut self.outputs)
    }

    fn serve(&mut self, devices: Devices, alarm: Alarm) -> Result<(), LaunchError> {
        let on_failure: OnFailure = Arc::new(move |failure| alarm.raise(failure.to_string()));
        if let Some(endpoint) = self.vsock.take() {
            let worker =
                Worker { backend: Box::new(devices.vsock), queues: 0b11, thread: "vsock".into(), role: Role::Vsock };
            vz_vhost::serve("vsock", VSOCK_QUEUES, vec![worker], endpoint, on_failure.clone())?;
        }
        if let Some(endpoint) = self.fs.take() {
            let workers = Worker::one_each(devices.fs.split(), "fs", Role::Fs);
            vz_vhost::serve("fs", workers.len(), workers, endpoint, on_failure.clone())?;
        }
        for (number, (queues, endpoint)) in self.disks.drain(..).enumerate() {
            let name = format!("disk{number}");
            let workers = Worker::one_each(queues, &name, Role::Block);
            vz_vhost::serve(&name, workers.len(), workers, endpoint, on_failure.clone())?;
        }
        Ok(())
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.qemu.as_fd()
    }

    fn wait(&mut self) -> io::Result<Exit> {
        Ok(match self.qemu.wait()? {
            vz_qemu::Exit::Guest => Exit::Guest,
            vz_qemu::Exit::Status(status) => Exit::Failed(format!("QEMU exited with status {status}")),
            vz_qemu::Exit::Signal(signal) => Exit::Failed(format!("QEMU was killed by {signal}")),
        })
    }

    fn kill(&self) -> io::Result<()> {
        self.qemu.kill()
    }
}
