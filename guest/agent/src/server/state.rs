//! What the server knows about containers and processes: a copy of PID 1's table with what serves requests.

use std::{collections::BTreeMap, os::fd::OwnedFd, sync::Arc};

use tokio::{io::unix::AsyncFd, sync::watch};

use super::{
    cgroup::Cgroup,
    error::{CallError, Result},
    events::Exits,
};
use crate::protocol::{Exit, Key};

/// A pseudo terminal's master, shared by the copying task and resizes.
pub type Terminal = Arc<AsyncFd<OwnedFd>>;

/// All containers, and their exits.
#[derive(Debug, Default)]
pub struct State {
    containers: BTreeMap<String, Container>,
    /// The exits that were not deleted, and who wants to hear of them.
    pub exits: Exits,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// What is being, or was done with it.
    pub stage: Stage,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Whether its processes outlive its init, because they share a pid namespace with others.
    pub outlives_init: bool,
    /// Processes that were killed for want of memory, as far as has been told.
    pub oom_kills: u64,
    /// Its processes by exec id; init's is empty.
    processes: BTreeMap<String, Process>,
}

/// Where a container is in its life. Whether it still runs is its init's exit to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// libcontainer creates it.
    Creating,
    /// Its init waits for the start.
    Created,
    /// libcontainer starts it.
    Starting,
    /// It was started.
    Started,
    /// It is being removed.
    Deleting,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its pid; 0 until it is there.
    pub pid: i32,
    /// How it ended, where it has.
    pub exit: watch::Sender<Option<Exit>>,
    /// Its terminal, where it has one.
    pub terminal: Option<Terminal>,
}

impl Default for Process {
    fn default() -> Self {
        Self { pid: 0, exit: watch::Sender::new(None), terminal: None }
    }
}

impl State {
    /// Adds a container, with an init that is not there yet.
    pub fn add(&mut self, id: &str, stage: Stage, outlives_init: bool) -> Result<()> {
        if self.containers.contains_key(id) {
            return Err(CallError::Exists(format!("container {id:?} exists already")));
        }
        let processes = BTreeMap::from([(String::new(), Process::default())]);
        let container = Container { stage, cgroup: Cgroup::of(id), outlives_init, oom_kills: 0, processes };
        self.containers.insert(id.into(), container);
        Ok(())
    }

    /// The container.
    pub fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| CallError::no_container(id))
    }

    /// The process.
    pub fn process(&mut self, container: &str, exec: &str) -> Result<&mut Process> {
        self.container(container)?.process(exec).ok_or_else(|| CallError::no_process(container, exec))
    }

    /// All containers.
    pub fn containers(&mut self) -> impl Iterator<Item = (&String, &mut Container)> {
        self.containers.iter_mut()
    }

    /// Notes that a process has ended.
    pub fn ended(&mut self, key: &Key, pid: i32, exit: Exit) {
        if let Ok(process) = self.process(&key.container, &key.exec) {
            process.pid = pid;
            process.exit.send_replace(Some(exit));
        }
        self.exits.push(key.clone(), pid, exit);
    }

    /// Moves a container from one stage to the next; the error says what it is instead.
    pub fn advance(&mut self, id: &str, from: Stage, to: Stage, what: &str) -> Result<()> {
        let container = self.container(id)?;
        if container.stage != from || container.has_ended() {
            return Err(container.refuse(id, what));
        }
        container.stage = to;
        Ok(())
    }

    /// Forgets a container, its processes and their exits.
    pub fn remove(&mut self, id: &str) {
        self.containers.remove(id);
        self.exits.forget(|key| key.container == id);
    }

    /// Forgets an exec and its exit.
    pub fn remove_exec(&mut self, container: &str, exec: &str) {
        if let Ok(c) = self.container(container) {
            c.processes.remove(exec);
        }
        self.exits.forget(|key| key.container == container && key.exec == exec);
    }
}

impl Container {
    /// One of its processes.
    pub fn process(&mut self, exec: &str) -> Option<&mut Process> {
        self.processes.get_mut(exec)
    }

    /// All its processes.
    pub fn processes(&self) -> impl Iterator<Item = (&String, &Process)> {
        self.processes.iter()
    }

    /// Adds an exec that is not there yet.
    pub fn add_exec(&mut self, container: &str, exec: &str) -> Result<()> {
        if self.processes.contains_key(exec) {
            return Err(CallError::Exists(format!("process {exec:?} of container {container:?} exists already")));
        }
        self.processes.insert(exec.into(), Process::default());
        Ok(())
    }

    /// Whether its init has ended.
    pub fn has_ended(&self) -> bool {
        self.processes.get("").is_some_and(|init| init.exit.borrow().is_some())
    }

    /// The error for what cannot be done in its present state.
    pub fn refuse(&self, id: &str, what: &str) -> CallError {
        let state = match self.stage {
            Stage::Deleting => "being deleted",
            Stage::Creating => "being created",
            _ if self.has_ended() => "stopped",
            Stage::Created => "created",
            Stage::Starting => "being started",
            Stage::Started => "running",
        };
        CallError::State(format!("cannot {what} container {id:?}: it is {state}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut state = State::default();
        state.add("a", Stage::Created, false).unwrap();
        state
    }

    const EXIT: Exit = Exit { status: 0, at_ns: 1, number: 0 };

    #[test]
    fn ids_are_taken_once() {
        let mut state = state();
        let again = state.add("a", Stage::Creating, false).unwrap_err();
        assert!(matches!(again, CallError::Exists(_)));
        state.container("a").unwrap().add_exec("a", "x").unwrap();
        assert!(matches!(state.container("a").unwrap().add_exec("a", "x"), Err(CallError::Exists(_))));
    }

    #[test]
    fn a_container_starts_once_and_only_alive() {
        let mut state = state();
        state.advance("a", Stage::Created, Stage::Starting, "start").unwrap();
        let twice = state.advance("a", Stage::Created, Stage::Starting, "start").unwrap_err();
        assert_eq!(twice, CallError::State("cannot start container \"a\": it is being started".into()));
        state.container("a").unwrap().stage = Stage::Created;
        state.ended(&Key { container: "a".into(), exec: String::new() }, 3, EXIT);
        let dead = state.advance("a", Stage::Created, Stage::Starting, "start").unwrap_err();
        assert_eq!(dead, CallError::State("cannot start container \"a\": it is stopped".into()));
        assert!(matches!(state.container("b"), Err(CallError::NotFound(_))));
    }
}
