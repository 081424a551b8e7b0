//! A sandbox: one VM, and the containers in it.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use oci_spec::runtime::Spec;
use tokio::sync::{Notify, Semaphore, mpsc};
use vz_config::Config;
use vz_linux::{Bundle, KernelProfile};
use vz_machine::{
    control::{BootConfig, Cause, Ended, MachineChoice, MachineKind},
    verdict::{self, Consequence, Host},
};
use vz_proto::{CONTROL_PORT, Event, LOG_PORT, SHARE_TAG, event};
use vz_sys::surroundings::Surroundings;

use crate::{
    agent::{self, Agent},
    cgroup::Cgroup,
    container::{Container, Exit, Process, State},
    disks::{self, Disk},
    error::{Error, chain},
    events::Publisher,
    hooks,
    journal::Journal,
    limit::Limit,
    network::Network,
    oom::Score,
    share::Share,
    spec,
    vmm::{self, Notice, Place, Started, Vmm},
};

/// Exit status of processes whose VM has ended, as if they had been killed.
const KILLED: u32 = 137;
/// How long a container's exec processes may take to be reaped after its init.
const REAP_DEADLINE: Duration = Duration::from_secs(2);
/// Lines in ten seconds about what a guest should not do.
const COMPLAINTS: u32 = 20;
/// Log connections of the guest at the same time.
const LOG_CONNECTIONS: usize = 2;

/// What is made before there is a runtime: the single-threaded part of a sandbox's start.
#[derive(Debug)]
pub struct Prepared {
    journal: Journal,
    share: Share,
    network: Network,
    disks: Vec<Disk>,
    cgroup: Option<Cgroup>,
    vmm: Started,
    config: Config,
    hooks: hooks::Launch,
    agent_version: String,
    begun: Instant,
}

/// Who the sandbox is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// The id of the sandbox, which is that of its first container.
    pub id: String,
    /// The first container's bundle.
    pub bundle: PathBuf,
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Who it is.
    pub identity: Identity,
    /// Its configuration.
    pub config: Config,
    /// What it owns.
    pub journal: Journal,
    /// What its guest sees.
    pub share: Share,
    /// Its network.
    pub network: Network,
    /// Its disks, which its first container asks for.
    pub disks: Vec<Disk>,
    /// Its cgroup on the host, where that has any.
    pub cgroup: Option<Cgroup>,
    /// Its VM.
    pub vmm: Vmm,
    /// Its guest's agent.
    pub agent: Agent,
    /// How its hooks are run.
    pub hooks: hooks::Launch,
    /// Where its events go.
    pub publisher: Publisher,
    /// Notified once when the shim is to exit.
    pub shutdown: Notify,
    agent_version: String,
    begun: Instant,
    /// Whether the VM's end is our own doing.
    ending: AtomicBool,
    /// Whether the VM is on the KVM machine, once it is launched.
    on_kvm: AtomicBool,
    /// For lines about what the guest should not do.
    complaints: Limit,
    /// For what the guest wants to have logged.
    records: Limit,
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

/// Reads a bundle's spec.
pub fn read_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    Spec::load(&path).map_err(|source| Error::ReadSpec { path, source })
}

