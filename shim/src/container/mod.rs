//! A container: its processes, what can be done to it, and in which order that becomes known.
//!
//! Order, as containerd's clients rely on it: a process's start is published before its exit, its exit after its output
//! has been passed on (or a deadline), the init's exit after those of all other processes of the container. Once the
//! init has ended, no other process is added or starts: see [`Container::close`]. [`exits`] keeps that order.
//!
//! A container is lent the host's and the guest's side of its sandbox. It knows neither the sandbox nor other
//! containers.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use oci_spec::runtime::Hooks;
use tokio::sync::watch;
use vz_sys::{rate::Limit, sync::lock};

use crate::{
    events::Publisher,
    guest::Guest,
    host::{Host, anchor::Anchor, disks::Disk, etc_files::EtcFiles, hooks::Context, journal::Resource},
};

pub mod copyup;
pub mod create;
pub mod delete;
pub mod error;
pub mod exec;
pub mod exits;
pub mod kill;
pub mod logger;
pub mod peers;
pub mod plan;
pub mod pod_files;
pub mod process;
pub mod said;
pub mod start;
pub mod stdio;
pub mod undo;
pub mod update;

pub use error::Error;
pub use pod_files::PodFiles;
pub use process::{Process, State};
pub use said::Exit;

/// What a container is lent of its sandbox.
#[derive(Debug, Clone)]
pub struct Lent {
    /// The host's side.
    pub host: Arc<Host>,
    /// The guest's side.
    pub guest: Arc<Guest>,
    /// Where events go.
    pub publisher: Publisher,
    /// containerd's namespace.
    pub namespace: String,
    /// How long a process's output is waited for after its end.
    pub drain_deadline: Duration,
    /// When the sandbox was begun.
    pub begun: Instant,
    /// What a pod's containers find in /etc, if containerd leaves that to the shim.
    pub pod_files: Option<Arc<PodFiles>>,
}

impl Lent {
    /// Milliseconds since the sandbox was begun, for the log: `make bench` splits a start by these.
    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its init.
    pub init: Arc<Process>,
    /// Hooks that run on the host.
    pub hooks: Hooks,
    /// What hooks are told.
    pub context: Context,
    /// Its poststop hooks in the journal.
    pub poststop: Option<Resource>,
    /// The anchor's pid: the pid of every reply.
    pub pid: u32,
    /// Held while it is taken away, which happens once.
    pub deletion: tokio::sync::Mutex<()>,
    lent: Lent,
    /// Those of the VM's disks that are its.
    disks: Vec<Disk>,
    anchor: Arc<Mutex<Option<Anchor>>>,
    /// Limits the events of its lack of memory.
    out_of_memory: Limit,
    _etc_files: Option<EtcFiles>,
    execs: Mutex<Execs>,
    /// Ids of deleted exec processes that the guest has still to forget; each receiver is told when it has.
    forgetting: Mutex<HashMap<String, watch::Receiver<()>>>,
}

/// A container's exec processes.
#[derive(Debug, Default)]
struct Execs {
    known: HashMap<String, Arc<Process>>,
    /// Whether the init has ended: no other process starts.
    closed: bool,
}

impl Container {
    /// Has the guest forget a deleted exec process by `work`, which nobody needs to wait for but its namesake.
    pub fn forget_exec(self: &Arc<Self>, exec_id: &str, work: impl Future<Output = ()> + Send + 'static) {
        let (container, id) = (self.clone(), exec_id.to_owned());
        let (done, told) = watch::channel(());
        lock(&self.forgetting).insert(id.clone(), told);
        tokio::spawn(async move {
            work.await;
            lock(&container.forgetting).remove(&id);
            drop(done);
        });
    }

    /// Waits until the guest has forgotten an earlier exec process with this id.
    pub async fn forgotten(&self, exec_id: &str) {
        let told = lock(&self.forgetting).get(exec_id).cloned();
        if let Some(mut told) = told {
            // It says nothing but that its sender is gone.
            drop(told.changed().await);
        }
    }

    /// Its init (empty id) or one of its exec processes.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let known = self.execs().known.get(exec_id).cloned();
        known.ok_or_else(|| Error::NotFound { what: "exec", id: exec_id.into() })
    }

    /// Adds an exec process, and publishes that by `publish` before anything else of it can be.
    pub fn add_exec(&self, process: Process, publish: impl FnOnce()) -> Result<(), Error> {
        use std::collections::hash_map::Entry;
        let mut execs = self.execs();
        if execs.closed {
            return Err(self.stopped());
        }
        match execs.known.entry(process.exec_id.clone()) {
            Entry::Occupied(taken) => Err(Error::AlreadyExists { what: "exec", id: taken.key().clone() }),
            Entry::Vacant(free) => {
                free.insert(Arc::new(process));
                publish();
                Ok(())
            }
        }
    }

    /// An exec process runs, which `publish` publishes; unless the init has ended meanwhile.
    pub fn run_exec(&self, process: &Process, publish: impl FnOnce()) -> Result<(), Error> {
        let execs = self.execs();
        if execs.closed || !process.set_running() {
            return Err(self.stopped());
        }
        publish();
        Ok(())
    }

    /// The init has ended: no exec process is added or starts from now on. Those that run.
    pub fn close(&self) -> Vec<Arc<Process>> {
        let mut execs = self.execs();
        execs.closed = true;
        execs.known.values().filter(|process| process.state() == State::Running).cloned().collect()
    }

    fn stopped(&self) -> Error {
        Error::State { what: "container", id: self.id.clone(), state: "stopped", wanted: "must be running" }
    }

    /// What a request is told that `process` must be in another state for.
    pub fn wrong_state(&self, process: &Process, wanted: &'static str) -> Error {
        let (what, id) = match process.exec_id.as_str() {
            "" => ("container", &self.id),
            _ => ("exec", &process.exec_id),
        };
        Error::State { what, id: id.clone(), state: process.state().name(), wanted }
    }

    /// Its metrics, in containerd's form, until it is deleted: CRI asks a container that has ended whether the kernel
    /// has killed it for want of memory.
    pub async fn stats(&self) -> Result<Vec<u8>, Error> {
        Ok(self.lent.guest.agent.stats(&self.id).await?)
    }

    /// Sets the size of a process's terminal. A process without one is left alone, as with runc.
    pub async fn resize(&self, process: &Process, columns: u32, rows: u32) -> Result<(), Error> {
        if process.stdio.terminal {
            self.lent.guest.agent.resize_pty(&self.id, &process.exec_id, columns, rows).await?;
        }
        Ok(())
    }

    /// Forgets an exec process. False where another one has its id by now.
    pub fn remove_exec(&self, process: &Arc<Process>) -> bool {
        let mut execs = self.execs();
        let ours = execs.known.get(&process.exec_id).is_some_and(|known| Arc::ptr_eq(known, process));
        if ours {
            execs.known.remove(&process.exec_id);
        }
        ours
    }

    /// Whether this exec process has not been removed.
    pub fn has(&self, process: &Arc<Process>) -> bool {
        process.exec_id.is_empty()
            || self.execs().known.get(&process.exec_id).is_some_and(|known| Arc::ptr_eq(known, process))
    }

    /// All its processes, the init last.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = self.execs().known.values().cloned().collect();
        all.push(self.init.clone());
        all
    }

    /// Ends the anchor.
    pub async fn end_anchor(&self) {
        let anchor = lock(&self.anchor).take();
        if let Some(anchor) = anchor {
            anchor.end().await;
        }
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        lock(&self.execs)
    }
}
