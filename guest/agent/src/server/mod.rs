//! The server: what the shim talks to. A child of PID 1 that may die and be started again at any time.
//!
//! It owns nothing that cannot be had again: processes, their stdio and their exits are in PID 1's table, containers in
//! libcontainer's state and in cgroups. It never forks; PID 1 does, see [`link`].
//!
//! One thread, but for moments in another network namespace. State is changed between awaits, under a lock that is
//! never held across one.

mod cgroup;
mod containers;
mod disks;
mod error;
mod events;
mod forward;
mod kmsg;
mod link;
mod logs;
mod metrics;
mod network;
mod oom;
mod prepare;
mod processes;
mod readiness;
mod reports;
mod resources;
mod service;
mod shared;
mod state;
mod stdio;
mod streams;
mod vsock;
mod watched;

use std::{fs, io, os::fd::AsRawFd, sync::Arc};

use ttrpc::asynchronous::{Server, transport::Listener};
use vz_proto::{Hello, Welcome, frame};
use vz_sys::channel::Channel;

use crate::{clock, log::Log, protocol::Request, text};
use containers::Agent;
use service::Service;

/// Why the server ends. PID 1 then starts another.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("close inherited descriptors")]
    Descriptors(#[source] io::Error),
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    #[error("talk to PID 1")]
    Link(#[source] io::Error),
    #[error("PID 1 has closed the channel")]
    Orphaned,
    #[error("listen for connections of the host")]
    Listen(#[source] io::Error),
    #[error("dial the host's port {0}")]
    Dial(u32, #[source] io::Error),
    #[error("greet the host")]
    Greet(#[source] frame::Error),
    #[error("the host has closed the connection")]
    Closed,
    #[error("serve")]
    Serve(#[source] ttrpc::Error),
    #[error("guard against the kernel's choice when memory runs out")]
    Oom(#[source] io::Error),
    #[error("watch for out of memory")]
    Watch(#[source] nix::Error),
}

/// Serves the host until its connection ends, then ends the process.
pub fn run(init: Channel, log: &Log) -> ! {
    let served = vz_sys::fork::close_other_fds(&[init.as_raw_fd()])
        .map_err(Error::Descriptors)
        .and_then(|()| fs::write("/proc/self/oom_score_adj", "-1000").map_err(Error::Oom))
        .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime))
        .and_then(|runtime| runtime.block_on(serve(init, log)));
    if let Err(e) = served {
        // To the kernel's log: the host's is gone with the connection.
        log.redirect(log.level(), crate::log::Kernel);
        tracing::error!("server: {}", text::chain(&e));
    }
    std::process::exit(1)
}

async fn serve(init: Channel, log: &Log) -> Result<(), Error> {
    let (link, mut reports) = link::open(init).map_err(Error::Link)?;
    let oom = oom::Watch::new().map_err(Error::Watch)?;
    let agent = Arc::new(Agent::new(link, oom));
    let ready = agent.adopt(&mut reports).await?;
    let mut pump = tokio::spawn(Arc::clone(&agent).pump(reports));

    let listener = vsock::Listener::bind(vz_proto::STREAM_PORT).map_err(Error::Listen)?;
    tokio::spawn(Arc::clone(&agent).accept_streams(listener));
    let forwarded = vsock::Listener::bind(vz_proto::FORWARD_PORT).map_err(Error::Listen)?;
    tokio::spawn(forward::serve(forwarded));
    tokio::spawn(Arc::clone(&agent).watch_oom());

    let mut host = vsock::connect(vz_proto::CONTROL_PORT).await.map_err(|e| Error::Dial(vz_proto::CONTROL_PORT, e))?;
    let (uptime_ns, tsc) = clock::uptime();
    let hello = Hello {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        incarnation: ready.incarnation,
        init_ns: ready.first.uptime_ns,
        init_tsc: ready.first.tsc,
        agent_cpu_ns: clock::agent_cpu_ns(&ready.first),
        uptime_ns,
        tsc,
        ..Default::default()
    };
    frame::write(&mut host, &hello).await.map_err(Error::Greet)?;
    let welcome: Welcome = frame::read(&mut host).await.map_err(Error::Greet)?.ok_or(Error::Closed)?;
    settle(&welcome, log);
    logs::start(log, crate::log::level(&welcome.log_level), welcome.kernel_log);
    agent.link.tell(&Request::Log { level: welcome.log_level.clone() });
    agent.resume().await;

    let (host, closed) = watched::watch(host);
    let connection = futures::stream::iter([Ok::<_, io::Error>(host)]);
    let service = Arc::new(Service::new(agent));
    let mut server =
        Server::new().add_listener(Listener::new(connection)).register_service(vz_proto::create_agent(service));
    server.start().await.map_err(Error::Serve)?;
    tokio::select! {
        _ = closed => Err(Error::Closed),
        ended = &mut pump => ended.unwrap_or(Err(Error::Orphaned)),
    }
}

/// Does what the host's welcome says. None of it is worth an end: a guest with a wrong clock still runs containers.
fn settle(welcome: &Welcome, log: &Log) {
    log.set_level(crate::log::level(&welcome.log_level));
    let seeded = fs::File::open("/dev/urandom").and_then(|random| vz_sys::random::credit(random, &welcome.seed));
    if let Err(e) = seeded {
        tracing::error!("credit the host's entropy: {e}");
    }
    if let Err(e) = clock::set_realtime(welcome.realtime_ns) {
        tracing::error!("set the clock: {e}");
    }
    if let Err(e) = nix::unistd::sethostname(&welcome.hostname) {
        tracing::error!(hostname = welcome.hostname, "set the hostname: {e}");
    }
}
