//! containerd's Sandbox service (runtime v1): a pod without a pause container of containerd's.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
        SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest,
        StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox as Contract,
    types::platform::Platform,
};

use ttrpc::asynchronous::TtrpcContext;
use vz_cri::POD_SANDBOX_CONFIG;

use super::{Error, task::detached};
use crate::{
    report::Report,
    sandbox::{pod::Pod, served::Served},
    spec,
};

type Reply<T> = ttrpc::Result<T>;

/// The Sandbox service.
#[derive(Debug, Clone)]
pub struct Service {
    /// The sandbox.
    pub served: Arc<Served>,
    /// Who is to know that containerd has called.
    pub report: Arc<Report>,
}

impl Service {
    fn of(&self, id: &str) -> Reply<Arc<Served>> {
        self.served.check(id).map_err(|error| Error::from(error).to_ttrpc())?;
        Ok(self.served.clone())
    }
}

/// Architectures in Go's words, which containerd's are.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[async_trait]
impl Contract for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Reply<CreateSandboxResponse> {
        self.report.known();
        let served = self.of(&request.sandbox_id)?;
        detached("create sandbox", &request.sandbox_id.clone(), async move {
            let options = request.options.into_option().unwrap_or_default();
            if options.type_url.trim_start_matches("type.googleapis.com/") != POD_SANDBOX_CONFIG {
                return Err(Error::Spec(spec::unsupported(
                    format!("options of type {:?}", options.type_url),
                    "a sandbox is made of a pod's configuration",
                )));
            }
            let pod = Pod::parse(&options.value, &request.netns_path, request.annotations);
            served.create(&pod.map_err(crate::sandbox::served::Error::from)?)?;
            Ok(CreateSandboxResponse::new())
        })
        .await
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Reply<StartSandboxResponse> {
        let served = self.of(&request.sandbox_id)?;
        detached("start sandbox", &request.sandbox_id, async move {
            let life = served.start().await?;
            let mut response = StartSandboxResponse::new();
            response.pid = life.pid;
            response.created_at = MessageField::some(life.created.into());
            Ok(response)
        })
        .await
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> Reply<PlatformResponse> {
        self.of(&request.sandbox_id)?;
        let mut platform = Platform::new();
        platform.os = "linux".into();
        platform.architecture = architecture().into();
        let mut response = PlatformResponse::new();
        response.platform = MessageField::some(platform);
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Reply<StopSandboxResponse> {
        let served = self.of(&request.sandbox_id)?;
        detached("stop sandbox", &request.sandbox_id, async move {
            served.stop().await?;
            Ok(StopSandboxResponse::new())
        })
        .await
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Reply<WaitSandboxResponse> {
        // Not detached: it changes nothing, and a client that goes away needs no answer.
        let exit = self.of(&request.sandbox_id)?.wait().await.map_err(|error| Error::from(error).to_ttrpc())?;
        let mut response = WaitSandboxResponse::new();
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(exit.at.into());
        Ok(response)
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Reply<SandboxStatusResponse> {
        let life = self.of(&request.sandbox_id)?.life();
        let ready = life.is_some_and(|life| life.exit.is_none());
        let mut response = SandboxStatusResponse::new();
        response.sandbox_id = request.sandbox_id;
        response.state = if ready { "SANDBOX_READY" } else { "SANDBOX_NOTREADY" }.into();
        if let Some(life) = life {
            response.pid = life.pid;
            response.created_at = MessageField::some(life.created.into());
            response.exited_at = life.exit.map(|exit| exit.at.into()).into();
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Reply<PingResponse> {
        self.of(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Reply<ShutdownSandboxResponse> {
        let served = self.of(&request.sandbox_id)?;
        detached("shut down sandbox", &request.sandbox_id, async move {
            served.stop().await?;
            served.shutdown.notify_one();
            Ok(ShutdownSandboxResponse::new())
        })
        .await
    }

    async fn sandbox_metrics(&self, _: &TtrpcContext, request: SandboxMetricsRequest) -> Reply<SandboxMetricsResponse> {
        let served = self.of(&request.sandbox_id)?;
        let metrics = served.get().map(|sandbox| sandbox.metrics()).unwrap_or_default();
        let value = metrics.write_to_bytes().map_err(|e| ttrpc::Error::Others(format!("write metrics: {e}")))?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(std::time::SystemTime::now().into());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(Any {
            type_url: "io.containerd.cgroups.v2.Metrics".into(),
            value,
            ..Default::default()
        });
        Ok(response)
    }
}
