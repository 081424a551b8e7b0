//! The daemon's Task service, asked.

use containerd_shim_protos::{
    api::{
        CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest, ResizePtyRequest,
        ResumeRequest, StartRequest, StateRequest, Status, WaitRequest,
    },
    protobuf::well_known_types::any::Any,
    shim_async::{Client, TaskClient},
};
use ttrpc::context::Context;

use super::{error::Error, state::Dir, stdio::Addresses};

/// A connection to the daemon of a container.
#[derive(Clone)]
pub struct Task {
    client: TaskClient,
    id: String,
}

fn failed(request: &'static str) -> impl FnOnce(ttrpc::Error) -> Error {
    move |source| match source {
        // The daemon's words are whole.
        ttrpc::Error::RpcStatus(status) => Error::Said(status.message),
        source => Error::Task { request, source },
    }
}

/// A runtime for a few requests.
pub fn runtime() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::step("start async runtime"))
}

impl Task {
    /// Connects to the daemon of the container in `dir`.
    pub async fn connect(dir: &Dir) -> Result<Self, Error> {
        let address = format!("unix://{}", dir.short("task").display());
        let client = Client::connect(&address).await.map_err(failed("connect to the sandbox's daemon"))?;
        Ok(Self { client: TaskClient::new(client), id: dir.id().to_owned() })
    }

    /// Creates the container; its anchor's pid.
    pub async fn create(&self, bundle: &str, stdio: &Addresses) -> Result<u32, Error> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.to_owned(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..Default::default()
        };
        self.client.create(Context::default(), &request).await.map(|r| r.pid).map_err(failed("create container"))
    }

    /// Adds an exec process.
    pub async fn exec(&self, exec_id: &str, process: Vec<u8>, stdio: &Addresses) -> Result<(), Error> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process,
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            spec: Some(spec).into(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            terminal: stdio.terminal,
            ..Default::default()
        };
        self.client.exec(Context::default(), &request).await.map(drop).map_err(failed("add exec process"))
    }

    /// Starts the container's init (no exec id), or an exec process.
    pub async fn start(&self, exec_id: &str) -> Result<(), Error> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.client.start(Context::default(), &request).await.map(drop).map_err(failed("start process"))
    }

    /// Signals a process, or all of a container.
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request =
            KillRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), signal, all, ..Default::default() };
        self.client.kill(Context::default(), &request).await.map(drop).map_err(failed("signal process"))
    }

    /// Waits for a process's end; its exit status.
    pub async fn wait(&self, exec_id: &str) -> Result<u32, Error> {
        let request = WaitRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.client.wait(Context::default(), &request).await.map(|r| r.exit_status).map_err(failed("wait for process"))
    }

    /// Forgets an exec process.
    pub async fn forget(&self, exec_id: &str) -> Result<(), Error> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.client.delete(Context::default(), &request).await.map(drop).map_err(failed("forget process"))
    }

    /// Tells a process's terminal its size.
    pub async fn resize(&self, exec_id: &str, (columns, rows): (u16, u16)) -> Result<(), Error> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.client.resize_pty(Context::default(), &request).await.map(drop).map_err(failed("resize terminal"))
    }

    /// What the container is, in the runtime specification's words; nothing where the daemon has none yet.
    pub async fn status(&self) -> Result<Option<&'static str>, Error> {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        match self.client.state(Context::default(), &request).await {
            Ok(state) => Ok(Some(match state.status.enum_value_or_default() {
                Status::CREATED => "created",
                Status::RUNNING => "running",
                Status::PAUSED | Status::PAUSING => "paused",
                Status::STOPPED | Status::UNKNOWN => "stopped",
            })),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => Ok(None),
            Err(e) => Err(failed("ask for the container's state")(e)),
        }
    }

    /// Stops all of a container's processes for a while.
    pub async fn pause(&self) -> Result<(), Error> {
        let request = PauseRequest { id: self.id.clone(), ..Default::default() };
        self.client.pause(Context::default(), &request).await.map(drop).map_err(failed("pause container"))
    }

    /// Goes on.
    pub async fn resume(&self) -> Result<(), Error> {
        let request = ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.client.resume(Context::default(), &request).await.map(drop).map_err(failed("resume container"))
    }
}
