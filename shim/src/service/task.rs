//! containerd's Task service (runtime v2).
//!
//! A request that changes something runs in a task of its own: a client that goes away or times out drops its handler,
//! and must not stop work half-way.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::well_known_types::any::Any,
    shim_async::Task,
};
use ttrpc::asynchronous::TtrpcContext;
use vz_sys::error::chain;

use super::Error;
use crate::{
    container::{self, Exit, State, stdio::Stdio},
    report::Report,
    sandbox::served::Served,
};

type Reply<T> = ttrpc::Result<T>;

/// The Task service of a sandbox.
#[derive(Debug, Clone)]
pub struct Service {
    /// The sandbox.
    pub served: Arc<Served>,
    /// Who is to know that containerd has called.
    pub report: Arc<Report>,
}

/// Runs a request to its end, whatever becomes of its caller.
pub async fn detached<T: Send + 'static>(
    what: &'static str,
    id: &str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Reply<T> {
    let id = id.to_owned();
    let done = tokio::spawn(async move {
        let result = work.await;
        match &result {
            Ok(_) => tracing::debug!(container = id, "{what}"),
            Err(error) if error.is_gone() => tracing::debug!(container = id, "{what}: not found"),
            Err(error) => tracing::warn!(container = id, error = chain(error), "{what}"),
        }
        result.map_err(|error| error.to_ttrpc())
    });
    done.await.unwrap_or_else(|e| Err(ttrpc::Error::Others(format!("{what}: {e}"))))
}

fn unsupported<T>(what: &'static str) -> Reply<T> {
    Err(Error::Unimplemented(what).to_ttrpc())
}

fn deleted(pid: u32, exit: Option<Exit>) -> DeleteResponse {
    let mut response = DeleteResponse::new();
    response.set_pid(pid);
    if let Some(exit) = exit {
        response.set_exit_status(exit.status);
        response.set_exited_at(exit.at.into());
    }
    response
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Reply<CreateTaskResponse> {
        self.report.known();
        if !request.checkpoint.is_empty() {
            return unsupported("restoring a checkpoint");
        }
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("create", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let mut response = CreateTaskResponse::new();
            response.set_pid(sandbox.create(&request).await?.pid);
            Ok(response)
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Reply<StartResponse> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("start", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (container, process) = sandbox.process(&request.id, &request.exec_id)?;
            match request.exec_id.as_str() {
                "" => container.start().await?,
                _ => container.start_exec(&process).await?,
            }
            let mut response = StartResponse::new();
            response.set_pid(container.pid);
            Ok(response)
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Reply<DeleteResponse> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("delete", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (container, process) = sandbox.process(&request.id, &request.exec_id)?;
            let exit = match request.exec_id.as_str() {
                "" => Some(sandbox.delete_container(&container).await?),
                _ => container.delete_exec(&process).await?,
            };
            Ok(deleted(container.pid, exit))
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Reply<Empty> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("exec", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let container = sandbox.container(&request.id)?;
            let process = serde_json::from_slice(&request.spec().value)
                .map_err(|e| container::Error::Invalid(format!("exec {}: process spec: {e}", request.exec_id)))?;
            let stdio = Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            container.exec(&request.exec_id, stdio, process).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Reply<StateResponse> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("state", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (container, process) = sandbox.process(&request.id, &request.exec_id)?;
            let mut response = StateResponse::new();
            response.set_id(container.id.clone());
            response.set_exec_id(request.exec_id);
            response.set_bundle(container.bundle.to_string_lossy().into_owned());
            response.set_pid(container.pid);
            response.set_stdin(process.stdio.stdin.clone());
            response.set_stdout(process.stdio.stdout.clone());
            response.set_stderr(process.stdio.stderr.clone());
            response.set_terminal(process.stdio.terminal);
            match process.state() {
                State::Created => response.set_status(Status::CREATED),
                State::Running => response.set_status(Status::RUNNING),
                State::Stopped(exit) => {
                    response.set_status(Status::STOPPED);
                    response.set_exit_status(exit.status);
                    response.set_exited_at(exit.at.into());
                }
            }
            Ok(response)
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Reply<WaitResponse> {
        // Not detached: it changes nothing, and a client that goes away needs no answer.
        let sandbox = self.served.of_container(&request.id);
        let found = sandbox.and_then(|sandbox| sandbox.process(&request.id, &request.exec_id));
        let (_, process) = found.map_err(|error| Error::from(error).to_ttrpc())?;
        let exit = process.wait().await;
        let mut response = WaitResponse::new();
        response.set_exit_status(exit.status);
        response.set_exited_at(exit.at.into());
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Reply<Empty> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("kill", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (container, process) = sandbox.process(&request.id, &request.exec_id)?;
            container.signal(&process, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Reply<Empty> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("resize pty", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (container, process) = sandbox.process(&request.id, &request.exec_id)?;
            container.resize(&process, request.width, request.height).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Reply<Empty> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("close io", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let (_, process) = sandbox.process(&request.id, &request.exec_id)?;
            if request.stdin {
                process.close_stdin();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Reply<PidsResponse> {
        let (served, id) = (self.served.clone(), request.id.clone());
        // The guest's pids mean nothing on the host: the one pid that does is the anchor's.
        detached("pids", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let mut info = ProcessInfo::new();
            info.set_pid(sandbox.container(&request.id)?.pid);
            let mut response = PidsResponse::new();
            response.processes.push(info);
            Ok(response)
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Reply<StatsResponse> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("stats", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let mut any = Any::new();
            any.type_url = "io.containerd.cgroups.v2.Metrics".into();
            any.value = sandbox.container(&request.id)?.stats().await?;
            let mut response = StatsResponse::new();
            response.set_stats(any);
            Ok(response)
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Reply<ConnectResponse> {
        self.report.known();
        let mut response = ConnectResponse::new();
        response.set_shim_pid(std::process::id());
        // Answered for an unknown id too: a daemon that has restarted asks this first.
        let container = self.served.of_container(&request.id).and_then(|sandbox| sandbox.container(&request.id));
        response.set_task_pid(container.map_or(0, |container| container.pid));
        response.set_version(env!("CARGO_PKG_VERSION").into());
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Reply<Empty> {
        // A pod's sandbox ends by the Sandbox API, and may not be there yet.
        if self.served.get().is_some_and(|sandbox| request.now || sandbox.is_empty()) {
            self.served.shutdown.notify_one();
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Reply<Empty> {
        unsupported("pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Reply<Empty> {
        unsupported("resume")
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Reply<Empty> {
        let (served, id) = (self.served.clone(), request.id.clone());
        detached("update", &id, async move {
            let sandbox = served.of_container(&request.id)?;
            let container = sandbox.container(&request.id)?;
            let resources = serde_json::from_slice(&request.resources().value)
                .map_err(|e| container::Error::Invalid(format!("update {}: resources: {e}", request.id)))?;
            container.update(resources).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Reply<Empty> {
        unsupported("checkpoint")
    }
}
