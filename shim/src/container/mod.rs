//! Containers and their processes: what state they are in, and in which order that becomes known.
//!
//! Order, as containerd's clients rely on it: a process's start is published before its exit, its exit after its output
//! has been passed on (or a deadline), the init's exit after those of all other processes of the container. Once the
//! init has ended, no other process is added or starts: see [`Container::close`].

pub mod copyup;
pub mod create;
pub mod kill;
pub mod logger;
pub mod said;
pub mod spec;
pub mod stdio;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use oci_spec::runtime::{Hooks, Process as ProcessSpec};
use tokio::{sync::watch, time::Instant};

use crate::{
    container::{
        said::Said,
        stdio::{Copies, Stdio},
    },
    error::Error,
    host::{anchor::Anchor, etc_files::Names, hooks::Context, journal::Resource},
    limit::Limit,
};

/// Events of a container's lack of memory in ten seconds. Who listens sets a flag.
const OUT_OF_MEMORY: u32 = 1;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When, by the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// A process that ended just now.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }

    /// When, for a reply.
    pub fn timestamp(&self) -> Timestamp {
        self.at.into()
    }
}

/// The state of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It exists, and does not run yet.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Stopped(Exit),
}

impl State {
    /// Its name, as in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A container's init or an exec process.
#[derive(Debug)]
pub struct Process {
    /// Empty for the init.
    pub exec_id: String,
    /// As the client asked for.
    pub stdio: Stdio,
    /// What an exec process runs; the init's is in the bundle.
    pub spec: Option<ProcessSpec>,
    /// Held from before a start is asked for until it has been published, and while an exit is published.
    pub transition: tokio::sync::Mutex<()>,
    /// What the guest has said of it.
    pub said: Said,
    state: watch::Sender<State>,
    /// Until when its output is waited for, once it is known that nobody will wait for long.
    hurry: watch::Sender<Option<Instant>>,
    streams: Mutex<Streams>,
}

/// What is between a process and its client.
#[derive(Debug, Default)]
struct Streams {
    copies: Option<Arc<Copies>>,
    /// A client may close stdin before the process, and with it the copies, is there.
    stdin_closed: bool,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(exec_id: &str, stdio: Stdio, spec: Option<ProcessSpec>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            transition: tokio::sync::Mutex::default(),
            said: Said::default(),
            state: watch::Sender::new(State::Created),
            hurry: watch::Sender::new(None),
            streams: Mutex::default(),
        }
    }

    /// Its state now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// It runs. False where it has ended already.
    pub fn set_running(&self) -> bool {
        self.state.send_if_modified(|state| match state {
            State::Created => {
                *state = State::Running;
                true
            }
            _ => false,
        })
    }

    /// It has ended. False where that was known already.
    pub fn set_stopped(&self, exit: Exit) -> bool {
        self.state.send_if_modified(|state| match state {
            State::Stopped(_) => false,
            state => {
                *state = State::Stopped(exit);
                true
            }
        })
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            if state.changed().await.is_err() {
                // The sender is in self.
                return Exit::now(255);
            }
        }
    }

    /// Sets the copies of its streams.
    pub fn set_copies(&self, copies: Copies) {
        let mut streams = lock(&self.streams);
        if streams.stdin_closed {
            copies.close_stdin();
        }
        streams.copies = Some(Arc::new(copies));
    }

    /// Its stdin ends after what its client has written.
    pub fn close_stdin(&self) {
        let mut streams = lock(&self.streams);
        streams.stdin_closed = true;
        if let Some(copies) = &streams.copies {
            copies.close_stdin();
        }
    }

    /// Waits until its output has been passed on: at most for `deadline`, and not after [`Process::hurry`].
    pub async fn drain(&self, deadline: Duration) -> bool {
        let Some(copies) = lock(&self.streams).copies.clone() else { return true };
        tokio::select! {
            drained = copies.drain(deadline) => drained,
            () = self.hurried() => {
                copies.give_up();
                false
            }
        }
    }

    /// Its output is not waited for any longer than until then.
    pub fn hurry(&self, by: Instant) {
        self.hurry.send_if_modified(|known| match known {
            Some(known) if *known <= by => false,
            _ => {
                *known = Some(by);
                true
            }
        });
    }

    /// Waits for the time that was given to [`Process::hurry`].
    pub async fn hurried(&self) {
        let mut hurry = self.hurry.subscribe();
        // The sender is in self.
        let by = hurry.wait_for(Option::is_some).await.ok().and_then(|by| *by);
        tokio::time::sleep_until(by.unwrap_or_else(Instant::now)).await;
    }

    /// Closes its streams.
    pub async fn close(&self) {
        let copies = lock(&self.streams).copies.take();
        if let Some(copies) = copies {
            copies.close().await;
        }
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
    anchor: Mutex<Option<Anchor>>,
    /// Held while it is taken away, which happens once.
    pub deletion: tokio::sync::Mutex<()>,
    /// Limits the events of its lack of memory.
    pub out_of_memory: Limit,
    _names: Option<Names>,
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
    /// A created container.
    pub fn new(
        init: Arc<Process>,
        anchor: Anchor,
        context: Context,
        hooks: Hooks,
        poststop: Option<Resource>,
        names: Option<Names>,
    ) -> Self {
        Self {
            id: context.id.clone(),
            bundle: context.bundle.clone(),
            init,
            hooks,
            poststop,
            pid: anchor.pid().unsigned_abs(),
            context,
            anchor: Mutex::new(Some(anchor)),
            deletion: tokio::sync::Mutex::default(),
            out_of_memory: Limit::new(OUT_OF_MEMORY),
            _names: names,
            execs: Mutex::default(),
            forgetting: Mutex::default(),
        }
    }

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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_ends_once_and_does_not_run_again() {
        let process = Process::new("", Stdio::default(), None);
        assert_eq!(process.state().name(), "created");
        assert!(process.set_stopped(Exit::now(7)));
        assert!(!process.set_stopped(Exit::now(8)));
        process.set_running();
        assert!(matches!(process.state(), State::Stopped(Exit { status: 7, .. })));
    }

    #[tokio::test]
    async fn all_who_wait_are_told() {
        let process = Arc::new(Process::new("", Stdio::default(), None));
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.wait().await.status })
            })
            .collect();
        tokio::task::yield_now().await;
        process.set_running();
        process.set_stopped(Exit::now(3));
        for waiter in waiting {
            assert_eq!(waiter.await.unwrap(), 3);
        }
        assert_eq!(process.wait().await.status, 3);
    }
}
