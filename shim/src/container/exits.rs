//! The end of a process: its output is passed on, then the end is published, in the order that clients rely on.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::events::task::TaskExit;
use vz_sys::fork::KILLED;

use super::{Container, Exit, Process, State, said::Verdict};

/// How long the guest may take to report the ends of a container's exec processes after its init's.
const REAP_DEADLINE: Duration = Duration::from_secs(2);

/// What becomes of the guest's report that a container lacks memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// It is published, or an earlier one is.
    Told,
    /// The container does not run: the report is a lie, or late.
    NotRunning,
}

impl Container {
    /// A process has ended, says the guest, or the host that has ended the guest. The first end counts.
    pub fn exited(self: &Arc<Self>, process: Arc<Process>, exit: Exit) -> Verdict {
        let verdict = process.said.exit(exit);
        if verdict == Verdict::Taken {
            if process.exec_id.is_empty() {
                tokio::spawn(self.clone().init_exited(exit));
            } else {
                tokio::spawn(self.clone().drained(process, exit));
            }
        }
        verdict
    }

    /// The VM has ended, and with it every process that the guest was asked for and whose end is not known.
    pub fn all_killed(self: &Arc<Self>) {
        for process in self.processes() {
            self.exited(process, Exit::now(KILLED));
        }
    }

    /// The guest reports a lack of memory.
    pub fn lacks_memory(&self) -> Lack {
        if !self.init.said.may_lack_memory() || matches!(self.init.state(), State::Stopped(_)) {
            return Lack::NotRunning;
        }
        if self.out_of_memory.admit().is_some() && !self.lent.publisher.out_of_memory(&self.id) {
            tracing::debug!(container = self.id, "a lack of memory waits to be told already");
        }
        Lack::Told
    }

    async fn init_exited(self: Arc<Self>, exit: Exit) {
        // The output of all is waited for at once, and the init's end is the last that is told.
        let execs: Vec<_> = self.close().into_iter().map(|exec| tokio::spawn(self.clone().outlived(exec))).collect();
        self.drain(&self.init).await;
        for exec in execs {
            drop(exec.await);
        }
        self.tell(&self.init, exit).await;
    }

    /// Waits for the end of an exec process whose init has ended. One of which the guest does not speak has been
    /// killed, as far as anybody can know.
    async fn outlived(self: Arc<Self>, exec: Arc<Process>) {
        tokio::select! {
            () = exec.said.ended() => {}
            () = tokio::time::sleep(REAP_DEADLINE) => {}
            () = exec.hurried() => {}
        }
        let killed = Exit::now(KILLED);
        if exec.said.exit(killed) == Verdict::Taken {
            tracing::warn!(container = self.id, exec = exec.exec_id, "the guest does not report its end");
            self.drained(exec, killed).await;
        } else {
            exec.wait().await;
        }
    }

    async fn drained(self: Arc<Self>, process: Arc<Process>, exit: Exit) {
        self.drain(&process).await;
        self.tell(&process, exit).await;
    }

    async fn drain(&self, process: &Process) {
        if !process.drain(self.lent.drain_deadline).await {
            tracing::info!(container = self.id, exec = process.exec_id, "something still holds its output open");
        }
    }

    /// Publishes an end: after the start, which holds the transition until it is published.
    async fn tell(&self, process: &Process, exit: Exit) {
        let _transition = process.transition.lock().await;
        let told = match process.state() {
            // An exec process whose start was never published has no end to publish either.
            State::Created => process.exec_id.is_empty(),
            State::Running => true,
            State::Stopped(_) => false,
        };
        if told {
            self.publish_exit(process, exit);
            process.set_stopped(exit);
        }
    }

    fn publish_exit(&self, process: &Process, exit: Exit) {
        let mut event = TaskExit::new();
        event.set_container_id(self.id.clone());
        event.set_id(if process.exec_id.is_empty() { self.id.clone() } else { process.exec_id.clone() });
        event.set_pid(self.pid);
        event.set_exit_status(exit.status);
        event.set_exited_at(exit.at.into());
        self.lent.publisher.publish("/tasks/exit", Box::new(event));
    }
}
