//! Signals, and how a process is killed whose guest does not want that.
//!
//! A signal is a request to the guest, and a SIGKILL is more: it must work. The guest has `timeouts.kill_s` to report
//! the end of a container's init; after that the [`WAYS`] are taken, one after the other, until the init has ended. An
//! exec process has no way of its own, as the VM has others: the answer says that its end is not known, and it ends
//! with the init.

use std::{sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout, timeout_at};
use ttrpc::Code;
use vz_proto::{AgentClient, SignalProcessRequest};

use crate::{
    container::{Container, Process, State},
    error::{Error, chain},
    sandbox::Sandbox,
};

/// How long the output of a killed process is waited for after the guest had its time.
const AFTER_KILL: Duration = Duration::from_secs(1);
/// How long it may take after that until the end is published.
const SETTLE: Duration = Duration::from_secs(4);

/// What ends a container without its guest's help.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// The VM's process is killed: it ends all containers of the VM.
    Vm,
}

/// The ways in their order. One that ends a single container of several in the VM belongs before [`Way::Vm`].
const WAYS: [Way; 1] = [Way::Vm];

/// Sends a signal to a process of a container, or to all of them. A SIGKILL returns when the end is published.
pub async fn signal(
    sandbox: &Arc<Sandbox>,
    container: &Arc<Container>,
    process: &Arc<Process>,
    number: u32,
    all: bool,
) -> Result<(), Error> {
    let of_init = all || process.exec_id.is_empty();
    match process.state() {
        State::Stopped(_) => return Err(Error::Finished),
        State::Created if !process.exec_id.is_empty() => {
            let id = process.exec_id.clone();
            return Err(Error::State { what: "exec", id, state: "created", wanted: "must be running" });
        }
        State::Created | State::Running => {}
    }
    if number == Signal::SIGKILL as u32 {
        return if of_init {
            kill_init(sandbox, container, all).await
        } else {
            kill_exec(sandbox, container, process).await
        };
    }
    // The guest may not know it yet: a daemon that was started again can ask in the middle of a creation.
    drop(process.transition.lock().await);
    let deadline = Duration::from_secs(sandbox.config.timeouts.agent_s);
    match ask(sandbox, deadline, request(container, process, number, all)).await {
        Err(Error::Agent { code: Code::NOT_FOUND, .. }) => finished(sandbox, process).await,
        // A VM that has ended has ended its processes.
        Err(Error::Sandbox(_)) => Err(Error::Finished),
        other => other,
    }
}

/// Kills a container's init, by the guest or by another way. Its end is published then, unless the kernel holds the VM.
pub async fn kill_init(sandbox: &Arc<Sandbox>, container: &Arc<Container>, all: bool) -> Result<(), Error> {
    let init = &container.init;
    let after = sandbox.kill_deadline();
    let by = Instant::now() + after;
    for process in container.processes() {
        process.hurry(by + AFTER_KILL);
    }
    let confirmed = async {
        // A creation in progress: the guest may not know it yet.
        drop(init.transition.lock().await);
        loop {
            let left = by.saturating_duration_since(Instant::now());
            let signal = request(container, init, Signal::SIGKILL as u32, all);
            match ask(sandbox, left, signal).await {
                // The agent was started again, or will be.
                Err(Error::AgentLost { .. }) => {}
                Err(Error::Agent { code: Code::NOT_FOUND, .. } | Error::Sandbox(_)) | Ok(()) => break,
                Err(error) => {
                    tracing::warn!(container = container.id, error = chain(&error), "kill");
                    break;
                }
            }
        }
        init.said.ended().await;
    };
    let ended = async {
        tokio::select! {
            () = confirmed => {}
            // A creation that failed.
            _ = init.wait() => {}
        }
    };
    if timeout_at(by, ended).await.is_err() {
        for way in WAYS {
            tracing::error!(
                container = container.id,
                ?way,
                "the guest did not confirm SIGKILL in {} s",
                after.as_secs()
            );
            match way {
                Way::Vm => sandbox.end_vm().await,
            }
            if timeout(SETTLE, init.wait()).await.is_ok() {
                return Ok(());
            }
        }
    }
    // Its output may be waited for until then, however early the guest has confirmed its end.
    let settled = timeout_at(by + AFTER_KILL + SETTLE, init.wait()).await;
    settled.map(drop).map_err(|_| Error::Unconfirmed { what: "container", id: container.id.clone(), after })
}

async fn kill_exec(sandbox: &Sandbox, container: &Container, process: &Process) -> Result<(), Error> {
    let after = sandbox.kill_deadline();
    let by = Instant::now() + after;
    process.hurry(by + AFTER_KILL);
    match ask(sandbox, after, request(container, process, Signal::SIGKILL as u32, false)).await {
        Err(Error::Agent { code: Code::NOT_FOUND, .. }) => return finished(sandbox, process).await,
        Err(Error::Sandbox(_)) => return Err(Error::Finished),
        other => other?,
    }
    let unconfirmed = |_| Error::Unconfirmed { what: "exec", id: process.exec_id.clone(), after };
    timeout_at(by, process.said.ended()).await.map_err(unconfirmed)?;
    timeout_at(by + AFTER_KILL + SETTLE, process.wait()).await.map(drop).map_err(unconfirmed)
}

/// The guest says that a process has ended. That counts once it has reported the end, which every client can see then.
async fn finished(sandbox: &Sandbox, process: &Process) -> Result<(), Error> {
    let after = sandbox.kill_deadline();
    match timeout(after, process.said.ended()).await {
        Ok(()) => Err(Error::Finished),
        Err(_) => Err(Error::Unreported { after }),
    }
}

fn request(container: &Container, process: &Process, signal: u32, all: bool) -> SignalProcessRequest {
    SignalProcessRequest {
        container_id: container.id.clone(),
        exec_id: process.exec_id.clone(),
        signal,
        all,
        ..Default::default()
    }
}

async fn ask(sandbox: &Sandbox, deadline: Duration, request: SignalProcessRequest) -> Result<(), Error> {
    let call = async |agent: AgentClient, context, request| agent.signal_process(context, &request).await;
    sandbox.agent.ask_within(deadline, "kill", request, call).await.map(drop)
}
