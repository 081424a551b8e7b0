//! Starts a container's init, and connects the streams of its processes.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskStart;
use oci_spec::runtime::ContainerState;
use vz_proto::Stdio as AgentStdio;
use vz_sys::error::chain;

use super::{
    Container, Error, State,
    stdio::{GuestEnds, Stdio},
};
use crate::{
    guest::{self, Guest, follow},
    host::hooks,
};

impl Container {
    /// Starts its init, in the network that it has by now, and publishes that.
    pub async fn start(self: &Arc<Self>) -> Result<(), Error> {
        let transition = self.init.transition.lock().await;
        if self.init.state() != State::Created {
            return Err(self.wrong_state(&self.init, "must be created"));
        }
        let (host, guest) = (&self.lent.host, &self.lent.guest);
        follow::update(host, guest).await?;
        if let Some(cgroup) = &host.cgroup {
            cgroup.limit_cpu()?;
        }
        guest.agent.start_container(&self.id).await?;
        self.init.set_running();
        let mut event = TaskStart::new();
        event.set_container_id(self.id.clone());
        event.set_pid(self.pid);
        self.lent.publisher.publish("/tasks/start", Box::new(event));
        tracing::info!(container = self.id, at_ms = self.lent.elapsed_ms(), "container is started");
        // A hook that hangs does not keep the container's end from being published.
        drop(transition);
        self.poststart().await;
        Ok(())
    }

    /// Runs its poststart hooks; a failure is logged, as the runtime spec says.
    async fn poststart(&self) {
        let hooks = self.hooks.poststart().as_ref();
        let journal = &self.lent.host.journal;
        if let Err(error) = hooks::run("poststart", hooks, &self.context, ContainerState::Running, journal).await {
            tracing::warn!(container = self.id, error = chain(&error), "poststart hook");
        }
    }
}

/// Connects a stream to the guest for each that is wanted, under a token of its own; all at once, as each takes a way
/// to the guest and back.
pub async fn connect_streams(guest: &Guest, stdio: &Stdio) -> Result<(AgentStdio, GuestEnds), guest::Error> {
    let connect = async |wanted: bool| match wanted {
        true => guest.open_stream().await.map(|(token, stream)| (token, Some(stream))),
        false => Ok(Default::default()),
    };
    let (stdin, stdout, stderr) = stdio.wanted();
    let (stdin, stdout, stderr) = tokio::try_join!(connect(stdin), connect(stdout), connect(stderr))?;
    let agent = AgentStdio {
        stdin: stdin.0,
        stdout: stdout.0,
        stderr: stderr.0,
        terminal: stdio.terminal,
        ..Default::default()
    };
    Ok((agent, GuestEnds { stdin: stdin.1, stdout: stdout.1, stderr: stderr.1 }))
}
