//! The machine of a sandbox: the `vmm` process, what it and the shim say to each other, and the machines it can run.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

pub mod client;
pub mod control;
mod devices;
mod kvm;
mod qemu;
pub mod select;
pub mod spawn;
pub mod verdict;
pub mod vmm;

use control::{BootConfig, MachineKind};
use devices::Devices;
use select::{Reason, Refused, Selection};
use vmm::Alarm;
use vz_probe::Unusable;

/// A machine that runs a guest.
///
/// It is made before the process enters its jail, from which nothing of the host can be opened any more, and gets its
/// devices after that.
trait Machine: std::fmt::Debug + Send {
    /// Which one it is.
    fn kind(&self) -> MachineKind;
    /// Where the guest's console output comes from, and the machine's own words; each is handed out once.
    fn outputs(&mut self) -> Outputs;
    /// Connects the devices; from here on the guest runs.
    fn serve(&mut self, devices: Devices, alarm: Alarm) -> Result<(), LaunchError>;
    /// Readable once the machine has ended.
    fn ended(&self) -> BorrowedFd<'_>;
    /// How it ended; waits for it.
    fn wait(&mut self) -> io::Result<Exit>;
    /// Ends it at once.
    fn kill(&self) -> io::Result<()>;
}

/// What a machine says, until end of file.
#[derive(Debug, Default)]
struct Outputs {
    /// The guest's console.
    console: Option<OwnedFd>,
    /// The machine itself.
    complaints: Option<OwnedFd>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exit {
    /// The guest rebooted or powered off.
    Guest,
    /// The machine failed or was killed; how, for people.
    Failed(String),
    /// The host's KVM cannot run the guest; why, for people.
    Unfit(String),
}

/// Why a machine could not be started. What to do about it is in the texts.
#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error(transparent)]
    Bundle(#[from] vz_linux::Error),
    #[error(transparent)]
    Qemu(#[from] vz_qemu::Error),
    #[error(transparent)]
    Serve(#[from] vz_vhost::Error),
    #[error(transparent)]
    Share(#[from] vz_virtio::fs::ConfigError),
    #[error(transparent)]
    Kvm(#[from] vz_kvm::Error),
    #[error(transparent)]
    Net(#[from] vz_virtio::net::NetError),
    #[error("make console pipe")]
    Console(#[source] io::Error),
    #[error("make balloon device")]
    Balloon(#[source] io::Error),
    #[error("get random bytes")]
    Random(#[source] io::Error),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("no machine can run on this host: {kvm}; {advice}; and QEMU", advice = kvm.advice())]
    Neither { kvm: Unusable, source: vz_qemu::Error },
    #[error(transparent)]
    Disk(#[from] vz_virtio::blk::BlkError),
    #[error("{nics} network cards and {disks} disks need {wanted} descriptors, got {found}")]
    Descriptors { nics: usize, disks: usize, wanted: usize, found: usize },
    #[error("machine \"qemu\" has room for {most} network cards and disks, not {nics} and {disks}")]
    TooMany { nics: usize, disks: usize, most: usize },
    #[error("machine \"kvm\" cannot count the guest's instructions; machine \"qemu\" can")]
    Uncounted,
    #[error("make vsock device")]
    Vsock(#[source] io::Error),
    #[error("sandbox needs at least one vCPU and some memory, not {vcpus} and {memory_mib} MiB")]
    Shape { vcpus: u32, memory_mib: u64 },
}

/// Starts the machine that the configuration asks for, or the best that works. `files` are its cards' taps and its
/// disks.
fn launch(
    config: &BootConfig,
    bundle: &vz_linux::Bundle,
    files: Vec<OwnedFd>,
) -> Result<Box<dyn Machine>, LaunchError> {
    if config.vcpus == 0 || config.memory_mib == 0 {
        return Err(LaunchError::Shape { vcpus: config.vcpus, memory_mib: config.memory_mib });
    }
    let files = devices::Files::new(config, files)?;
    let Selection { kind, reason } = select::select(config.machine, &verdict::Host::this())?;
    tracing::debug!(?kind, "machine is chosen: {reason}");
    match kind {
        MachineKind::Kvm if config.count_instructions => Err(LaunchError::Uncounted),
        MachineKind::Kvm => Ok(Box::new(kvm::KvmMachine::launch(config, bundle, files)?)),
        MachineKind::Qemu => match (qemu::QemuMachine::launch(config, bundle, files), reason) {
            (Ok(machine), _) => Ok(Box::new(machine)),
            (Err(LaunchError::Qemu(source)), Reason::Unusable(kvm)) => Err(LaunchError::Neither { kvm, source }),
            (Err(e), _) => Err(e),
        },
    }
}
