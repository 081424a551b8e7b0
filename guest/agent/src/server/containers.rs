//! Containers: made, started, removed, and found again after a restart.

use std::{
    fs, io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::{OnceCell, watch},
    time::timeout,
};
use vz_proto::{CreateContainerRequest, Stdio as StdioTokens};
use vz_sys::sync::lock;

use super::{
    cgroup::Cgroup,
    disks,
    error::{CallError, Result},
    link::Link,
    network::Network,
    oom::Watch,
    prepare::{Prepared, prepare, write_bundle},
    shared,
    state::{Stage, State},
    stdio::{self, Ends},
    streams::Streams,
    vsock::Listener,
};
use crate::{
    clock::Moment,
    paths,
    protocol::{Exit, Key, Request, Stdio, Stream},
    text,
};

/// For PID 1 to reap what has been killed.
const REAP: Duration = Duration::from_secs(10);

/// All that the server does.
#[derive(Debug)]
pub struct Agent {
    pub(super) link: Arc<Link>,
    pub(super) streams: Arc<Streams>,
    oom: Watch,
    booted: OnceCell<()>,
    network: Network,
    state: Mutex<State>,
    /// Containers whose creation nobody waits for any more.
    pub(super) abandoned: Mutex<Vec<String>>,
}

/// What PID 1 says about this start of the server.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// How many there were before.
    pub incarnation: u32,
    /// When PID 1 began.
    pub first: Moment,
}

