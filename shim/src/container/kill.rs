//! Signals, and how a process is killed whose guest does not want that.
//!
//! A signal is a request to the guest, and a SIGKILL is more: it must work. The guest has `timeouts.kill_s` to report
//! the end of a container's init; after that the [`WAYS`] are taken, one after the other, until the init has ended. An
//! exec process has no way of its own, as the VM has others: the answer says that its end is not known, and it ends
//! with the init.

use std::{sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout, timeout_at};
use vz_sys::error::chain;

use super::{Container, Error, Process, State};
use crate::guest;

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

impl Container {
    /// Sends a signal to one of its processes, or to all of them. A SIGKILL returns when the end is published.
    pub async fn signal(self: &Arc<Self>, process: &Arc<Process>, number: u32, all: bool) -> Result<(), Error> {
        let of_init = all || process.exec_id.is_empty();
        match process.state() {
            State::Stopped(_) => return Err(Error::Finished),
            State::Created if !process.exec_id.is_empty() => {
                return Err(self.wrong_state(process, "must be running"));
            }
            State::Created | State::Running => {}
        }
        if number == Signal::SIGKILL as u32 {
            return if of_init { self.kill_init(all).await } else { self.kill_exec(process).await };
        }
        // The guest may not know it yet: a daemon that was started again can ask in the middle of a creation.
        drop(process.transition.lock().await);
        let guest = &self.lent.guest;
        match guest.agent.signal(guest.deadlines.request, &self.id, &process.exec_id, number, all).await {
            Err(error) if error.is_not_found() => self.finished(process).await,
            // A VM that has ended has ended its processes.
            Err(guest::Error::Ended(_)) => Err(Error::Finished),
            other => Ok(other?),
        }
    }

    /// Kills its init, by the guest or by another way. The end is published then, unless the kernel holds the VM.
    pub async fn kill_init(self: &Arc<Self>, all: bool) -> Result<(), Error> {
        let (init, guest) = (&self.init, &self.lent.guest);
        let after = guest.deadlines.kill;
        let by = Instant::now() + after;
        for process in self.processes() {
            process.hurry(by + AFTER_KILL);
        }
        let confirmed = async {
            // A creation in progress: the guest may not know it yet.
            drop(init.transition.lock().await);
            loop {
                let left = by.saturating_duration_since(Instant::now());
                match guest.agent.signal(left, &self.id, "", Signal::SIGKILL as u32, all).await {
                    // The agent was started again, or will be.
                    Err(guest::Error::Lost { .. }) => {}
                    Err(guest::Error::Ended(_)) | Ok(()) => break,
                    Err(error) if error.is_not_found() => break,
                    Err(error) => {
                        tracing::warn!(container = self.id, error = chain(&error), "kill");
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
                    container = self.id,
                    ?way,
                    "the guest did not confirm SIGKILL in {} s",
                    after.as_secs()
                );
                match way {
                    Way::Vm => guest.end().await,
                }
                if timeout(SETTLE, init.wait()).await.is_ok() {
                    return Ok(());
                }
            }
        }
        // Its output may be waited for until then, however early the guest has confirmed its end.
        let settled = timeout_at(by + AFTER_KILL + SETTLE, init.wait()).await;
        settled.map(drop).map_err(|_| Error::Unconfirmed { what: "container", id: self.id.clone(), after })
    }

    async fn kill_exec(&self, process: &Process) -> Result<(), Error> {
        let guest = &self.lent.guest;
        let after = guest.deadlines.kill;
        let by = Instant::now() + after;
        process.hurry(by + AFTER_KILL);
        match guest.agent.kill(after, &self.id, &process.exec_id).await {
            Err(error) if error.is_not_found() => return self.finished(process).await,
            Err(guest::Error::Ended(_)) => return Err(Error::Finished),
            other => other?,
        }
        let unconfirmed = |_| Error::Unconfirmed { what: "exec", id: process.exec_id.clone(), after };
        timeout_at(by, process.said.ended()).await.map_err(unconfirmed)?;
        timeout_at(by + AFTER_KILL + SETTLE, process.wait()).await.map(drop).map_err(unconfirmed)
    }

    /// The guest says that a process has ended. That counts once it has reported the end, which every client can see
    /// then.
    async fn finished(&self, process: &Process) -> Result<(), Error> {
        let after = self.lent.guest.deadlines.kill;
        match timeout(after, process.said.ended()).await {
            Ok(()) => Err(Error::Finished),
            Err(_) => Err(Error::Unreported { after }),
        }
    }
}
