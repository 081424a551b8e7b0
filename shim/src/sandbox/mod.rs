//! A sandbox: one VM, and the containers in it.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task::TaskExit;
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
    container::{Container, Exit, Process, State, said::Verdict, spec},
    error::{Error, chain},
    events::Publisher,
    guest::{
        agent::{self, Agent},
        vmm::{self, Notice, Place, Started, Vmm},
    },
    host::{
        cgroup::Cgroup,
        disks::{self, Disk},
        hooks,
        journal::Journal,
        network::Network,
        oom::Score,
        share::Share,
    },
    limit::{Budget, Limit},
};

/// Exit status of processes whose VM has ended, as if they had been killed.
const KILLED: u32 = 137;
/// How long the guest may take to report the ends of a container's exec processes after its init's.
const REAP_DEADLINE: Duration = Duration::from_secs(2);
/// What the vmm may take on top of the boot deadline until it has launched the machine, or says why not.
const LAUNCH_MARGIN: Duration = Duration::from_secs(15);
/// Lines in ten seconds about what a guest should not do.
const COMPLAINTS: u32 = 20;
/// Log connections of the guest at the same time.
const LOG_CONNECTIONS: usize = 2;
/// Control connections of the guest at the same time: the one that is used, and those that wait for its end.
const CONTROL_CONNECTIONS: usize = 4;

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
    /// Ends of processes that the guest has reported again.
    repeated: AtomicU64,
    /// For what the guest wants to have logged.
    records: Budget,
    containers: Mutex<HashMap<String, Slot>>,
}

/// A container's id in its sandbox.
#[derive(Debug)]
enum Slot {
    /// It is being made on the host.
    Reserved,
    /// It is there.
    Living(Arc<Container>),
    /// It is being taken away.
    Leaving(Arc<Container>),
}

impl Slot {
    fn container(&self) -> Option<&Arc<Container>> {
        match self {
            Self::Reserved => None,
            Self::Living(container) | Self::Leaving(container) => Some(container),
        }
    }
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
            repeated: AtomicU64::new(0),
            records: Budget::of_a_guest(),
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

