//! Listens to a sandbox's VM: its connections, what its guest says, and its end.
//!
//! Threat: the guest opens as many connections as it likes and says whatever it likes. Connections are counted, log
//! records have a budget, and each complaint about the guest is limited in rate.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use tokio::{
    net::UnixStream,
    sync::{Semaphore, mpsc},
};
use vz_machine::{
    control::{Cause, Ended, MachineKind},
    verdict::{self, Consequence, Host},
};
use vz_proto::{CONTROL_PORT, Event, LOG_PORT, event};
use vz_sys::{error::chain, rate::Limit};

use super::Sandbox;
use crate::{
    container::{Exit, exits::Lack, said::Verdict},
    guest::{log, vmm::Notice},
    host::cgroup::Cgroup,
    limit::Budget,
};

/// Lines in ten seconds about what a guest should not do.
const COMPLAINTS: u32 = 20;
/// Log connections of the guest at the same time.
const LOG_CONNECTIONS: usize = 2;
/// Control connections of the guest at the same time: the one that is used, and those that wait for its end.
const CONTROL_CONNECTIONS: usize = 4;

/// What is known of a VM while it runs.
#[derive(Debug)]
struct Watch {
    sandbox: Arc<Sandbox>,
    /// The version that the agent of the bundle has.
    agent_version: String,
    hostname: String,
    /// Whether the VM is on the KVM machine, once it is launched.
    on_kvm: AtomicBool,
    /// For lines about what the guest should not do.
    complaints: Limit,
    /// Ends of processes that the guest has reported again.
    repeated: AtomicU64,
    /// For what the guest wants to have logged.
    records: Budget,
}

/// Listens to the VM of a sandbox until it has ended.
pub async fn run(sandbox: Arc<Sandbox>, agent_version: String, hostname: String, mut notices: mpsc::Receiver<Notice>) {
    let watch = Arc::new(Watch {
        sandbox,
        agent_version,
        hostname,
        on_kvm: AtomicBool::new(false),
        complaints: Limit::new(COMPLAINTS),
        repeated: AtomicU64::new(0),
        records: Budget::of_a_guest(),
    });
    let logs = Arc::new(Semaphore::new(LOG_CONNECTIONS));
    let controls = Arc::new(Semaphore::new(CONTROL_CONNECTIONS));
    while let Some(notice) = notices.recv().await {
        match notice {
            Notice::Launched { machine, cpu_us } => {
                watch.on_kvm.store(machine == MachineKind::Kvm, Ordering::Relaxed);
                let (at_ms, own_cpu_us) = (watch.sandbox.lent.elapsed_ms(), own_cpu_us());
                tracing::info!(?machine, at_ms, cpu_us, own_cpu_us, "vm is launched");
            }
            Notice::Accepted { port: CONTROL_PORT, stream } => match controls.clone().try_acquire_owned() {
                Ok(place) => {
                    let watch = watch.clone();
                    tokio::spawn(async move {
                        watch.control(stream).await;
                        drop(place);
                    });
                }
                Err(_) => watch.complain("guest opens too many control connections"),
            },
            Notice::Accepted { port: LOG_PORT, stream } => match logs.clone().try_acquire_owned() {
                Ok(place) => {
                    let watch = watch.clone();
                    tokio::spawn(async move {
                        let throttled = || watch.complain("guest logs too fast, and has to wait");
                        if let Err(error) = log::forward(stream, &watch.records, throttled).await {
                            watch.complain(&format!("guest log ended: {error}"));
                        }
                        drop(place);
                    });
                }
                Err(_) => watch.complain("guest opens too many log connections"),
            },
            Notice::Accepted { port, .. } => watch.complain(&format!("guest connected to unknown port {port}")),
            Notice::Ended(ended) => watch.ended(ended),
        }
    }
}

impl Watch {
    /// Logs what the guest should not do, which it can do as often as it likes.
    fn complain(&self, what: &str) {
        match self.complaints.admit() {
            None => {}
            Some(0) => tracing::warn!("{what}"),
            Some(left_out) => tracing::warn!(left_out, "{what}"),
        }
    }