/// Makes the share and the network, and starts the VM, whose process logs to `stderr`.
///
/// The process must be single-threaded, and this thread must be its main thread.
pub fn prepare(
    identity: &Identity,
    config: Config,
    journal: Journal,
    stderr: Option<&File>,
    surroundings: Arc<Surroundings>,
) -> Result<Prepared, Error> {
    let begun = Instant::now();
    let spec = read_spec(&identity.bundle)?;
    let config = config.annotate(&spec::annotations(&spec), host())?;
    let profile = match config.linux_profile {
        vz_config::LinuxProfile::Container => KernelProfile::Container,
        vz_config::LinuxProfile::Developer => KernelProfile::Developer,
    };
    let guest_bundle = vz_linux::find_or_install(config.guest_bundle(), profile)
        .map_err(|e| Error::Message { what: "find guest bundle", source: Box::new(e) })?;
    let version = Bundle::describe(&guest_bundle)
        .map_err(|e| Error::Message { what: "open guest bundle", source: Box::new(e) })?;
    let share = Share::create(journal.path().join("share"))?;
    let (vcpus, memory_mib) = size(&config, &spec);
    let (network, cards) = Network::prepare(&spec, vcpus)?;
    let found = disks::find(&spec)?;
    let (disks, disk_files) = disks::open(&found)?;
    let boot = BootConfig {
        sandbox: format!("{}/{}", identity.namespace, identity.id),
        machine: match config.machine {
            vz_config::Machine::Auto => MachineChoice::Auto,
            vz_config::Machine::Kvm => MachineChoice::Kvm,
            vz_config::Machine::Qemu => MachineChoice::Qemu,
        },
        nics: cards.nics,
        disks,
        vcpus,
        memory_mib,
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
    let cgroup = Cgroup::make(&journal, &spec, &identity.id, memory_mib, config.vm.overhead_mib)?;
    let oom_score = Score::of(&spec)?;
    let place = Place { user_namespace: config.vmm.user_namespace, cgroup: cgroup.as_ref(), oom_score };
    let files: Vec<_> = cards.taps.into_iter().chain(disk_files).collect();
    let vmm = vmm::start(boot, &files, &place, stderr)?;
    journal.process("vmm", vmm.pid())?;
    let agent_version = version.agent_version;
    let limit = Duration::from_secs(config.timeouts.hook_s);
    let hooks = hooks::Launch { surroundings: Some(surroundings), limit };
    Ok(Prepared { journal, share, network, disks: found, cgroup, vmm, config, hooks, agent_version, begun })
}

/// vCPUs and MiB for a container with this spec: its limits (memory plus the guest's own need), or the configured
/// size, within the configured bounds.
fn size(config: &Config, spec: &Spec) -> (u32, u64) {
    let (cpus, memory) = spec::limits(spec);
    let host = host();
    let most_cpus = if config.vm.max_vcpus == 0 { host.vcpus } else { config.vm.max_vcpus };
    let annotated = spec::annotations(spec);
    let set = |key: &str| annotated.contains_key(&format!("{}{key}", vz_config::ANNOTATION));
    let vcpus = match cpus {
        Some(cpus) if !set("vcpus") => cpus.min(most_cpus).max(1),
        _ => config.vm.vcpus,
    };
    let mut mib = match memory {
        Some(limit) if !set("memory-mib") => limit.div_ceil(1 << 20).saturating_add(config.vm.memory_base_mib),
        _ => config.vm.memory_mib,
    };
    let most = if config.vm.max_memory_mib == 0 { host.memory_mib } else { Some(config.vm.max_memory_mib) };
    if let Some(most) = most {
        mib = mib.min(most);
    }
    (vcpus, mib)
}

/// CPU time that this process has used, in microseconds.
fn own_cpu_us() -> i64 {
    use nix::sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    };
    getrusage(UsageWho::RUSAGE_SELF)
        .map_or(0, |usage| usage.user_time().num_microseconds() + usage.system_time().num_microseconds())
}

/// The size of this host.
fn host() -> vz_config::Host {
    let vcpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    let memory_mib = nix::sys::sysinfo::sysinfo().ok().map(|info| info.ram_total() >> 20);
    vz_config::Host { vcpus, memory_mib }
}

