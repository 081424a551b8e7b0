//! One boot: from the request to what is asked of the guest, and its end.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use vz_machine::control::{BootConfig, Cause, MachineChoice, MachineKind};
use vz_proto::{CONTROL_PORT, LOG_PORT, SHARE_TAG};

use crate::{
    guest::{self, Guest, Output},
    network::{self, Url, Wire},
    phases::{self, Figure, Line, Nonsense, Times, Unit},
    rootfs,
    subject::Subject,
    vm::{self, Vm},
};

/// Bytes that are kept of a console, of which a report is a small part.
const CONSOLE: u64 = 4 << 20;
/// What the host may take for itself before a machine runs and after it ends.
const SLACK: Duration = Duration::from_secs(30);

/// Why a boot was none.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// On this host.
    #[error("{action}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The VM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// The agent.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// The network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The root file system.
    #[error(transparent)]
    Root(#[from] rootfs::Error),
    /// Its time stamps.
    #[error(transparent)]
    Times(#[from] Nonsense),
    /// It takes too long.
    #[error("the boot, with what was asked of the guest, took longer than {} s (--timeout-secs)", .0.as_secs())]
    Timeout(Duration),
    /// The URL.
    #[error("the guest could not fetch {url}, {attempts} times; in the end: {said}")]
    Fetch {
        /// Which.
        url: String,
        /// How often it was tried.
        attempts: u32,
        /// What wget said.
        said: String,
    },
}

fn host(action: &'static str) -> impl FnOnce(nix::Error) -> Error {
    move |e| Error::Host { action, source: e.into() }
}

impl Error {
    /// The last that the guest said on its console, where it is of interest.
    pub fn console(&self) -> Option<&str> {
        match self {
            Self::Vm(vm::Error::Ended(ended)) | Self::Guest(guest::Error::Vm(vm::Error::Ended(ended))) => {
                Some(ended.console.as_str()).filter(|console| !console.is_empty())
            }
            _ => None,
        }
    }
}

/// What is the same for all boots.
#[derive(Debug, Clone)]
pub struct Plan {
    /// On which machine.
    pub machine: MachineChoice,
    /// Whether its clocks count instructions.
    pub unit: Unit,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Appended to the kernel's command line.
    pub kernel_args: String,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// For one boot and all that is asked of it.
    pub timeout: Duration,
    /// Run in the guest after its boot.
    pub command: Option<String>,
    /// Fetched in the guest.
    pub url: Option<Url>,
    /// Every so many failed fetches one is told of.
    pub retry_log_every: u32,
    /// The root file system to boot.
    pub rootfs: Option<PathBuf>,
}

/// What came of a boot.
#[derive(Debug)]
pub struct Boot {
    /// On which machine.
    pub machine: Option<MachineKind>,
    /// What it took.
    pub times: Times,
    /// The kernel's log.
    pub log: Vec<Line>,
    /// The command's output.
    pub output: Option<Output>,
    /// What was fetched.
    pub fetch: Option<Fetch>,
}

/// A fetched URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Its length.
    pub bytes: u64,
    /// How often it was tried.
    pub attempts: u32,
}

/// Where boots take place: a tmpfs that nobody else sees, and that ends with this process however it ends.
#[derive(Debug)]
pub struct Workshop {
    dir: tempfile::TempDir,
}

