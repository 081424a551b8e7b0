//! containerd's Task service (runtime v2), translated: requests in, the sandbox's containers and agent asked, replies
//! out.
//!
//! Every request runs in a task of its own: a client that goes away or times out drops its handler, and must not stop
//! work half-way.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskIO, TaskStart},
    protobuf::well_known_types::any::Any,
    shim_async::Task,
};
use ttrpc::asynchronous::TtrpcContext;
use vz_proto::{AgentClient, ContainerRequest, ProcessRequest, ResizePtyRequest as AgentResize};

use crate::{
    container::{Container, Exit, Process, State, create, kill, stdio::Stdio},
    daemon::Report,
    error::{Error, chain},
    guest::metrics,
    sandbox::Sandbox,
};

type Reply<T> = ttrpc::Result<T>;

/// What somebody is told who waits for the end of an exec process that was deleted before it ran.
const NEVER_RAN: u32 = 255;

/// The Task service of a sandbox, and who is to know that containerd has called it.
#[derive(Debug, Clone)]
pub struct Service(pub Arc<Sandbox>, pub Arc<Report>);

/// Runs a request to its end, whatever becomes of its caller.
async fn detached<T: Send + 'static>(
    what: &'static str,
    id: &str,
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Reply<T> {
    let id = id.to_owned();
    let done = tokio::spawn(async move {
        let result = work.await;
        match &result {
            Ok(_) => tracing::debug!(container = id, "{what}"),
            // Clients ask after what is gone as a matter of course.
            Err(Error::NotFound { .. } | Error::Finished) => tracing::debug!(container = id, "{what}: not found"),
            Err(error) => tracing::warn!(container = id, error = chain(error), "{what}"),
        }
        result.map_err(|error| error.to_ttrpc())
    });
    done.await.unwrap_or_else(|e| Err(ttrpc::Error::Others(format!("{what}: {e}"))))
}

impl Service {
    async fn start_process(self, id: String, exec_id: String) -> Result<u32, Error> {
        let container = self.0.container(&id)?;
        let process = container.process(&exec_id)?;
        let transition = process.transition.lock().await;
        if !container.has(&process) {
            return Err(Error::NotFound { what: "exec", id: exec_id });
        }
        if process.state() != State::Created {
            return Err(state_error(&container, &process, "must be created"));
        }
        if exec_id.is_empty() {
            create::start_init(&self.0, &container).await?;
            process.set_running();
            let mut event = TaskStart::new();
            event.set_container_id(id);
            event.set_pid(container.pid);
            self.0.publisher.publish("/tasks/start", Box::new(event));
            tracing::info!(container = container.id, at_ms = self.0.elapsed_ms(), "container is started");
            // A hook that hangs does not keep the container's end from being told.
            drop(transition);
            create::poststart(&self.0, &container).await;
        } else {
            if container.init.state() != State::Running {
                return Err(state_error(&container, &container.init, "must be running"));
            }
            create::start_exec(&self.0, &container, &process).await?;
            let mut event = TaskExecStarted::new();
            event.set_container_id(id);
            event.set_exec_id(exec_id);
            event.set_pid(container.pid);
            let publish = || self.0.publisher.publish("/tasks/exec-started", Box::new(event));
            if let Err(error) = container.run_exec(&process, publish) {
                // The container ended meanwhile, and the process with it.
                process.close().await;
                return Err(error);
            }
        }
        Ok(container.pid)
    }

    async fn delete_process(self, id: String, exec_id: String) -> Result<DeleteResponse, Error> {
        let container = self.0.container(&id)?;
        let process = container.process(&exec_id)?;
        let exit = if exec_id.is_empty() {
            Some(self.delete_init(&container).await?)
        } else {
            self.delete_exec(&container, &process).await?
        };
        let mut response = DeleteResponse::new();
        response.set_pid(container.pid);
        if let Some(exit) = exit {
            response.set_exit_status(exit.status);
            response.set_exited_at(exit.timestamp());
        }
        Ok(response)
    }

