//! What PID 1 reports: answers, exits, and after a restart what there is.

use std::{fs, os::fd::OwnedFd, sync::Arc};

use vz_sys::sync::lock;

use super::{
    Error,
    containers::{Agent, Ready},
    link::{Answer, Reports},
    prepare::outlives_init,
    state::Stage,
    stdio::Ends,
};
use crate::{
    paths,
    protocol::{Exit, Key, Process, Report, Request},
};

impl Agent {
    /// Takes over from PID 1 what there is.
    pub(super) async fn adopt(&self, reports: &mut Reports) -> Result<Ready, Error> {
        loop {
            match reports.next().await.map_err(Error::Link)?.ok_or(Error::Orphaned)? {
                (Report::Ready { incarnation, first }, _) => return Ok(Ready { incarnation, first }),
                (report, fds) => self.report(report, fds),
            }
        }
    }

    /// Handles PID 1's reports. Ends only with an error.
    pub(super) async fn pump(self: Arc<Self>, mut reports: Reports) -> Result<(), Error> {
        loop {
            let (report, fds) = reports.next().await.map_err(Error::Link)?.ok_or(Error::Orphaned)?;
            self.report(report, fds);
            let late: Vec<_> = lock(&self.abandoned).drain(..).collect();
            for id in late {
                tokio::spawn(Arc::clone(&self).remove_abandoned(id));
            }
        }
    }

    fn report(&self, report: Report, fds: Vec<OwnedFd>) {
        match report {
            Report::Process(process) => self.found(&process, fds),
            Report::Done { id, result, log } => self.link.answered(id, Answer { result, log, fds }),
            Report::Exit { key, pid, exit } => self.ended(&key, pid, exit),
            Report::Ready { .. } => {}
        }
    }

    fn ended(&self, key: &Key, pid: i32, exit: Exit) {
        // The reason comes first.
        self.tell_oom(&key.container);
        let mut state = self.state();
        let Ok(container) = state.container(&key.container) else {
            return self.link.tell(&Request::Forget { key: key.clone() });
        };
        if container.process(&key.exec).is_none() {
            return self.link.tell(&Request::Forget { key: key.clone() });
        }
        if key.exec.is_empty()
            && container.outlives_init
            && let Err(e) = container.cgroup.kill()
        {
            tracing::error!(container = key.container, "kill what is left of the container: {e}");
        }
        state.ended(key, pid, exit);
    }

    /// A process of before this server.
    fn found(&self, process: &Process, fds: Vec<OwnedFd>) {
        let Key { container, exec } = &process.key;
        if !exec.is_empty() && process.abandoned {
            // PID 1 has killed it; its exit is for nobody.
            if process.exit.is_some() {
                self.link.tell(&Request::Forget { key: process.key.clone() });
            }
            return;
        }
        if exec.is_empty() {
            let stage = if process.started { Stage::Started } else { Stage::Created };
            let spec = fs::read(paths::bundle(container).join("config.json")).ok();
            let spec = spec.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            if let Err(e) = self.state().add(container, stage, spec.is_some_and(|s| outlives_init(&s))) {
                return tracing::error!(container, "found container: {e}");
            }
            if process.abandoned {
                lock(&self.abandoned).push(container.clone());
            } else {
                self.watch(container);
            }
        } else if let Err(e) = self.state().container(container).and_then(|c| c.add_exec(container, exec)) {
            return tracing::error!(container, exec, "found process: {e}");
        }
        let mut fds = fds.into_iter();
        let ends: Vec<_> = process
            .stdio
            .streams
            .iter()
            .filter_map(|stream| Some((*stream, Ends { host: fds.next()?, process: fds.next()? })))
            .collect();
        self.attach(&process.key, process.pid, process.stdio.terminal, ends);
        if let Some(exit) = process.exit {
            self.state().ended(&process.key, process.pid, exit);
        }
    }

    /// Undoes what a server that died has left half done.
    pub(super) async fn resume(self: &Arc<Self>) {
        for (id, container) in self.state().containers() {
            if let Err(e) = container.cgroup.thaw() {
                tracing::warn!(container = id, "thaw: {e}");
            }
        }
        let abandoned: Vec<_> = lock(&self.abandoned).drain(..).collect();
        for id in abandoned {
            tokio::spawn(Arc::clone(self).remove_abandoned(id));
        }
    }

    async fn remove_abandoned(self: Arc<Self>, id: String) {
        if let Ok(container) = self.state().container(&id) {
            container.stage = Stage::Deleting;
        }
        if let Err(e) = self.remove(&id).await {
            tracing::error!(container = id, "remove what nobody waits for: {e}");
        }
    }
}