impl Prepared {
    /// Starts listening to the VM, in the current tokio runtime.
    pub fn run(self, identity: Identity, publisher: Publisher) -> Result<Arc<Sandbox>, Error> {
        let deadline = Duration::from_secs(self.config.timeouts.agent_s);
        let sandbox = Arc::new(Sandbox {
            agent: Agent::new(deadline, self.config.log_level.as_str()),
            vmm: self.vmm.listen()?,
            identity,
            config: self.config,
            journal: self.journal,
            share: self.share,
            network: self.network,
            disks: self.disks,
            cgroup: self.cgroup,
            hooks: self.hooks,
            publisher,
            shutdown: Notify::new(),
            agent_version: self.agent_version,
            begun: self.begun,
            ending: AtomicBool::new(false),
            on_kvm: AtomicBool::new(false),
            complaints: Limit::new(COMPLAINTS),
            records: Limit::new(agent::LOG_RATE),
            containers: Mutex::default(),
        });
        let (notices, receiver) = vmm::notices();
        let listening = sandbox.clone();
        tokio::spawn(async move { listening.vmm.run(notices).await });
        tokio::spawn(sandbox.clone().watch(receiver));
        Ok(sandbox)
    }
}

impl Sandbox {
    /// How long a process's output is waited for after its end.
    pub fn drain_deadline(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.drain_s)
    }

    /// How long the host's file systems may take to answer.
    pub fn files_deadline(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.files_s)
    }

    /// A container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.containers().get(id).cloned().flatten().ok_or_else(|| Error::NotFound { what: "container", id: id.into() })
    }

    /// The surroundings that the shim has left, for what runs on the host on its owner's behalf.
    pub fn surroundings(&self) -> Option<&Surroundings> {
        self.hooks.surroundings.as_deref()
    }

    /// The disks that are a container's: all are the first one's.
    pub fn disks_of(&self, container: &str) -> &[Disk] {
        if container == self.identity.id { &self.disks } else { &[] }
    }

    /// Takes an id for a container that is about to be made.
    pub fn reserve(&self, id: &str) -> Result<(), Error> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(Error::AlreadyExists { what: "container", id: id.into() });
        }
        containers.insert(id.to_owned(), None);
        Ok(())
    }

    /// Adds a container under its reserved id.
    pub fn insert(&self, container: Arc<Container>) {
        self.containers().insert(container.id.clone(), Some(container));
    }

    /// Forgets a container, or gives its reserved id back. True where none is left.
    pub fn remove(&self, id: &str) -> bool {
        let mut containers = self.containers();
        containers.remove(id);
        containers.is_empty()
    }

    /// Gives up the creation that this init is in the middle of, where it is the only container's: whoever wants it gone
    /// already does not wait for a guest that does not boot, or does not answer.
    pub fn abandon(&self, init: &Process) {
        if init.transition.try_lock().is_err() && self.containers().len() == 1 {
            self.agent.down("the container was deleted while it was created");
        }
    }

    /// Whether there is no container, nor one in the making.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the sandbox was begun, for the log: `make bench` splits a start by these.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn watch(self: Arc<Self>, mut notices: mpsc::Receiver<Notice>) {
        let logs = Arc::new(Semaphore::new(LOG_CONNECTIONS));
        while let Some(notice) = notices.recv().await {
            match notice {
                Notice::Launched { machine, cpu_us } => {
                    self.on_kvm.store(machine == MachineKind::Kvm, Ordering::Relaxed);
                    let own_cpu_us = own_cpu_us();
                    tracing::info!(?machine, at_ms = self.elapsed_ms(), cpu_us, own_cpu_us, "vm is launched");
                }
                Notice::Accepted { port: CONTROL_PORT, stream } => {
                    tokio::spawn(self.clone().control(stream));
                }
                Notice::Accepted { port: LOG_PORT, stream } => match logs.clone().try_acquire_owned() {
                    Ok(permit) => {
                        let sandbox = self.clone();
                        tokio::spawn(async move {
                            if let Err(error) = agent::forward_log(stream, &sandbox.records).await {
                                sandbox.complain(&format!("guest log ended: {error}"));
                            }
                            drop(permit);
                        });
                    }
                    Err(_) => self.complain("guest opens too many log connections"),
                },
                Notice::Accepted { port, .. } => self.complain(&format!("guest connected to unknown port {port}")),
                Notice::Ended(ended) => self.ended(ended),
            }
        }
    }

    /// Logs what the guest should not do, which it can do as often as it likes.
    fn complain(&self, what: &str) {
        match self.complaints.admit() {
            None => {}
            Some(0) => tracing::warn!("{what}"),
            Some(left_out) => tracing::warn!(left_out, "{what}"),
        }
    }

    async fn control(self: Arc<Self>, stream: tokio::net::UnixStream) {
        if !self.agent.is_free().await {
            self.complain("a second control connection of the guest is refused");
            return;
        }
        let hostname = &self.identity.id[..self.identity.id.len().min(63)];
        if let Err(error) = self.agent.connect(stream, &self.agent_version, hostname).await {
            let why = chain(&error);
            tracing::error!(error = why, "guest agent is refused");
            self.agent.down(&why);
            self.end_vm().await;
            return;
        }
        tracing::info!(at_ms = self.elapsed_ms(), "sandbox is ready");
        if self.on_kvm.load(Ordering::Relaxed) {
            verdict::came_up();
        }
        let sandbox = self.clone();
        if let Err(error) = self.agent.events(move |event| sandbox.clone().event(event)).await
            && !self.ending.load(Ordering::Relaxed)
        {
            tracing::warn!(error = chain(&error), "guest agent's events ended");
        }
        self.agent.lost();
    }

    /// What the guest says of its processes. A container or process that is not known is a lie or late, and no harm.
    fn event(self: Arc<Self>, event: Event) {
        match event.kind {
            Some(event::Kind::Exit(exit)) => {
                let found = self
                    .container(&exit.container_id)
                    .and_then(|container| Ok((container.process(&exit.exec_id)?, container)));
                match found {
                    Ok((process, container)) => {
                        // The guest's clock is the guest's word; the difference is what the message took.
                        tokio::spawn(self.exited(container, process, Exit::now(exit.status & 0xff)));
                    }
                    Err(_) => self.early_exit(&exit.container_id, exit.status & 0xff),
                }
            }
            Some(event::Kind::Oom(oom)) => match self.container(&oom.container_id) {
                Ok(container) => self.publish_oom(&container),
                Err(_) => self.complain("guest reports a lack of memory in an unknown container"),
            },
            Some(_) | None => self.complain("guest sent an unknown event"),
        }
    }

    fn early_exit(&self, container: &str, status: u32) {
        let container = agent::bounded(container);
        self.complain(&format!("guest reports the end of an unknown process of {container:?}, status {status}"));
    }

    /// A process has ended: pass its output on, then tell everybody, in order.
    async fn exited(self: Arc<Self>, container: Arc<Container>, process: Arc<Process>, exit: Exit) {
        if !process.drain(self.drain_deadline()).await {
            tracing::info!(container = container.id, exec = process.exec_id, "something still holds its output open");
        }
        if process.exec_id.is_empty() {
            let reaped = async {
                for exec in container.running_execs() {
                    exec.wait().await;
                }
            };
            if tokio::time::timeout(REAP_DEADLINE, reaped).await.is_err() {
                tracing::warn!(container = container.id, "an exec process outlives its container's init");
            }
        }
        let transition = process.transition.lock().await;
        if process.set_stopped(exit) {
            self.publish_exit(&container, &process, exit);
        }
        drop(transition);
    }

    fn publish_oom(&self, container: &Container) {
        let mut event = TaskOOM::new();
        event.set_container_id(container.id.clone());
        self.publisher.publish("/tasks/oom", Box::new(event));
    }

    fn publish_exit(&self, container: &Container, process: &Process, exit: Exit) {
        let mut event = TaskExit::new();
        event.set_container_id(container.id.clone());
        event.set_id(if process.exec_id.is_empty() { container.id.clone() } else { process.exec_id.clone() });
        event.set_pid(container.pid);
        event.set_exit_status(exit.status);
        event.set_exited_at(exit.timestamp());
        self.publisher.publish("/tasks/exit", Box::new(event));
    }

    /// The VM has ended, and with it every process.
    fn ended(self: &Arc<Self>, ended: Result<Ended, String>) {
        let mut why = match &ended {
            Err(died) => died.clone(),
            Ok(ended) if ended.console.is_empty() => ended.message.clone(),
            Ok(ended) => format!("{}; guest console: {}", ended.message, ended.console.trim()),
        };
        let starved = !self.ending.load(Ordering::Relaxed) && self.cgroup.as_ref().is_some_and(Cgroup::was_starved);
        if starved {
            why = format!(
                "the host's kernel has killed the vm for want of memory, see its cgroup's memory.events: {why}"
            );
        }
        if let Ok(ended) = &ended
            && ended.cause == Cause::Kvm
        {
            match Host::this().failed_early(&ended.message, self.begun.elapsed()) {
                Consequence::TryAgain => tracing::warn!("the next vm tries KVM once more"),
                Consequence::Unusable => tracing::error!("KVM has failed twice: `auto` does not use it any more"),
            }
        }
        match ended.ok().map(|ended| ended.cause) {
            _ if self.ending.load(Ordering::Relaxed) => tracing::debug!("vm has ended"),
            Some(Cause::Killed) => tracing::info!(why, "vm has ended"),
            // Nobody here asked for it, and its containers are gone.
            Some(Cause::Shutdown) => tracing::warn!(why, "vm has ended"),
            cause => tracing::error!(?cause, why, "vm has ended"),
        }
        self.agent.down(&why);
        let containers: Vec<_> = self.containers().values().flatten().cloned().collect();
        for container in containers {
            if starved {
                self.publish_oom(&container);
            }
            for process in container.processes() {
                // What was never started has no end.
                if process.state() == State::Created && !process.exec_id.is_empty() {
                    continue;
                }
                tokio::spawn(self.clone().exited(container.clone(), process, Exit::now(KILLED)));
            }
        }
    }

    /// Ends the VM, and waits until nothing of it is left.
    pub async fn end_vm(&self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Err(error) = self.vmm.end().await {
            // The journal has it still.
            tracing::error!(%error, "end vmm");
        }
    }

    /// Ends the VM, and takes away everything that the sandbox owns.
    pub async fn destroy(&self) {
        self.end_vm().await;
        let dir = self.journal.path().to_owned();
        // On a thread: processes and cgroups are waited for.
        let unwinding = tokio::task::spawn_blocking(move || {
            let mut bundles = Vec::new();
            let unwound = Journal::unwind(&dir, |id, bundle| bundles.push((id.to_owned(), bundle.to_owned())));
            (bundles, unwound)
        });
        let (bundles, unwound) = match unwinding.await {
            Ok(done) => done,
            Err(error) => return tracing::error!(%error, "clean up"),
        };
        if let Err(error) = unwound {
            tracing::error!(error = chain(&error), "clean up");
        }
        for (id, bundle) in bundles {
            hooks::poststop(&id, &bundle, None, &self.hooks).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(resources: &serde_json::Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.2.0", "root": { "path": "rootfs" }, "linux": { "resources": resources },
        }))
        .unwrap()
    }

    #[test]
    fn a_vm_is_as_large_as_its_limits_and_its_base() {
        let mut config = Config::default();
        config.vm.max_vcpus = 8;
        config.vm.max_memory_mib = 4096;
        assert_eq!(size(&config, &spec(&json!({}))), (1, 1024));
        let limited = json!({ "cpu": { "quota": 250_000, "period": 100_000 }, "memory": { "limit": 67_108_865 } });
        assert_eq!(size(&config, &spec(&limited)), (3, 65 + 128));
        let huge = json!({ "cpu": { "quota": 99_000_000 }, "memory": { "limit": 1_u64 << 50 } });
        assert_eq!(size(&config, &spec(&huge)), (8, 4096));
    }
}