impl Agent {
    /// Knows of nothing yet.
    pub fn new(link: Link, oom: Watch) -> Self {
        Self {
            link: Arc::new(link),
            streams: Arc::default(),
            oom,
            booted: OnceCell::new(),
            network: Network::default(),
            state: Mutex::default(),
            abandoned: Mutex::default(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) async fn accept_streams(self: Arc<Self>, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok(stream) => drop(tokio::spawn(Arc::clone(&self.streams).arrive(stream))),
                Err(e) => {
                    // Out of descriptors, perhaps: calls then miss their streams and say so.
                    tracing::error!("accept stream: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    pub(super) async fn watch_oom(self: Arc<Self>) {
        loop {
            match self.oom.changed().await {
                Ok(containers) => containers.iter().for_each(|id| self.tell_oom(id)),
                Err(e) => return tracing::error!("watch for out of memory: {e}"),
            }
        }
    }

    pub(super) fn watch(&self, id: &str) {
        let cgroup = Cgroup::of(id);
        self.oom.add(id, &cgroup);
        let kills = cgroup.oom_kills();
        if let Ok(container) = self.state().container(id) {
            container.oom_kills = kills;
        }
    }

    pub(super) fn tell_oom(&self, id: &str) {
        let mut state = self.state();
        let Ok(container) = state.container(id) else { return };
        let kills = container.cgroup.oom_kills();
        if kills > container.oom_kills {
            container.oom_kills = kills;
            state.exits.out_of_memory(id);
        }
    }

    /// Claims the streams that a request names: which there are, and the connections.
    pub(super) async fn claim(&self, tokens: &StdioTokens) -> Result<(Stdio, Vec<OwnedFd>)> {
        let mut stdio = Stdio { terminal: tokens.terminal, streams: Vec::new() };
        let mut fds = Vec::new();
        for (stream, token, name) in [
            (Stream::Stdin, &tokens.stdin, "stdin"),
            (Stream::Stdout, &tokens.stdout, "stdout"),
            (Stream::Stderr, &tokens.stderr, "stderr"),
        ] {
            if token.is_empty() || (tokens.terminal && stream != Stream::Stdout) {
                continue;
            }
            fds.push(self.streams.claim(token, name).await?.into());
            stdio.streams.push(stream);
        }
        if tokens.terminal && fds.is_empty() {
            return Err(CallError::Invalid("a terminal needs the stream stdout".into()));
        }
        Ok((stdio, fds))
    }

    /// Notes a process's pid and starts to copy its stdio.
    pub(super) fn attach(&self, key: &Key, pid: i32, terminal: bool, ends: Vec<(Stream, Ends)>) {
        let mut state = self.state();
        let Ok(process) = state.process(&key.container, &key.exec) else { return };
        process.pid = pid;
        for (stream, ends) in ends {
            let link = Arc::clone(&self.link);
            if terminal {
                match stdio::asynchronous(ends.process) {
                    Ok(master) => {
                        let master = Arc::new(master);
                        process.terminal = Some(Arc::clone(&master));
                        let exit = process.exit.subscribe();
                        tokio::spawn(stdio::terminal(ends.host, master, exit, link, key.clone()));
                    }
                    Err(e) => tracing::error!(container = key.container, exec = key.exec, "attach terminal: {e}"),
                }
            } else if stream == Stream::Stdin {
                tokio::spawn(stdio::input(ends, link, key.clone()));
            } else {
                tokio::spawn(stdio::output(ends, stream, link, key.clone()));
            }
        }
    }

    /// Logs what libcontainer logged.
    pub(super) fn log(container: &str, lines: &[(String, String)]) {
        for (level, line) in lines {
            match level.as_str() {
                "error" => tracing::error!(container, "libcontainer: {line}"),
                "warn" => tracing::warn!(container, "libcontainer: {line}"),
                "info" => tracing::info!(container, "libcontainer: {line}"),
                _ => tracing::debug!(container, "libcontainer: {line}"),
            }
        }
    }

    /// Waits until PID 1 has made all that containers need.
    async fn booted(&self) -> Result<()> {
        let ask = || async { self.link.ask(|id| Request::Booted { id }, Vec::new()).await.result.map(drop) };
        self.booted.get_or_try_init(ask).await?;
        Ok(())
    }

    /// Makes the containers' network what it has to be.
    pub async fn update_network(self: Arc<Self>, network: Vec<u8>) -> Result<()> {
        self.booted().await?;
        self.network.update(&network)
    }

    /// Creates a container: its pid.
    pub async fn create(self: Arc<Self>, request: CreateContainerRequest) -> Result<i32> {
        let id = request.container_id.as_str();
        if !text::is_id(id) {
            return Err(CallError::Invalid(format!("container id {id:?} is not allowed")));
        }
        self.booted().await?;
        if !request.network.is_empty() {
            self.network.update(&request.network)?;
        }
        let tokens = request.stdio.unwrap_or_default();
        let mut prepared = prepare(&request.spec, id, tokens.terminal)?;
        disks::settle(&mut prepared.spec, &request.disks)?;
        shared::join(&mut prepared.spec, |owner| self.running_init(owner))?;
        self.state().add(id, Stage::Creating, prepared.outlives_init)?;
        let created = self.try_create(id, &mut prepared, &tokens).await;
        if created.is_err()
            && let Err(e) = self.remove(id).await
        {
            tracing::error!(container = id, "remove what failed: {e}");
        }
        created
    }

    /// The pid of a container's init, whose namespaces another one is to join.
    fn running_init(&self, id: &str) -> Result<i32> {
        let mut state = self.state();
        let container = state.container(id)?;
        match container.process("") {
            Some(init) if init.pid != 0 && init.exit.borrow().is_none() => Ok(init.pid),
            _ => Err(CallError::State(format!("container {id:?}, whose namespaces are to be joined, does not run"))),
        }
    }

    async fn try_create(&self, id: &str, prepared: &mut Prepared, tokens: &StdioTokens) -> Result<i32> {
        shared::make_memory(&mut prepared.spec)?;
        write_bundle(id, &prepared.spec).map_err(CallError::io("write bundle"))?;
        let cgroup = Cgroup::of(id);
        cgroup.remove().await.map_err(CallError::io("remove a cgroup that was left"))?;
        cgroup.create().map_err(CallError::io("create cgroup"))?;
        let (stdio, fds) = self.claim(tokens).await?;
        let hosts = duplicate(&fds).map_err(CallError::io("duplicate streams"))?;
        let request = |number| Request::Create { id: number, container: id.into(), stdio: stdio.clone() };
        let answer = self.link.ask(request, fds).await;
        Self::log(id, &answer.log);
        let pid = answer.result?;
        let ends = pair(&stdio, hosts, answer.fds);
        let key = Key { container: id.into(), exec: String::new() };
        self.attach(&key, pid, stdio.terminal, ends);
        self.watch(id);
        // Not `advance`: it may have been killed by now, and is a created container nevertheless.
        self.state().container(id)?.stage = Stage::Created;
        Ok(pid)
    }

    /// Starts a created container.
    pub async fn start(self: Arc<Self>, id: String) -> Result<()> {
        self.state().advance(&id, Stage::Created, Stage::Starting, "start")?;
        let answer = self.link.ask(|number| Request::Start { id: number, container: id.clone() }, Vec::new()).await;
        Self::log(&id, &answer.log);
        let mut state = self.state();
        let container = state.container(&id)?;
        if container.stage == Stage::Starting {
            container.stage = if answer.result.is_ok() { Stage::Started } else { Stage::Created };
        }
        let ended = container.has_ended();
        match answer.result {
            Err(crate::protocol::Failure::Gone) => Err(container.refuse(&id, "start")),
            Err(_) if ended => Err(container.refuse(&id, "start")),
            result => result.map(drop).map_err(Into::into),
        }
    }

    /// Removes a container that does not run, with all that it has: its init's pid and exit.
    pub async fn delete(self: Arc<Self>, id: String) -> Result<(i32, Exit)> {
        let before = {
            let mut state = self.state();
            let container = state.container(&id)?;
            let may = container.has_ended() || container.stage == Stage::Created;
            if !may || matches!(container.stage, Stage::Creating | Stage::Starting | Stage::Deleting) {
                return Err(container.refuse(&id, "delete"));
            }
            std::mem::replace(&mut container.stage, Stage::Deleting)
        };
        let removed = self.remove(&id).await;
        if removed.is_err()
            && let Ok(container) = self.state().container(&id)
        {
            container.stage = before;
        }
        removed?.ok_or_else(|| CallError::Failed(format!("container {id:?} had no process")))
    }

    /// Removes whatever there is of a container.
    pub(super) async fn remove(&self, id: &str) -> Result<Option<(i32, Exit)>> {
        let (cgroup, processes) = {
            let mut state = self.state();
            let container = state.container(id)?;
            let watched = |p: &super::state::Process| (p.pid, p.exit.subscribe());
            let processes: Vec<_> = container.processes().map(|(exec, p)| (exec.clone(), watched(p))).collect();
            (container.cgroup.clone(), processes)
        };
        cgroup.remove().await.map_err(CallError::io("remove cgroup"))?;
        let mut init = None;
        for (exec, (pid, exit)) in processes {
            if pid == 0 {
                continue;
            }
            let exit = ended(exit).await.ok_or_else(|| CallError::Failed(format!("process {pid} does not end")))?;
            if exec.is_empty() {
                init = Some((pid, exit));
            }
        }
        shared::remove_memory(id).map_err(CallError::io("remove shared memory"))?;
        for directory in [paths::bundle(id), paths::state(id)] {
            match fs::remove_dir_all(&directory) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(CallError::io(format!("remove {}", directory.display()))(e));
                }
                _ => {}
            }
        }
        self.link.tell(&Request::Forget { key: Key { container: id.into(), exec: String::new() } });
        self.state().remove(id);
        Ok(init)
    }
}

async fn ended(mut exit: watch::Receiver<Option<Exit>>) -> Option<Exit> {
    timeout(REAP, exit.wait_for(Option::is_some)).await.ok()?.ok().and_then(|exit| *exit)
}

pub(super) fn duplicate(fds: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    fds.iter().map(OwnedFd::try_clone).collect()
}

pub(super) fn pair(stdio: &Stdio, hosts: Vec<OwnedFd>, processes: Vec<OwnedFd>) -> Vec<(Stream, Ends)> {
    let ends = hosts.into_iter().zip(processes).map(|(host, process)| Ends { host, process });
    stdio.streams.iter().copied().zip(ends).collect()
}
