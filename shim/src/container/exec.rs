//! Exec processes of a container: added, started, removed.

use std::{sync::Arc, time::Instant};

use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use oci_spec::runtime::Process as ProcessSpec;
use vz_proto::ExecProcessRequest;
use vz_sys::error::chain;

use super::{
    Container, Error, Exit, Process, State, plan,
    start::connect_streams,
    stdio::{self, Stdio},
};
use crate::{guest, spec};

/// Exit status for whoever waits for the end of an exec process that was deleted before it ran.
const NEVER_RAN: u32 = 255;

impl Container {
    /// Adds an exec process to a running container, and publishes that.
    pub async fn exec(&self, exec_id: &str, stdio: Stdio, process: ProcessSpec) -> Result<(), Error> {
        if self.init.state() != State::Running {
            return Err(self.wrong_state(&self.init, "must be running"));
        }
        self.forgotten(exec_id).await;
        let process = Process::new(exec_id, stdio, Some(process));
        let mut event = TaskExecAdded::new();
        event.set_container_id(self.id.clone());
        event.set_exec_id(exec_id.to_owned());
        self.add_exec(process, || self.lent.publisher.publish("/tasks/exec-added", Box::new(event)))
    }

    /// Starts an exec process, and publishes that.
    pub async fn start_exec(self: &Arc<Self>, process: &Arc<Process>) -> Result<(), Error> {
        let _transition = process.transition.lock().await;
        if !self.has(process) {
            return Err(Error::NotFound { what: "exec", id: process.exec_id.clone() });
        }
        if process.state() != State::Created {
            return Err(self.wrong_state(process, "must be created"));
        }
        if self.init.state() != State::Running {
            return Err(self.wrong_state(&self.init, "must be running"));
        }
        self.start_in_guest(process).await?;
        let mut event = TaskExecStarted::new();
        event.set_container_id(self.id.clone());
        event.set_exec_id(process.exec_id.clone());
        event.set_pid(self.pid);
        let started = self.run_exec(process, || self.lent.publisher.publish("/tasks/exec-started", Box::new(event)));
        if started.is_err() {
            // The container ended meanwhile, and the process with it.
            process.close().await;
        }
        started
    }

    /// After a failure nothing of the process is left in the guest, or will be soon, and its streams are closed.
    async fn start_in_guest(self: &Arc<Self>, process: &Process) -> Result<(), Error> {
        let guest = &self.lent.guest;
        let mut wanted = process.spec.clone().ok_or_else(|| Error::Invalid("exec has no process".into()))?;
        wanted.set_terminal(Some(process.stdio.terminal));
        let wanted = spec::write("process", &plan::exec_process(wanted))?;
        let surroundings = self.lent.host.hooks.surroundings.as_deref();
        let ends = stdio::open(&process.stdio, &self.id, &self.lent.namespace, surroundings).await?;
        let (ends, (tokens, streams)) = ends.with(connect_streams(guest, &process.stdio)).await?;
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: process.exec_id.clone(),
            process: wanted,
            stdio: Some(tokens).into(),
            ..Default::default()
        };
        process.set_copies(ends.connect(streams, process.stdio.terminal));
        process.said.ask();
        let started = guest.agent.exec_process(request).await;
        if let Err(error) = &started {
            process.said.withdraw();
            if error.is_open() {
                let (of, id) = (self.clone(), process.exec_id.clone());
                self.forget_exec(&process.exec_id, async move { of.purge(&id).await });
            }
            process.close().await;
        }
        Ok(started?)
    }

    /// Removes an exec process that the guest may have begun, and did not say so. What the guest does not do ends with
    /// the container.
    async fn purge(&self, exec_id: &str) {
        let guest = &self.lent.guest;
        let (begun, kill) = (Instant::now(), guest.deadlines.kill);
        let ended = loop {
            match guest.agent.kill(kill, &self.id, exec_id).await {
                // It has ended, or does not run yet.
                Err(error) if !error.is_not_found() => break Err(error),
                _ => {}
            }
            match guest.agent.wait_process(kill, &self.id, exec_id).await {
                // It was not there yet when it was killed.
                Err(guest::Error::Timeout { .. }) if begun.elapsed() < guest.deadlines.request => {}
                other => break other,
            }
        };
        match ended {
            Ok(()) => self.forget(exec_id).await,
            Err(error) if error.is_not_found() || matches!(error, guest::Error::Ended(_)) => {}
            Err(error) => tracing::warn!(
                container = self.id,
                exec = exec_id,
                error = chain(&error),
                "the guest may have started a process whose start has failed"
            ),
        }
    }

    /// Removes an exec process that has ended, or does not run yet. How it ended, if it ran.
    pub async fn delete_exec(self: &Arc<Self>, process: &Arc<Process>) -> Result<Option<Exit>, Error> {
        // A start in progress ends first, so that what it makes in the guest is known.
        let _transition = process.transition.lock().await;
        let exit = match process.state() {
            State::Stopped(exit) => Some(exit),
            State::Running => return Err(self.wrong_state(process, "must be stopped")),
            State::Created => None,
        };
        if !self.remove_exec(process) {
            return Err(Error::NotFound { what: "exec", id: process.exec_id.clone() });
        }
        if exit.is_some() {
            let (of, id) = (self.clone(), process.exec_id.clone());
            self.forget_exec(&process.exec_id, async move { of.forget(&id).await });
        } else {
            process.set_stopped(Exit::now(NEVER_RAN));
        }
        process.close().await;
        Ok(exit)
    }
}
