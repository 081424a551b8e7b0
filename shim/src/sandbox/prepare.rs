//! The single-threaded part of a sandbox's start: what is made before there is a runtime.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use vz_config::Config;
use vz_linux::Bundle;
use vz_machine::control::BootConfig;
use vz_proto::{CONTROL_PORT, LOG_PORT, SHARE_TAG};
use vz_sys::surroundings::Surroundings;

use super::{
    Error, Identity, Sandbox,
    shape::{self, Shape},
    watch,
};
use crate::{
    container::{Lent, PodFiles},
    events::Publisher,
    guest::{
        Deadlines, Guest, Size,
        agent::Agent,
        vmm::{self, Place, Started},
    },
    host::{Host, cgroup::Cgroup, disks, hooks, journal::Journal, network::Network, oom::Score, share::Share},
    spec,
};

/// What the vmm may take on top of the boot deadline until it has launched the machine, or says why not.
const LAUNCH_MARGIN: Duration = Duration::from_secs(15);

/// A sandbox whose VM is on the way.
#[derive(Debug)]
pub struct Prepared {
    host: Host,
    vmm: Started,
    config: Config,
    shape: Shape,
    agent_version: String,
    begun: Instant,
}

/// What a daemon has before it knows what its sandbox is to be.
#[derive(Debug)]
pub struct Ground {
    /// The configuration, without annotations.
    pub config: Config,
    /// Where what the sandbox owns is written down.
    pub journal: Journal,
    /// Where the vmm logs.
    pub stderr: Option<File>,
    /// The host's mount namespace.
    pub surroundings: Arc<Surroundings>,
}

/// Makes the share and the network, and starts the VM.
///
/// The process must be single-threaded, and this thread must be its main thread.
pub fn prepare(identity: &Identity, ground: Ground) -> Result<Prepared, Error> {
    let Ground { config, journal, stderr, surroundings } = ground;
    let begun = Instant::now();
    let spec = spec::read(&identity.bundle)?;
    let config = config.annotate(&spec::annotations(&spec), shape::host())?;
    let guest_bundle =
        vz_linux::find_or_install(config.guest_bundle(), config.linux_profile).map_err(Error::FindBundle)?;
    let version = Bundle::describe(&guest_bundle).map_err(Error::OpenBundle)?;
    let shape = Shape::of(&config, &spec, &identity.id);
    let share = Share::create(journal.path().join("share"))?;
    let (network, cards) = Network::prepare(&spec, shape.vcpus)?;
    let found = disks::find(&spec)?;
    let (disks, disk_files) = disks::open(&found)?;
    let boot = BootConfig {
        sandbox: format!("{}/{}", identity.namespace, identity.id),
        machine: config.machine,
        nics: cards.nics,
        disks,
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        guest_bundle,
        share: share.path().to_owned(),
        share_tag: SHARE_TAG.into(),
        state_dir: journal.path().to_owned(),
        guest_ports: vec![CONTROL_PORT, LOG_PORT],
        boot_deadline_ms: config.timeouts.boot_s.saturating_mul(1000),
        console_limit: config.console.limit_kib.saturating_mul(1024),
        qemu: config.qemu.path.clone(),
        kernel_args: config.guest.kernel_args.clone(),
        count_instructions: false,
        report_denied_calls: config.vmm.denied_calls == vz_config::DeniedCalls::Report,
        log_level: config.log_level.as_str().into(),
    };
    let cgroup = Cgroup::make(&journal, &spec, &identity.id, shape.memory_mib, config.vm.overhead_mib)?;
    let oom_score = Score::of(&spec)?;
    let place = Place { user_namespace: config.vmm.user_namespace, cgroup: cgroup.as_ref(), oom_score };
    let files: Vec<OwnedFd> = cards.taps.into_iter().chain(disk_files).collect();
    let vmm = vmm::start(boot, &files, &place, stderr.as_ref())?;
    journal.process("vmm", vmm.pid())?;
    let limit = Duration::from_secs(config.timeouts.hook_s);
    let host = Host {
        journal,
        share: Arc::new(share),
        network,
        disks: found,
        cgroup,
        hooks: hooks::Launch { surroundings: Some(surroundings), limit },
        files_deadline: Duration::from_secs(config.timeouts.files_s),
    };
    Ok(Prepared { host, vmm, config, shape, agent_version: version.agent_version, begun })
}

impl Prepared {
    /// Starts listening to the VM, in the current tokio runtime.
    ///
    /// `pod_files` are those of a pod that containerd describes, see [`super::pod`].
    pub fn run(
        self,
        identity: Identity,
        publisher: Publisher,
        pod_files: Option<Arc<PodFiles>>,
    ) -> Result<Arc<Sandbox>, Error> {
        let timeouts = &self.config.timeouts;
        let deadlines = Deadlines {
            request: Duration::from_secs(timeouts.agent_s),
            kill: Duration::from_secs(timeouts.kill_s),
            boot: Duration::from_secs(timeouts.boot_s).saturating_add(LAUNCH_MARGIN),
        };
        let agent = Agent::new(deadlines.request, self.config.log_level.as_str());
        let size = Size { vcpus: self.shape.vcpus, memory_mib: self.shape.memory_mib };
        let guest = Arc::new(Guest::new(self.vmm.listen()?, agent, deadlines, size));
        let lent = Lent {
            host: Arc::new(self.host),
            guest: guest.clone(),
            publisher,
            namespace: identity.namespace.clone(),
            drain_deadline: Duration::from_secs(timeouts.drain_s),
            begun: self.begun,
            pod_files,
        };
        let sandbox = Arc::new(Sandbox::new(identity, lent));
        let (notices, receiver) = vmm::notices();
        tokio::spawn(async move { guest.vmm.run(notices).await });
        tokio::spawn(watch::run(sandbox.clone(), self.agent_version, self.shape.hostname, receiver));
        Ok(sandbox)
    }
}
