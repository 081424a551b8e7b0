//! The machine `kvm`: our own, its devices served in this process.

use std::{
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::fcntl::OFlag;
use vz_jail::Role;
use vz_kvm::Ending;
use vz_virtio::{Worker, balloon::Balloon, console::Console, net::Net, rng::Rng};

use crate::{
    Exit, LaunchError, Machine, Outputs,
    control::{BootConfig, MachineKind},
    devices::{Devices, Files},
    vmm::Alarm,
};

const MIB: u64 = 1 << 20;

#[derive(Debug)]
pub(crate) struct KvmMachine {
    /// Until it starts.
    made: Option<vz_kvm::Machine>,
    running: Option<vz_kvm::Running>,
    /// Where the guest's console goes.
    console: OwnedFd,
    outputs: Outputs,
    generation: [u8; 16],
    ending: Ending,
    files: Files,
}

impl KvmMachine {
    pub(crate) fn launch(config: &BootConfig, bundle: &vz_linux::Bundle, files: Files) -> Result<Self, LaunchError> {
        let memory = config.memory_mib.saturating_mul(MIB);
        let mut cmdline = vz_kvm::kernel_arguments(memory);
        if !config.kernel_args.is_empty() {
            cmdline.push(' ');
            cmdline.push_str(&config.kernel_args);
        }
        let made = vz_kvm::Machine::new(&vz_kvm::Config {
            vcpus: config.vcpus,
            memory,
            kernel: &bundle.kernel,
            initramfs: &bundle.initramfs,
            cmdline: &cmdline,
        })?;
        // Non-blocking at our end: a guest that says more than we take loses it, and waits for nobody.
        let (console, to_console) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| LaunchError::Console(e.into()))?;
        let outputs = Outputs { console: Some(console), complaints: None };
        let mut generation = [0; 16];
        vz_sys::random::fill(&mut generation).map_err(LaunchError::Random)?;
        let ending = made.ending().clone();
        Ok(Self { made: Some(made), running: None, console: to_console, outputs, generation, ending, files })
    }
}

/// Console output over the serial port: what the pipe does not take is lost.
struct Lossy(std::fs::File);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Machine for KvmMachine {
    fn kind(&self) -> MachineKind {
        MachineKind::Kvm
    }

    fn outputs(&mut self) -> Outputs {
        std::mem::take(&mut self.outputs)
    }

    fn serve(&mut self, devices: Devices, alarm: Alarm) -> Result<(), LaunchError> {
        let Some(made) = self.made.take() else { return Ok(()) };
        let Devices { fs, vsock } = devices;
        let fs = Worker::one_each(fs.split(), "fs", Role::Fs);
        let console = self.console.try_clone().map_err(LaunchError::Console)?;
        let (balloon, _) = Balloon::new().map_err(LaunchError::Balloon)?;
        let mut devices = vec![
            fs,
            Worker::single(vsock, "vsock", Role::Vsock),
            Worker::single(
                Console::new(console.try_clone().map_err(LaunchError::Console)?).map_err(LaunchError::Console)?,
                "console",
                Role::Device,
            ),
            Worker::single(Rng::new().map_err(LaunchError::Random)?, "rng", Role::Device),
            Worker::single(balloon, "balloon", Role::Device),
        ];
        for (number, (nic, taps)) in self.files.nics.drain(..).enumerate() {
            let pairs = Net::new(taps, nic.mac, None)?.split().into_iter().enumerate();
            let workers = pairs.map(|(pair, backend)| Worker {
                queues: backend.queues(),
                backend: Box::new(backend),
                thread: format!("net-{number}-{pair}"),
                role: Role::Net,
            });
            devices.push(workers.collect());
        }
        for (number, queues) in self.files.disks.drain(..).enumerate() {
            devices.push(Worker::one_each(queues, &format!("disk{number}"), Role::Block));
        }
        let on_failure: vz_kvm::OnFailure = Arc::new(move |message| alarm.raise(message));
        let serial = Box::new(Lossy(console.into()));
        self.running = Some(made.start(devices, serial, self.generation, &on_failure)?);
        Ok(())
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.ending.as_fd()
    }

    fn wait(&mut self) -> io::Result<Exit> {
        Ok(match self.ending.reason() {
            Some(end) if end.is_orderly() => Exit::Guest,
            Some(end) if end.blames_kvm() => Exit::Unfit(end.to_string()),
            Some(end) => Exit::Failed(end.to_string()),
            None => Exit::Failed("machine ended without a reason".into()),
        })
    }

    /// Its vCPUs end with the process, which is what follows.
    fn kill(&self) -> io::Result<()> {
        self.ending.end(vz_kvm::End::Killed);
        Ok(())
    }
}