    async fn delete_init(&self, container: &Arc<Container>) -> Result<Exit, Error> {
        let init = &container.init;
        match init.state() {
            State::Stopped(_) => {}
            State::Running => return Err(state_error(container, init, "must be stopped")),
            State::Created => {
                self.0.abandon(init);
                kill::kill_init(&self.0, container, false).await?;
            }
        }
        let exit = init.wait().await;
        create::delete(&self.0, container, || {
            let mut event = TaskDelete::new();
            event.set_container_id(container.id.clone());
            event.set_pid(container.pid);
            event.set_exit_status(exit.status);
            event.set_exited_at(exit.timestamp());
            self.0.publisher.publish("/tasks/delete", Box::new(event));
        })
        .await?;
        Ok(exit)
    }

    async fn delete_exec(&self, container: &Arc<Container>, process: &Arc<Process>) -> Result<Option<Exit>, Error> {
        // A start in progress ends first, so that what it makes in the guest is known.
        let _transition = process.transition.lock().await;
        let exit = match process.state() {
            State::Stopped(exit) => Some(exit),
            State::Running => return Err(state_error(container, process, "must be stopped")),
            State::Created => None,
        };
        if !container.remove_exec(process) {
            return Err(Error::NotFound { what: "exec", id: process.exec_id.clone() });
        }
        if exit.is_some() {
            let (sandbox, of, id) = (self.0.clone(), container.clone(), process.exec_id.clone());
            container.forget_exec(&process.exec_id, async move { create::forget(&sandbox, &of, &id).await });
        } else {
            process.set_stopped(Exit::now(NEVER_RAN));
        }
        process.close().await;
        Ok(exit)
    }
}

fn state_error(container: &Container, process: &Process, wanted: &'static str) -> Error {
    let (what, id) = match process.exec_id.as_str() {
        "" => ("container", &container.id),
        _ => ("exec", &process.exec_id),
    };
    Error::State { what, id: id.clone(), state: process.state().name(), wanted }
}

