//! What ends: workers, and processes of containers.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use super::{Error, Init, Worker};
use crate::{
    clock,
    container::Outcome,
    protocol::{Failure, Report},
};

impl Init {
    /// Takes the results of all workers that have one.
    pub(super) fn results(&mut self) {
        let mut index = 0;
        while let Some(worker) = self.workers.get(index) {
            let (outcome, master) = match worker.channel.recv() {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    index = index.saturating_add(1);
                    continue;
                }
                Ok(Some(message)) => {
                    let outcome = serde_json::from_slice(&message.bytes).unwrap_or_else(|e| Outcome::failed(&e));
                    (outcome, message.fds.into_iter().next())
                }
                Ok(None) => (Outcome::failed(&"the process that creates containers died"), None),
                Err(e) => (Outcome::failed(&e), None),
            };
            let worker = self.workers.swap_remove(index);
            self.result(&worker, outcome, master);
        }
    }

    fn result(&mut self, worker: &Worker, outcome: Outcome, master: Option<OwnedFd>) {
        let Outcome { result, log } = outcome;
        let asked_by_this_server = worker.incarnation == self.incarnation;
        let mut ends = Vec::new();
        if let Some(entry) = self.table.get_mut(&worker.key) {
            match &result {
                Ok(_) if worker.starts => entry.started = true,
                Ok(pid) => {
                    entry.pid = Some(*pid);
                    if let (Some(master), Some(kept)) = (master, entry.kept.first_mut()) {
                        kept.process = master;
                    }
                    ends = entry.kept.iter().filter_map(|k| k.process.as_fd().try_clone_to_owned().ok()).collect();
                }
                Err(_) => {}
            }
        }
        let made = !worker.starts;
        if asked_by_this_server {
            if made && result.is_err() {
                self.table.forget(&worker.key);
            }
            let result = result.map_err(Failure::Failed);
            return self.tell(&Report::Done { id: worker.id, result, log }, ends);
        }
        // The server that asked is dead, and the host was told that it failed.
        if made {
            self.abandon(worker);
        }
    }

    /// Has a process removed whose creation nobody waits for any more.
    fn abandon(&mut self, worker: &Worker) {
        let Some(entry) = self.table.get_mut(&worker.key) else { return };
        entry.abandoned = true;
        entry.kept.clear();
        if entry.pid.is_none() {
            if !worker.key.exec.is_empty() {
                return self.table.forget(&worker.key);
            }
            entry.pid = Some(0);
        }
        let report = entry.report(&worker.key);
        if let Some(pid) = self.table.living(&worker.key).filter(|pid| *pid > 0)
            && let Err(e) = vz_sys::fork::kill(nix::unistd::Pid::from_raw(pid), nix::libc::SIGKILL)
        {
            tracing::error!(pid, "kill abandoned process: {e}");
        }
        if let Some(report) = report {
            self.tell(&Report::Process(Box::new(report)), Vec::new());
        }
    }

    /// Reaps everything that has ended.
    pub(super) fn reap(&mut self) -> Result<(), Error> {
        while let Some(ended) = vz_sys::fork::reap().map_err(Error::Reap)? {
            self.ended(ended.pid.as_raw(), ended.status);
        }
        Ok(())
    }

    fn ended(&mut self, pid: i32, status: u32) {
        if pid == self.server.pid {
            return self.server_died(status);
        }
        let at_ns = clock::realtime_ns();
        let exit = self.table.ended(pid, status, at_ns).or_else(|| {
            // Perhaps its worker has reported since: it did so before it exited, and only then could this be reaped.
            self.results();
            self.table.ended(pid, status, at_ns)
        });
        if let Some((key, exit)) = exit {
            self.tell(&Report::Exit { key, pid, exit }, Vec::new());
        }
    }
}
