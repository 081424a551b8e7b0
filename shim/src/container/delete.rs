//! Takes a container away: in the guest, then on the host.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskDelete;
use vz_sys::error::chain;

use super::{Container, Exit, create};
use crate::{guest, host::hooks};

impl Container {
    /// Forgets an ended process in the guest, if there is a guest still. For a container the guest has as long as for a
    /// SIGKILL, since its client waits; one that has disks writes them back then, and may take as long as for any
    /// request.
    pub async fn forget(&self, exec_id: &str) {
        let deadlines = &self.lent.guest.deadlines;
        let is_waited_for = exec_id.is_empty() && self.disks.is_empty();
        let deadline = if is_waited_for { deadlines.kill } else { deadlines.request };
        match self.lent.guest.agent.delete_process(deadline, &self.id, exec_id).await {
            Ok(()) | Err(guest::Error::Ended(_)) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                tracing::warn!(container = self.id, exec = exec_id, error = chain(&error), "forget process");
            }
        }
    }

    /// Takes away what it has in the guest, its streams and its anchor.
    pub async fn leave_guest(&self) {
        self.forget("").await;
        let closing: Vec<_> =
            self.processes().into_iter().map(|process| tokio::spawn(async move { process.close().await })).collect();
        for closed in closing {
            drop(closed.await);
        }
        self.end_anchor().await;
    }

    /// Takes away its mounts, and runs its poststop hooks.
    pub async fn leave_host(&self) {
        let host = &self.lent.host;
        if let Err(error) = create::remove_files(Arc::clone(host), self.id.clone()).await {
            // They end with the last process of the sandbox in any case.
            tracing::error!(container = self.id, error = chain(&error), "take away mounts");
        }
        self.finish_hooks().await;
    }

    /// Publishes that it is gone, with how its init ended.
    pub fn publish_delete(&self, exit: Exit) {
        let mut event = TaskDelete::new();
        event.set_container_id(self.id.clone());
        event.set_pid(self.pid);
        event.set_exit_status(exit.status);
        event.set_exited_at(exit.at.into());
        self.lent.publisher.publish("/tasks/delete", Box::new(event));
    }

    /// Runs its poststop hooks, which are in the journal until then.
    pub async fn finish_hooks(&self) {
        let Some(resource) = self.poststop.clone() else { return };
        let host = &self.lent.host;
        hooks::poststop(&self.id, &self.bundle, Some(&host.journal), &host.hooks).await;
        if let Err(error) = host.journal.gone(resource) {
            tracing::error!(container = self.id, error = chain(&error), "write journal");
        }
    }
}