fn unsupported<T>(what: &'static str) -> Reply<T> {
    Err(Error::Unimplemented(what).to_ttrpc())
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Reply<CreateTaskResponse> {
        self.1.known();
        let (service, id) = (self.clone(), request.id.clone());
        detached("create", &id, async move {
            let container = create::create(&service.0, &request).await?;
            let mut io = TaskIO::new();
            io.set_stdin(request.stdin);
            io.set_stdout(request.stdout);
            io.set_stderr(request.stderr);
            io.set_terminal(request.terminal);
            let mut event = TaskCreate::new();
            event.set_container_id(request.id);
            event.set_bundle(request.bundle);
            event.set_rootfs(request.rootfs);
            event.set_io(io);
            event.set_checkpoint(request.checkpoint);
            event.set_pid(container.pid);
            service.0.publisher.publish("/tasks/create", Box::new(event));
            tracing::info!(container = container.id, at_ms = service.0.elapsed_ms(), "container is created");
            let mut response = CreateTaskResponse::new();
            response.set_pid(container.pid);
            Ok(response)
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Reply<StartResponse> {
        let id = request.id.clone();
        detached("start", &id, {
            let started = self.clone().start_process(request.id, request.exec_id);
            async move {
                let mut response = StartResponse::new();
                response.set_pid(started.await?);
                Ok(response)
            }
        })
        .await
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Reply<DeleteResponse> {
        let id = request.id.clone();
        detached("delete", &id, self.clone().delete_process(request.id, request.exec_id)).await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Reply<Empty> {
        let (service, id) = (self.clone(), request.id.clone());
        detached("exec", &id, async move {
            let container = service.0.container(&request.id)?;
            if container.init.state() != State::Running {
                return Err(state_error(&container, &container.init, "must be running"));
            }
            let spec = serde_json::from_slice(&request.spec().value)
                .map_err(|e| Error::Invalid(format!("exec {}: process spec: {e}", request.exec_id)))?;
            let stdio = Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            container.forgotten(&request.exec_id).await;
            let process = Process::new(&request.exec_id, stdio, Some(spec));
            let mut event = TaskExecAdded::new();
            event.set_container_id(request.id);
            event.set_exec_id(request.exec_id);
            let publish = || service.0.publisher.publish("/tasks/exec-added", Box::new(event));
            container.add_exec(process, publish)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Reply<StateResponse> {
        let service = self.clone();
        let id = request.id.clone();
        detached("state", &id, async move {
            let container = service.0.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
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
                    response.set_exited_at(exit.timestamp());
                }
            }
            Ok(response)
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Reply<WaitResponse> {
        // Not detached: it changes nothing, and a client that goes away needs no answer.
        let waited = async {
            let process = self.0.container(&request.id)?.process(&request.exec_id)?;
            let exit = process.wait().await;
            let mut response = WaitResponse::new();
            response.set_exit_status(exit.status);
            response.set_exited_at(exit.timestamp());
            Ok(response)
        };
        waited.await.map_err(|error: Error| error.to_ttrpc())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Reply<Empty> {
        let service = self.clone();
        let id = request.id.clone();
        detached("kill", &id, async move {
            let container = service.0.container(&request.id)?;
            let process = container.process(&request.exec_id)?;
            kill::signal(&service.0, &container, &process, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Reply<Empty> {
        let service = self.clone();
        let id = request.id.clone();
        detached("resize pty", &id, async move {
            let process = service.0.container(&request.id)?.process(&request.exec_id)?;
            if !process.stdio.terminal {
                return Ok(Empty::new());
            }
            let resize = AgentResize {
                container_id: request.id,
                exec_id: request.exec_id,
                columns: request.width,
                rows: request.height,
                ..Default::default()
            };
            let call = async |agent: AgentClient, context, resize| agent.resize_pty(context, &resize).await;
            service.0.agent.ask("resize", resize, call).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Reply<Empty> {
        let service = self.clone();
        let id = request.id.clone();
        detached("close io", &id, async move {
            let process = service.0.container(&request.id)?.process(&request.exec_id)?;
            if request.stdin {
                process.close_stdin();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Reply<PidsResponse> {
        let service = self.clone();
        let id = request.id.clone();
        // The guest's pids mean nothing on the host: the one pid that does is the anchor's.
        detached("pids", &id, async move {
            let mut info = ProcessInfo::new();
            info.set_pid(service.0.container(&request.id)?.pid);
            let mut response = PidsResponse::new();
            response.processes.push(info);
            Ok(response)
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Reply<StatsResponse> {
        let service = self.clone();
        let id = request.id.clone();
        detached("stats", &id, async move {
            let container = service.0.container(&request.id)?;
            if container.init.state() != State::Running {
                return Err(state_error(&container, &container.init, "must be running"));
            }
            let ask = ContainerRequest { container_id: request.id, ..Default::default() };
            let call = async |agent: AgentClient, context, ask| agent.stats(context, &ask).await;
            let stats = service.0.agent.ask("stats", ask, call).await?;
            let mut any = Any::new();
            any.type_url = "io.containerd.cgroups.v2.Metrics".into();
            any.value = metrics::known(&stats.metrics)?;
            let mut response = StatsResponse::new();
            response.set_stats(any);
            Ok(response)
        })
        .await
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Reply<ConnectResponse> {
        self.1.known();
        let mut response = ConnectResponse::new();
        response.set_shim_pid(std::process::id());
        // Answered for an unknown id too: a daemon that has restarted asks this first.
        response.set_task_pid(self.0.container(&request.id).map_or(0, |container| container.pid));
        response.set_version(env!("CARGO_PKG_VERSION").into());
        Ok(response)
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Reply<Empty> {
        if request.now || self.0.is_empty() {
            self.0.shutdown.notify_one();
        }
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Reply<Empty> {
        unsupported("pause")
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Reply<Empty> {
        unsupported("resume")
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> Reply<Empty> {
        unsupported("update")
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Reply<Empty> {
        unsupported("checkpoint")
    }
}

/// What names a process to the agent.
pub fn process_request(container: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: container.into(), exec_id: exec_id.into(), ..Default::default() }
}