impl Workshop {
    /// Makes it, and moves the process, which has one thread, into a mount namespace of its own.
    pub fn new() -> Result<Self, Error> {
        const NONE: Option<&str> = None;
        let dir = tempfile::Builder::new()
            .prefix("vz-linux-bench.")
            .tempdir()
            .map_err(|source| Error::Host { action: "make a temporary directory", source })?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(host("make a mount namespace"))?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(host("make mounts private"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("vz-linux-bench"), dir.path(), Some("tmpfs"), flags, Some("mode=755"))
            .map_err(host("mount a tmpfs"))?;
        Ok(Self { dir })
    }

    /// A place for something.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A directory for a VM's share: an empty one, or the root file system. A shared mount, as the vmm process wants
    /// it.
    fn share(&self, rootfs: Option<&Path>) -> Result<PathBuf, Error> {
        const NONE: Option<&str> = None;
        let share = self.path("share");
        if share.exists() {
            return Ok(share);
        }
        fs::create_dir(&share).map_err(|source| Error::Host { action: "make the share", source })?;
        // Without what is mounted below it: an overlay takes no other file systems' directories for its own.
        let bound = mount(Some(rootfs.unwrap_or(&share)), &share, NONE, MsFlags::MS_BIND, NONE);
        bound.map_err(host("bind the root file system"))?;
        mount(NONE, &share, NONE, MsFlags::MS_SHARED, NONE).map_err(host("make the share a shared mount"))?;
        Ok(share)
    }

    /// A new state directory, in place of the last boot's.
    fn state(&self) -> Result<PathBuf, Error> {
        let state = self.path("state");
        let made = match fs::remove_dir_all(&state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => fs::create_dir(&state),
        };
        made.map_err(|source| Error::Host { action: "make the state directory", source })?;
        Ok(state)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        // Only the directory below is left to remove. Both fail where it is busy, and then it ends with the process.
        let _ = umount2(&self.path("share"), MntFlags::MNT_DETACH);
        let _ = umount2(self.dir.path(), MntFlags::MNT_DETACH);
    }
}

/// Boots.
pub async fn boot(workshop: &Workshop, subject: &Subject, plan: &Plan) -> Result<Boot, Error> {
    let wire = plan.url.as_ref().map(Wire::new).transpose()?;
    let mut kernel_args = plan.kernel_args.clone();
    if plan.rootfs.is_some() {
        kernel_args = format!("{} {kernel_args}", rootfs::kernel_argument()).trim_end().to_owned();
    }
    let state_dir = workshop.state()?;
    let config = BootConfig {
        sandbox: "vz-linux-bench".into(),
        machine: plan.machine,
        nics: wire.iter().map(|wire| wire.nic.clone()).collect(),
        disks: Vec::new(),
        vcpus: plan.vcpus,
        memory_mib: plan.memory_mib,
        guest_bundle: subject.dir.clone(),
        share: workshop.share(plan.rootfs.as_deref())?,
        share_tag: if plan.rootfs.is_some() { rootfs::TAG } else { SHARE_TAG }.into(),
        state_dir: state_dir.clone(),
        guest_ports: vec![CONTROL_PORT, LOG_PORT],
        boot_deadline_ms: u64::try_from(plan.timeout.as_millis()).unwrap_or(u64::MAX),
        console_limit: CONSOLE,
        qemu: plan.qemu.clone(),
        kernel_args,
        count_instructions: plan.unit == Unit::Instructions,
        report_denied_calls: false,
        log_level: "error".into(),
    };
    let begun = Instant::now();
    let mut vm = Vm::start(config, wire.as_ref().map(|wire| wire.taps.as_slice()).unwrap_or_default())?;
    let run = async {
        if plan.rootfs.is_some() {
            to_chroot(&mut vm, plan, &state_dir).await
        } else {
            to_hello(&mut vm, subject, plan, wire.as_ref(), begun).await
        }
    };
    // The vmm keeps the deadline itself from when it has started the machine, and says more about it. This is for one
    // that does not.
    let limit = plan.timeout.saturating_add(SLACK);
    tokio::time::timeout(limit, run).await.map_err(|_| Error::Timeout(plan.timeout))?
}

async fn to_chroot(vm: &mut Vm, plan: &Plan, state_dir: &Path) -> Result<Boot, Error> {
    match vm.ended().await {
        // Init resets the machine when it has reported; no agent connects.
        vm::Error::Ended(ended) if ended.cause == Cause::Shutdown => {}
        vm::Error::Ended(ended) if ended.cause == Cause::BootTimeout => return Err(Error::Timeout(plan.timeout)),
        other => return Err(other.into()),
    }
    let console = fs::read(state_dir.join(vz_state::CONSOLE))
        .map_err(|source| Error::Host { action: "read the guest's console", source })?;
    let report = rootfs::report(&String::from_utf8_lossy(&console))?;
    let times = phases::to_chroot(&report.log)?;
    let output = report.output.map(|(status, text)| Output { status, text });
    Ok(Boot { machine: vm.machine(), times, log: report.log, output, fetch: None })
}

async fn to_hello(
    vm: &mut Vm,
    subject: &Subject,
    plan: &Plan,
    wire: Option<&Wire>,
    begun: Instant,
) -> Result<Boot, Error> {
    let mut guest = Guest::meet(vm, &subject.agent_version).await?;
    let wall = guest.heard.duration_since(begun);
    let mut times = phases::to_hello(&guest.hello, &guest.log, nanos(wall), plan.unit)?;
    let mut fetched = None;
    if let (Some(url), Some(wire)) = (&plan.url, wire) {
        let asked = Instant::now();
        fetched = Some(fetch(vm, &mut guest, plan, url, wire, begun).await?);
        if plan.unit == Unit::Time {
            times.figures.push((Figure::Fetch, nanos(asked.elapsed())));
        }
    }
    let mut output = None;
    if let Some(command) = &plan.command {
        let left = plan.timeout.saturating_sub(begun.elapsed());
        let ran = tokio::time::timeout(left, guest.run(vm, command, &[], plan.timeout)).await;
        output = Some(ran.map_err(|_| Error::Timeout(plan.timeout))??);
    }
    Ok(Boot { machine: vm.machine(), times, log: guest.log, output, fetch: fetched })
}

/// Fetches the URL, whose server may still be starting, until that works or the boot's time is up: each attempt is a
/// container of its own.
async fn fetch(
    vm: &mut Vm,
    guest: &mut Guest,
    plan: &Plan,
    url: &Url,
    wire: &Wire,
    begun: Instant,
) -> Result<Fetch, Error> {
    // The URL has neither blanks nor control characters; what the shell knows is quoted.
    let quoted = url.guest.replace('\'', "'\\''");
    // No -T: Debian's static BusyBox crashes with it.
    let command = format!("wget -q -O /tmp/got '{quoted}' && wc -c </tmp/got");
    let mut attempts = 0;
    let mut said = String::from("nothing");
    loop {
        let left = plan.timeout.saturating_sub(begun.elapsed());
        let network = if attempts == 0 { wire.description.as_slice() } else { &[] };
        let tried = tokio::time::timeout(left, guest.run(vm, &command, network, plan.timeout)).await;
        attempts += 1;
        let Ok(output) = tried else { return Err(Error::Fetch { url: url.guest.clone(), attempts, said }) };
        let output = output?;
        output.text.trim().clone_into(&mut said);
        if output.status == 0
            && let Some(bytes) = said.lines().last().and_then(|line| line.trim().parse().ok())
        {
            return Ok(Fetch { bytes, attempts });
        }
        if let Some(why) = wire.failure() {
            said = format!("{said} ({why})");
        }
        if attempts % plan.retry_log_every == 0 {
            eprintln!("vz-linux-bench: fetch of {}, attempt {attempts}: {said}", url.guest);
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
