//! Processes of containers: executed, signalled, watched, forgotten.

use std::{fs, io, os::unix::fs::DirBuilderExt, sync::Arc};

use vz_proto::{ExecProcessRequest, SignalProcessRequest};

use super::{
    containers::{Agent, duplicate, pair},
    error::{CallError, Result},
    state::Stage,
};
use crate::{
    paths,
    protocol::{Exit, Failure, Key, Request},
    text,
};

/// Signals that Linux has on this architecture.
const SIGNALS: std::ops::RangeInclusive<u32> = 1..=64;

impl Agent {
    /// Executes a process in a running container: its pid.
    pub async fn exec(self: Arc<Self>, request: ExecProcessRequest) -> Result<i32> {
        let (container, exec) = (request.container_id.as_str(), request.exec_id.as_str());
        if !text::is_id(exec) {
            return Err(CallError::Invalid(format!("exec id {exec:?} is not allowed")));
        }
        // Checked here to say what is wrong with it; libcontainer reads it from its file.
        let process: oci_spec::runtime::Process = serde_json::from_slice(&request.process)
            .map_err(|e| CallError::Invalid(format!("process {exec:?} of container {container:?}: {e}")))?;
        {
            let mut state = self.state();
            let found = state.container(container)?;
            if found.stage != Stage::Started || found.has_ended() {
                return Err(found.refuse(container, "execute in"));
            }
            found.add_exec(container, exec)?;
        }
        let tokens = request.stdio.unwrap_or_default();
        let made = self.try_exec(container, exec, &process, &tokens).await;
        // Its program runs, or never will: nobody reads these any more.
        let directory = paths::exec(container, exec);
        match fs::remove_dir_all(&directory) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::error!(container, "remove {}: {e}", directory.display());
            }
            _ => {}
        }
        if made.is_err() {
            self.state().remove_exec(container, exec);
        }
        made
    }

    async fn try_exec(
        &self,
        container: &str,
        exec: &str,
        process: &oci_spec::runtime::Process,
        tokens: &vz_proto::Stdio,
    ) -> Result<i32> {
        let directory = paths::exec(container, exec);
        let write = || {
            fs::DirBuilder::new().mode(0o700).recursive(true).create(&directory)?;
            fs::write(directory.join("process.json"), serde_json::to_vec(process)?)
        };
        write().map_err(CallError::io("write process.json"))?;
        let (stdio, fds) = self.claim(tokens).await?;
        let hosts = duplicate(&fds).map_err(CallError::io("duplicate streams"))?;
        let key = Key { container: container.into(), exec: exec.into() };
        let request = |id| Request::Exec { id, key: key.clone(), stdio: stdio.clone() };
        let answer = self.link.ask(request, fds).await;
        Self::log(container, &answer.log);
        let pid = match answer.result {
            Ok(pid) => pid,
            Err(failure) => {
                let mut state = self.state();
                let found = state.container(container)?;
                if found.has_ended() {
                    return Err(found.refuse(container, "execute in"));
                }
                return Err(failure.into());
            }
        };
        self.attach(&key, pid, stdio.terminal, pair(&stdio, hosts, answer.fds));
        Ok(pid)
    }

    /// Sends a signal to one process or all of a container.
    pub async fn signal(self: Arc<Self>, request: SignalProcessRequest) -> Result<()> {
        let SignalProcessRequest { container_id: container, exec_id: exec, signal, all, .. } = request;
        let number = i32::try_from(signal).ok().filter(|_| SIGNALS.contains(&signal));
        let number = number.ok_or_else(|| CallError::Invalid(format!("signal {signal} does not exist")))?;
        if all {
            let cgroup = {
                let mut state = self.state();
                let found = state.container(&container)?;
                found.cgroup.clone()
            };
            let pids = match cgroup.pids() {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
                pids => pids.map_err(CallError::io("list processes"))?,
            };
            if pids.is_empty() {
                return Err(CallError::finished());
            }
            return cgroup.signal(number).await.map_err(CallError::io(format!("send signal {number}")));
        }
        if self.state().process(&container, &exec)?.exit.borrow().is_some() {
            return Err(CallError::finished());
        }
        let key = Key { container, exec };
        let answer = self.link.ask(|id| Request::Signal { id, key, signal: number }, Vec::new()).await;
        match answer.result {
            Err(Failure::Failed(text)) => Err(CallError::Failed(text)),
            result => result.map(drop).map_err(Into::into),
        }
    }

    /// Waits until a process has ended: its pid and how.
    pub async fn wait(self: Arc<Self>, container: String, exec: String) -> Result<(i32, Exit)> {
        let mut exit = self.state().process(&container, &exec)?.exit.subscribe();
        let gone = || CallError::no_process(&container, &exec);
        // The sender goes away when the process is deleted, which comes after its end.
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit).ok_or_else(gone)?;
        let pid = self.state().process(&container, &exec).map(|p| p.pid).unwrap_or_default();
        Ok((pid, exit))
    }

    /// Forgets an exec that has ended: its pid and how.
    pub fn delete_exec(&self, container: &str, exec: &str) -> Result<(i32, Exit)> {
        let mut state = self.state();
        let process = state.process(container, exec)?;
        let pid = process.pid;
        let exit = *process.exit.borrow();
        let exit = exit.ok_or_else(|| {
            CallError::State(format!("cannot delete process {exec:?} of container {container:?}: it is running"))
        })?;
        state.remove_exec(container, exec);
        drop(state);
        self.link.tell(&Request::Forget { key: Key { container: container.into(), exec: exec.into() } });
        Ok((pid, exit))
    }

    /// Sets the size of a process's terminal; nothing where it has none.
    pub fn resize(&self, container: &str, exec: &str, columns: u32, rows: u32) -> Result<()> {
        let terminal = self.state().process(container, exec)?.terminal.clone();
        let Some(terminal) = terminal else { return Ok(()) };
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        vz_sys::tty::set_size(&*terminal, cells(columns), cells(rows)).map_err(CallError::io("resize terminal"))
    }
}
