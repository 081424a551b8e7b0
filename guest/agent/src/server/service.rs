//! The ttrpc service: translation only.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use protobuf::{Message, well_known_types::empty::Empty};
use ttrpc::{Result, r#async::ServerStreamSender, asynchronous::TtrpcContext};
use vz_proto::{
    Agent as Contract, ContainerRequest, CreateContainerRequest, CreateContainerResponse, Event, ExecProcessRequest,
    ExecProcessResponse, ProcessRequest, ResizePtyRequest, SignalProcessRequest, StatsResponse, UpdateContainerRequest,
    UpdateNetworkRequest, WaitProcessResponse,
};

use super::{containers::Agent, error::CallError, metrics, resources};
use crate::protocol::{Exit, Key};

/// See the contract in the protocol.
#[derive(Debug)]
pub struct Service(Arc<Agent>);

impl Service {
    /// Serves the agent.
    pub fn new(agent: Arc<Agent>) -> Self {
        Self(agent)
    }

    fn agent(&self) -> Arc<Agent> {
        Arc::clone(&self.0)
    }

    /// Holds back a process's exit until the answer to the call that makes it.
    fn hold(&self, container: &str, exec: &str) -> Held {
        let key = Key { container: container.into(), exec: exec.into() };
        self.0.state().exits.hold(key.clone());
        Held(self.agent(), key)
    }
}

/// Releases the exit when the call's future ends: what it returned is queued before any other task runs.
struct Held(Arc<Agent>, Key);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.state().exits.release(&self.1);
    }
}

/// Runs a call in a task of its own: ttrpc drops a call's future when the caller has lost patience, and half of a
/// create is worse than one that nobody waits for.
async fn whole<T, F>(call: F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = super::error::Result<T>> + Send + 'static,
{
    let result = tokio::spawn(call).await;
    Ok(result.unwrap_or_else(|e| Err(CallError::Failed(format!("call has failed: {e}"))))?)
}

fn waited((pid, exit): (i32, Exit)) -> WaitProcessResponse {
    WaitProcessResponse { pid: pid.unsigned_abs(), status: exit.status, exited_at_ns: exit.at_ns, ..Default::default() }
}

#[async_trait]
impl Contract for Service {
    async fn create_container(&self, _: &TtrpcContext, r: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let _held = self.hold(&r.container_id, "");
        let pid = whole(self.agent().create(r)).await?;
        Ok(CreateContainerResponse { pid: pid.unsigned_abs(), ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, r: ContainerRequest) -> Result<Empty> {
        whole(self.agent().start(r.container_id)).await?;
        Ok(Empty::new())
    }

    async fn update_network(&self, _: &TtrpcContext, r: UpdateNetworkRequest) -> Result<Empty> {
        whole(self.agent().update_network(r.network)).await?;
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Result<ExecProcessResponse> {
        let _held = self.hold(&r.container_id, &r.exec_id);
        let pid = whole(self.agent().exec(r)).await?;
        Ok(ExecProcessResponse { pid: pid.unsigned_abs(), ..Default::default() })
    }

    async fn signal_process(&self, _: &TtrpcContext, r: SignalProcessRequest) -> Result<Empty> {
        whole(self.agent().signal(r)).await?;
        Ok(Empty::new())
    }

    async fn wait_process(&self, _: &TtrpcContext, r: ProcessRequest) -> Result<WaitProcessResponse> {
        Ok(waited(self.agent().wait(r.container_id, r.exec_id).await?))
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> Result<Empty> {
        self.0.resize(&r.container_id, &r.exec_id, r.columns, r.rows)?;
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, r: ProcessRequest) -> Result<WaitProcessResponse> {
        if r.exec_id.is_empty() {
            return Ok(waited(whole(self.agent().delete(r.container_id)).await?));
        }
        Ok(waited(self.0.delete_exec(&r.container_id, &r.exec_id)?))
    }

    async fn stats(&self, _: &TtrpcContext, r: ContainerRequest) -> Result<StatsResponse> {
        let cgroup = self.0.state().container(&r.container_id)?.cgroup.clone();
        let metrics = metrics::read(&cgroup).write_to_bytes();
        let metrics = metrics.map_err(|e| CallError::Failed(format!("write metrics: {e}")))?;
        Ok(StatsResponse { metrics, ..Default::default() })
    }

    async fn update_container(&self, _: &TtrpcContext, r: UpdateContainerRequest) -> Result<Empty> {
        let cgroup = self.0.state().container(&r.container_id)?.cgroup.clone();
        let resources = resources::parse(&r.resources)?;
        cgroup.apply(&resources).map_err(|e| CallError::Failed(format!("set limits: {e}")))?;
        Ok(Empty::new())
    }

    async fn events(&self, _: &TtrpcContext, _: Empty, to: ServerStreamSender<Event>) -> Result<()> {
        let mut events = self.0.state().exits.listen();
        while let Some(event) = events.recv().await {
            to.send(&event).await?;
        }
        Ok(())
    }
}
