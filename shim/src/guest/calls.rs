//! What the agent is asked: one method for each request, with the deadline that belongs to it.

use std::time::Duration;

use nix::sys::signal::Signal;
use vz_proto::{
    AgentClient, ContainerRequest, CreateContainerRequest, ExecProcessRequest, ProcessRequest, ResizePtyRequest,
    SignalProcessRequest, UpdateContainerRequest, UpdateNetworkRequest,
};

use super::{agent::Agent, error::Error, metrics};

impl Agent {
    /// Makes a container.
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<(), Error> {
        let call = async |agent: AgentClient, context, request| agent.create_container(context, &request).await;
        self.ask("create", request, call).await.map(drop)
    }

    /// Starts a created container's init.
    pub async fn start_container(&self, container: &str) -> Result<(), Error> {
        let call = async |agent: AgentClient, context, request| agent.start_container(context, &request).await;
        self.ask("start", of_container(container), call).await.map(drop)
    }

    /// Starts a process in a running container.
    pub async fn exec_process(&self, request: ExecProcessRequest) -> Result<(), Error> {
        let call = async |agent: AgentClient, context, request| agent.exec_process(context, &request).await;
        self.ask("exec", request, call).await.map(drop)
    }

    /// Sends a signal to a process of a container, or to all of them.
    pub async fn signal(
        &self,
        deadline: Duration,
        container: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let (container_id, exec_id) = (container.to_owned(), exec_id.to_owned());
        let request = SignalProcessRequest { container_id, exec_id, signal, all, ..Default::default() };
        let call = async |agent: AgentClient, context, request| agent.signal_process(context, &request).await;
        self.ask_within(deadline, "kill", request, call).await.map(drop)
    }

    /// Sends SIGKILL to one process.
    pub async fn kill(&self, deadline: Duration, container: &str, exec_id: &str) -> Result<(), Error> {
        self.signal(deadline, container, exec_id, Signal::SIGKILL as u32, false).await
    }

    /// Waits for a process's end.
    pub async fn wait_process(&self, deadline: Duration, container: &str, exec_id: &str) -> Result<(), Error> {
        let call = async |agent: AgentClient, context, request| agent.wait_process(context, &request).await;
        self.ask_within(deadline, "wait", of_process(container, exec_id), call).await.map(drop)
    }

    /// Forgets an ended process; with a container's init, the container.
    pub async fn delete_process(&self, deadline: Duration, container: &str, exec_id: &str) -> Result<(), Error> {
        let call = async |agent: AgentClient, context, request| agent.delete_process(context, &request).await;
        self.ask_within(deadline, "delete", of_process(container, exec_id), call).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize_pty(&self, container: &str, exec_id: &str, columns: u32, rows: u32) -> Result<(), Error> {
        let (container_id, exec_id) = (container.to_owned(), exec_id.to_owned());
        let request = ResizePtyRequest { container_id, exec_id, columns, rows, ..Default::default() };
        let call = async |agent: AgentClient, context, request| agent.resize_pty(context, &request).await;
        self.ask("resize", request, call).await.map(drop)
    }

    /// A container's metrics: a message of containerd's cgroup v2 metrics, with known fields only.
    pub async fn stats(&self, container: &str) -> Result<Vec<u8>, Error> {
        let call = async |agent: AgentClient, context, request| agent.stats(context, &request).await;
        let stats = self.ask("stats", of_container(container), call).await?;
        Ok(metrics::known(&stats.metrics)?)
    }

    /// Sets limits of a container. `resources` are OCI LinuxResources, JSON.
    pub async fn update_container(&self, container: &str, resources: Vec<u8>) -> Result<(), Error> {
        let container_id = container.to_owned();
        let request = UpdateContainerRequest { container_id, resources, ..Default::default() };
        let call = async |agent: AgentClient, context, request| agent.update_container(context, &request).await;
        self.ask("update", request, call).await.map(drop)
    }

    /// Describes the sandbox's network.
    pub async fn update_network(&self, network: Vec<u8>) -> Result<(), Error> {
        let request = UpdateNetworkRequest { network, ..Default::default() };
        let call = async |agent: AgentClient, context, request| agent.update_network(context, &request).await;
        self.ask("update network", request, call).await.map(drop)
    }
}

fn of_container(container: &str) -> ContainerRequest {
    ContainerRequest { container_id: container.into(), ..Default::default() }
}

fn of_process(container: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: container.into(), exec_id: exec_id.into(), ..Default::default() }
}