    async fn control(self: Arc<Self>, stream: UnixStream) {
        let lent = &self.sandbox.lent;
        let (guest, agent) = (&lent.guest, &lent.guest.agent);
        if !agent.is_free().await {
            self.complain("a second control connection of the guest is refused");
            return;
        }
        if let Err(error) = agent.connect(stream, &self.agent_version, &self.hostname).await {
            let why = chain(&error);
            tracing::error!(error = why, "guest agent is refused");
            agent.down(&why);
            guest.end().await;
            return;
        }
        tracing::info!(at_ms = lent.elapsed_ms(), "sandbox is ready");
        if self.on_kvm.load(Ordering::Relaxed) {
            verdict::came_up();
        }
        if let Err(error) = agent.events(|event| self.event(event)).await
            && !guest.is_ending()
        {
            tracing::warn!(error = chain(&error), "guest agent's events ended");
        }
        agent.lost();
    }

    /// What the guest says of its processes. A container or process that is not known is a lie or late, and no harm; of
    /// those that are, [`crate::container::said`] knows what may be said still.
    fn event(&self, event: Event) {
        match event.kind {
            Some(event::Kind::Exit(reported)) => {
                // The guest's clock is the guest's word; the difference is what the message took.
                let exit = Exit::now(reported.status & 0xff);
                let found = self.sandbox.process(&reported.container_id, &reported.exec_id);
                match found.map_or(Verdict::Unasked, |(container, process)| container.exited(process, exit)) {
                    Verdict::Taken => {}
                    // A restarted agent repeats what it knows.
                    Verdict::Repeated => drop(self.repeated.fetch_add(1, Ordering::Relaxed)),
                    Verdict::Unasked => self.unasked_exit(&reported.container_id, exit.status),
                }
            }
            Some(event::Kind::Oom(oom)) => match self.sandbox.container(&oom.container_id) {
                Ok(container) => match container.lacks_memory() {
                    Lack::Told => {}
                    Lack::NotRunning => {
                        self.complain("guest reports a lack of memory in a container that does not run");
                    }
                },
                Err(_) => self.complain("guest reports a lack of memory in an unknown container"),
            },
            Some(_) | None => self.complain("guest sent an unknown event"),
        }
    }

    fn unasked_exit(&self, container: &str, status: u32) {
        let container = log::cut(container, log::ID);
        self.complain(&format!("guest reports the end of an unknown process of {container:?}, status {status}"));
    }

    /// The VM has ended, and with it every process.
    fn ended(&self, ended: Result<Ended, String>) {
        let lent = &self.sandbox.lent;
        let is_ending = lent.guest.is_ending();
        let mut why = match &ended {
            Err(died) => died.clone(),
            Ok(ended) if ended.console.is_empty() => ended.message.clone(),
            Ok(ended) => format!("{}; guest console: {}", ended.message, ended.console.trim()),
        };
        let starved = !is_ending && lent.host.cgroup.as_ref().is_some_and(Cgroup::was_starved);
        if starved {
            why = format!(
                "the host's kernel has killed the vm for want of memory, see its cgroup's memory.events: {why}"
            );
        }
        if let Ok(ended) = &ended
            && ended.cause == Cause::Kvm
        {
            match Host::this().failed_early(&ended.message, lent.begun.elapsed()) {
                Consequence::TryAgain => tracing::warn!("the next vm tries KVM once more"),
                Consequence::Unusable => tracing::error!("KVM has failed twice: `auto` does not use it any more"),
            }
        }
        match ended.ok().map(|ended| ended.cause) {
            _ if is_ending => tracing::debug!("vm has ended"),
            // Nobody here asked for it, and its containers are gone.
            Some(Cause::Shutdown) => tracing::warn!(why, "vm has ended"),
            cause => tracing::error!(?cause, why, "vm has ended"),
        }
        let repeated = self.repeated.swap(0, Ordering::Relaxed);
        if repeated > 0 {
            tracing::info!(repeated, "the guest has reported ends of processes again");
        }
        lent.guest.agent.down(&why);
        for container in self.sandbox.all() {
            if starved {
                lent.publisher.out_of_memory(&container.id);
            }
            container.all_killed();
        }
    }
}

/// CPU time that this process has used, in microseconds.
fn own_cpu_us() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF)
        .map_or(0, |usage| usage.user_time().num_microseconds() + usage.system_time().num_microseconds())
}
