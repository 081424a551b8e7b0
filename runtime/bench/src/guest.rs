//! The agent, spoken to as the shim does: its hello, the kernel's log, and commands in a container of BusyBox's.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::{io::AsyncReadExt, net::UnixStream};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context,
};
use vz_proto::{
    AgentClient, CONTROL_PORT, ContainerRequest, CreateContainerRequest, Hello, LOG_PORT, LogRecord, NETNS_PATH,
    ProcessRequest, STREAM_PORT, Stdio, Welcome, frame, handshake,
};

use crate::{
    phases::Line,
    subject::PLACE,
    vm::{self, Vm},
};

/// Most lines that are taken of a kernel's log: its buffer has no room for more.
const LINES: usize = 65536;
/// Most bytes that are taken of a command's output.
const OUTPUT: u64 = 16 << 20;

/// Why the guest could not be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// A message.
    #[error("exchange messages with the guest agent")]
    Frame(#[from] frame::Error),
    /// It closed a connection.
    #[error("the guest agent closed its connection without {0}")]
    Closed(&'static str),
    /// It did not say hello as it should.
    #[error(transparent)]
    Handshake(#[from] handshake::Error),
    /// Random bytes.
    #[error("read random bytes")]
    Random(#[source] io::Error),
    /// A request.
    #[error("{what} in the guest")]
    Request {
        /// Which.
        what: &'static str,
        /// What is wrong with the connection.
        source: Box<ttrpc::Error>,
    },
    /// A request that the agent refused, in its own words.
    #[error("{what} in the guest: {said}")]
    Refused {
        /// Which.
        what: &'static str,
        /// What the agent said.
        said: String,
    },
    /// A command's output.
    #[error("read output of the guest's command")]
    Output(#[source] io::Error),
}

/// The agent that has said hello.
pub struct Guest {
    client: AgentClient,
    /// What it said.
    pub hello: Hello,
    /// When it was heard.
    pub heard: Instant,
    /// The kernel's log until then.
    pub log: Vec<Line>,
    containers: u32,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("hello", &self.hello).finish_non_exhaustive()
    }
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Output and errors, as they came.
    pub text: String,
}

impl Guest {
    /// Waits for the hello, answers it, and takes the kernel's log.
    pub async fn meet(vm: &mut Vm, wanted: &str) -> Result<Self, Error> {
        let mut stream = vm.connection(CONTROL_PORT).await?;
        let hello = handshake::hello(&mut stream, wanted).await?;
        let heard = Instant::now();
        let settings = Welcome {
            log_level: "warn".into(),
            hostname: "vz-linux-bench".into(),
            kernel_log: true,
            ..Default::default()
        };
        handshake::welcome(&mut stream, settings).await?;
        let log = kernel_log(vm.connection(LOG_PORT).await?).await?;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        Ok(Self { client, hello, heard, log, containers: 0 })
    }

    /// Runs a command with BusyBox's shell, in a container whose root file system [`crate::subject::busybox`] has made,
    /// with the VM's log and most privileges. `network` is what the containers are to have, nothing for what there is.
    pub async fn run(&mut self, vm: &mut Vm, command: &str, network: &[u8], limit: Duration) -> Result<Output, Error> {
        self.containers += 1;
        let id = format!("bench-{}", self.containers);
        let token = frame::new_token().map_err(Error::Random)?;
        let mut stream = vm.dial(STREAM_PORT).await?;
        frame::write_token(&mut stream, &token).await?;
        let stdio = Stdio { stdout: token, ..Default::default() };
        let create = CreateContainerRequest {
            container_id: id.clone(),
            spec: spec(command).to_string().into_bytes(),
            stdio: Some(stdio).into(),
            network: network.to_vec(),
            ..Default::default()
        };
        let start = ContainerRequest { container_id: id.clone(), ..Default::default() };
        let process = ProcessRequest { container_id: id, ..Default::default() };
        let context = || context::with_timeout(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX));
        let failed = |what| {
            move |error| match error {
                ttrpc::Error::RpcStatus(status) => Error::Refused { what, said: status.message().to_owned() },
                source => Error::Request { what, source: Box::new(source) },
            }
        };
        let client = self.client.clone();
        let run = async {
            client.create_container(context(), &create).await.map_err(failed("create a container"))?;
            client.start_container(context(), &start).await.map_err(failed("start a container"))?;
            let mut output = Vec::new();
            stream.take(OUTPUT).read_to_end(&mut output).await.map_err(Error::Output)?;
            let ended = client.wait_process(context(), &process).await.map_err(failed("wait for a container"))?;
            client.delete_process(context(), &process).await.map_err(failed("delete a container"))?;
            Ok(Output { status: ended.status, text: String::from_utf8_lossy(&output).into_owned() })
        };
        tokio::select! {
            // A broken connection is what a VM that ends looks like, too, and its end says more.
            biased;
            ended = vm.ended() => Err(ended.into()),
            output = run => output,
        }
    }
}

async fn kernel_log(mut stream: UnixStream) -> Result<Vec<Line>, Error> {
    let mut lines = Vec::new();
    loop {
        let record: LogRecord = frame::read(&mut stream).await?.ok_or(Error::Closed("the kernel's log"))?;
        if record.kernel && record.message.is_empty() {
            return Ok(lines);
        }
        if record.kernel && lines.len() < LINES {
            lines.push(Line::from(record));
        }
    }
}

fn spec(command: &str) -> serde_json::Value {
    let bind = |path: &str| json!({ "destination": path, "type": "bind", "source": path, "options": ["rbind"] });
    let all = [
        "CAP_SYSLOG",
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "CAP_NET_RAW",
        "CAP_SYS_PTRACE",
        "CAP_DAC_OVERRIDE",
        "CAP_BPF",
    ];
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
            "env": ["PATH=/bin", "HOME=/"],
            // Errors where the output is, in the order in which they come.
            "args": ["/bin/sh", "-c", "exec 2>&1; exec /bin/sh -c \"$1\"", "sh", command],
            "capabilities": { "bounding": all, "effective": all, "permitted": all },
        },
        "root": { "path": Path::new("/").join(PLACE) },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            bind("/dev/kmsg"),
            bind("/sys"),
        ],
        "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "network", "path": NETNS_PATH }] },
    })
}