    /// How long the guest may take to confirm an end.
    pub fn kill_deadline(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.kill_s)
    }

    /// How long the guest may take to connect for the first time.
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.boot_s).saturating_add(LAUNCH_MARGIN)
    }

    /// A container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        let found = self.containers().get(id).and_then(Slot::container).cloned();
        found.ok_or_else(|| Error::NotFound { what: "container", id: id.into() })
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
        containers.insert(id.to_owned(), Slot::Reserved);
        Ok(())
    }

    /// Adds a container under its reserved id.
    pub fn insert(&self, container: Arc<Container>) {
        self.containers().insert(container.id.clone(), Slot::Living(container));
    }

    /// Whether this container has not been removed.
    pub fn has(&self, container: &Arc<Container>) -> bool {
        self.containers()
            .get(&container.id)
            .and_then(Slot::container)
            .is_some_and(|known| Arc::ptr_eq(known, container))
    }

    /// A container is about to be removed. True where it is the last: none is there or being made.
    pub fn leave(&self, container: &Arc<Container>) -> bool {
        let mut containers = self.containers();
        containers.insert(container.id.clone(), Slot::Leaving(container.clone()));
        containers.values().all(|slot| matches!(slot, Slot::Leaving(_)))
    }

    /// Forgets a container, or gives its reserved id back.
    pub fn remove(&self, id: &str) {
        self.containers().remove(id);
    }

    /// Aborts a creation in progress if this is the only container, so that deleting it does not wait for a guest that
    /// does not boot or does not answer.
    pub fn abandon(&self, init: &Process) {
        if init.transition.try_lock().is_err() && self.containers().len() == 1 {
            self.agent.down("the container was deleted while it was created");
        }
    }

    /// Whether there is no container, nor one in the making.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Milliseconds since the sandbox was begun, for the log: `make bench` splits a start by these.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn watch(self: Arc<Self>, mut notices: mpsc::Receiver<Notice>) {
        let logs = Arc::new(Semaphore::new(LOG_CONNECTIONS));
        let controls = Arc::new(Semaphore::new(CONTROL_CONNECTIONS));
        while let Some(notice) = notices.recv().await {
            match notice {
                Notice::Launched { machine, cpu_us } => {
                    self.on_kvm.store(machine == MachineKind::Kvm, Ordering::Relaxed);
                    let own_cpu_us = own_cpu_us();
                    tracing::info!(?machine, at_ms = self.elapsed_ms(), cpu_us, own_cpu_us, "vm is launched");
                }
                Notice::Accepted { port: CONTROL_PORT, stream } => match controls.clone().try_acquire_owned() {
                    Ok(place) => {
                        let sandbox = self.clone();
                        tokio::spawn(async move {
                            sandbox.control(stream).await;
                            drop(place);
                        });
                    }
                    Err(_) => self.complain("guest opens too many control connections"),
                },
                Notice::Accepted { port: LOG_PORT, stream } => match logs.clone().try_acquire_owned() {
                    Ok(place) => {
                        let sandbox = self.clone();
                        tokio::spawn(async move {
                            let throttled = || sandbox.complain("guest logs too fast, and has to wait");
                            if let Err(error) = agent::forward_log(stream, &sandbox.records, throttled).await {
                                sandbox.complain(&format!("guest log ended: {error}"));
                            }
                            drop(place);
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

    /// What the guest says of its processes. A container or process that is not known is a lie or late, and no harm; of
    /// those that are, [`crate::container::said`] knows what may be said still.
    fn event(self: Arc<Self>, event: Event) {
        match event.kind {
            Some(event::Kind::Exit(reported)) => {
                let found = self
                    .container(&reported.container_id)
                    .and_then(|container| Ok((container.process(&reported.exec_id)?, container)));
                // The guest's clock is the guest's word; the difference is what the message took.
                let exit = Exit::now(reported.status & 0xff);
                let verdict = found.as_ref().map_or(Verdict::Unasked, |(process, _)| process.said.exit(exit));
                match (found, verdict) {
                    (Ok((process, container)), Verdict::Taken) => self.exited(container, process, exit),
                    // A restarted agent repeats what it knows.
                    (_, Verdict::Repeated) => drop(self.repeated.fetch_add(1, Ordering::Relaxed)),
                    _ => self.unasked_exit(&reported.container_id, exit.status),
                }
            }
            Some(event::Kind::Oom(oom)) => match self.container(&oom.container_id) {
                Ok(container) => self.out_of_memory(&container),
                Err(_) => self.complain("guest reports a lack of memory in an unknown container"),
            },
            Some(_) | None => self.complain("guest sent an unknown event"),
        }
    }

    fn unasked_exit(&self, container: &str, status: u32) {
        let container = agent::cut(container, agent::ID);
        self.complain(&format!("guest reports the end of an unknown process of {container:?}, status {status}"));
    }

    fn out_of_memory(&self, container: &Container) {
        if !container.init.said.may_lack_memory() || matches!(container.init.state(), State::Stopped(_)) {
            self.complain("guest reports a lack of memory in a container that does not run");
        } else if container.out_of_memory.admit().is_some() && !self.publisher.out_of_memory(&container.id) {
            tracing::debug!(container = container.id, "a lack of memory waits to be told already");
        }
    }

    /// A process has ended, and [`crate::container::said`] knows: pass its output on, then tell everybody, in order.
    fn exited(self: &Arc<Self>, container: Arc<Container>, process: Arc<Process>, exit: Exit) {
        if process.exec_id.is_empty() {
            tokio::spawn(self.clone().init_exited(container, exit));
        } else {
            tokio::spawn(self.clone().drained(container, process, exit));
        }
    }

    async fn init_exited(self: Arc<Self>, container: Arc<Container>, exit: Exit) {
        // The output of all is waited for at once, and the init's end is the last that is told.
        let execs = container.close().into_iter();
        let execs: Vec<_> = execs.map(|exec| tokio::spawn(self.clone().outlived(container.clone(), exec))).collect();
        self.drain(&container, &container.init).await;
        for exec in execs {
            drop(exec.await);
        }
        self.tell(&container, &container.init, exit).await;
    }

    /// Waits for the end of an exec process whose init has ended. One of which the guest does not speak has been
    /// killed, as far as anybody can know.
    async fn outlived(self: Arc<Self>, container: Arc<Container>, exec: Arc<Process>) {
        tokio::select! {
            () = exec.said.ended() => {}
            () = tokio::time::sleep(REAP_DEADLINE) => {}
            () = exec.hurried() => {}
        }
        let killed = Exit::now(KILLED);
        if exec.said.exit(killed) == Verdict::Taken {
            tracing::warn!(container = container.id, exec = exec.exec_id, "the guest does not report its end");
            self.drained(container, exec, killed).await;
        } else {
            exec.wait().await;
        }
    }

    async fn drained(self: Arc<Self>, container: Arc<Container>, process: Arc<Process>, exit: Exit) {
        self.drain(&container, &process).await;
        self.tell(&container, &process, exit).await;
    }

    async fn drain(&self, container: &Container, process: &Process) {
        if !process.drain(self.drain_deadline()).await {
            tracing::info!(container = container.id, exec = process.exec_id, "something still holds its output open");
        }
    }

    /// Tells of an end: after the start, which holds the transition until it is told.
    async fn tell(&self, container: &Container, process: &Process, exit: Exit) {
        let _transition = process.transition.lock().await;
        let told = match process.state() {
            // An exec process whose start was never told has no end to tell either.
            State::Created => process.exec_id.is_empty(),
            State::Running => true,
            State::Stopped(_) => false,
        };
        if told {
            self.publish_exit(container, process, exit);
            process.set_stopped(exit);
        }
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
        let repeated = self.repeated.swap(0, Ordering::Relaxed);
        if repeated > 0 {
            tracing::info!(repeated, "the guest has reported ends of processes again");
        }
        self.agent.down(&why);
        let containers: Vec<_> = self.containers().values().filter_map(Slot::container).cloned().collect();
        for container in containers {
            if starved {
                self.publisher.out_of_memory(&container.id);
            }
            for process in container.processes() {
                let killed = Exit::now(KILLED);
                // What the guest was never asked for has no end; what has ended already keeps its own.
                if process.said.exit(killed) == Verdict::Taken {
                    self.exited(container.clone(), process, killed);
                }
            }
        }
    }

    /// Ends the VM, and waits until nothing of it is left.
    ///
    /// A vmm process that the kernel does not let go is in the journal still. Its guest counts as ended: nobody asks
    /// it, and the ends of its processes are told.
    pub async fn end_vm(self: &Arc<Self>) {
        self.ending.store(true, Ordering::Relaxed);
        if let Err(error) = self.vmm.end().await {
            tracing::error!(%error, "end vmm");
            self.ended(Err(format!("the vmm process was killed and is not gone: {error}")));
        }
    }

    /// Ends the VM, and takes away everything that the sandbox owns.
    pub async fn destroy(self: &Arc<Self>) {
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
