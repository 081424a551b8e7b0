//! The daemon of a sandbox: from the inherited socket to the exit.
//!
//! It is single-threaded for its whole life: what it starts is tied to its main thread, and there is little to compute.

use std::{
    env,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{IntoRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use containerd_shim::Flags;
use containerd_shim_protos::{sandbox_async::create_sandbox, shim_async::create_task};
use tokio::{net::UnixListener as TokioListener, runtime::Builder};
use ttrpc::asynchronous::{Server, transport::Listener};
use vz_config::Config;
use vz_sys::{
    error::chain,
    process::inherited_fd,
    surroundings::{Surroundings, raise_own_open_files},
};

use crate::{
    events,
    host::{
        journal::{self, Journal, Resource},
        socket, unwind,
    },
    log,
    report::Report,
    sandbox::{
        self, Identity,
        prepare::{self, Ground, Prepared},
        served::Served,
    },
    service::{self, task::Service},
    spec,
};

/// Environment variable that carries containerd's ConfigPath from `start` to the daemon.
pub const CONFIG_PATH: &str = "VZ_CONFIG_PATH";
/// How long queued events and replies may take when the daemon is to exit.
const FLUSH: Duration = Duration::from_secs(3);

/// Why a daemon cannot serve.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The host's mount namespace, for what runs there later.
    #[error("take hold of the host's mount namespace")]
    Surroundings(#[source] io::Error),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(Box<sandbox::Error>),
    /// The inherited socket.
    #[error("use socket")]
    Socket(#[source] io::Error),
    /// What a sandbox owns that was never made.
    #[error("clean up")]
    Unwind(#[source] unwind::Error),
    /// The server.
    #[error("serve tasks")]
    Serve(#[source] ttrpc::Error),
}

impl<E: Into<sandbox::Error>> From<E> for Error {
    fn from(error: E) -> Self {
        Self::Sandbox(Box::new(error.into()))
    }
}

/// The daemon's process.
pub fn main(flags: &Flags) -> ExitCode {
    let (Ok(listener), Ok(report)) = (take_over(0), take_over(1)) else { return ExitCode::FAILURE };
    let listener = UnixListener::from(listener);
    // The daemon is the one to be sacrificed when memory is short, before containerd, whose score `start` has. A host
    // that forbids it loses nothing else.
    drop(containerd_shim::cgroup::adjust_oom_score(std::process::id()));
    let identity = match env::current_dir() {
        Ok(bundle) => Identity { namespace: flags.namespace.clone(), id: flags.id.clone(), bundle },
        Err(error) => return refuse(report, &format!("find working directory: {error}")),
    };
    let begun = match begin(flags, &identity) {
        Ok(begun) => begun,
        Err(error) => {
            let dir = vz_state::dir(&flags.namespace, &flags.id);
            if let Err(error) = unwind::unwind(&dir, |_, _| ()) {
                tracing::error!(error = chain(&error), "clean up");
            }
            return refuse(report, &chain(&error));
        }
    };
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(report, &format!("start async runtime: {error}")),
    };
    let report = Report::new(report);
    report.say(vz_state::READY);
    let code = runtime.block_on(serve(identity, begun, listener, report));
    // A thread that waits for a file system which hangs is not waited for.
    runtime.shutdown_background();
    code
}

fn refuse(report: OwnedFd, why: &str) -> ExitCode {
    // Whoever started us may be gone; there is nobody else to tell.
    drop(File::from(report).write_all(why.as_bytes()));
    ExitCode::FAILURE
}

/// Takes over what `start` has left as a standard stream. /dev/null takes its place: the number must not come to mean
/// something else for a library that writes to it.
fn take_over(number: RawFd) -> io::Result<OwnedFd> {
    let inherited = inherited_fd(number)?;
    let taken = inherited.try_clone()?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut place = inherited;
    nix::unistd::dup2(&null, &mut place)?;
    // Open for the life of the process.
    let _: RawFd = place.into_raw_fd();
    Ok(taken)
}

/// How far a sandbox is before anybody asks for anything.
#[derive(Debug)]
enum Begun {
    /// That of a container's bundle: its VM is on the way.
    Container(Box<Prepared>),
    /// A pod's, which CreateSandbox will describe.
    Pod(Box<Ground>),
}

fn begin(flags: &Flags, identity: &Identity) -> Result<Begun, Error> {
    let extra = env::var_os(CONFIG_PATH).map(PathBuf::from);
    let mut config = Config::load(extra.as_deref())?;
    if flags.debug && config.log_level < vz_config::LogLevel::Debug {
        config.log_level = vz_config::LogLevel::Debug;
    }
    let name = format!("{}/{}", identity.namespace, identity.id);
    let stderr = log::init(&identity.bundle, config.log_level.as_str(), &name);
    let surroundings = Surroundings::current().map_err(Error::Surroundings)?;
    // Each stream of a process takes descriptors, and the usual soft limit is 1024.
    if let Err(error) = raise_own_open_files() {
        tracing::warn!(%error, "limit of open files stays as it is");
    }
    let dir = vz_state::dir(&identity.namespace, &identity.id);
    let journal = Journal::create(&dir)?;
    journal.process(journal::SHIM, nix::unistd::Pid::this().as_raw())?;
    let path = PathBuf::from(flags.socket.trim_start_matches("unix://"));
    // `start` has made it, and nobody takes it from a listener that lives.
    let inode = socket::inode(&path).ok();
    journal.made(Resource::Socket { path, inode })?;
    let ground = Ground { config, journal, stderr, surroundings: Arc::new(surroundings) };
    if spec::is_there(&identity.bundle) {
        return Ok(Begun::Container(Box::new(prepare::prepare(identity, ground)?)));
    }
    Ok(Begun::Pod(Box::new(ground)))
}

async fn serve(identity: Identity, begun: Begun, listener: UnixListener, report: Report) -> ExitCode {
    let dir = vz_state::dir(&identity.namespace, &identity.id);
    let address = env::var("TTRPC_ADDRESS").unwrap_or_default();
    let (publisher, queue) = events::publisher(&identity.namespace, &address);
    let mut forwarding = tokio::spawn(queue.run());
    let served = async {
        let served = match begun {
            Begun::Container(prepared) => Served::there(identity.clone(), prepared.run(identity, publisher, None)?),
            Begun::Pod(ground) => Served::to_come(identity, *ground, publisher),
        };
        let (served, report) = (Arc::new(served), Arc::new(report));
        listener.set_nonblocking(true).map_err(Error::Socket)?;
        let listener = TokioListener::from_std(listener).map_err(Error::Socket)?;
        let service = Service { served: served.clone(), report: report.clone() };
        let mut services = create_task(Arc::new(service.clone()));
        // containerd 1.7 calls the same service by its older name; the messages are the same.
        let older = create_task(Arc::new(service));
        services.extend(older.into_iter().map(|(name, service)| (name.replace(".v3.", ".v2."), service)));
        services.extend(create_sandbox(Arc::new(service::sandbox::Service { served: served.clone(), report })));
        let mut server = Server::new().add_listener(Listener::from(listener)).register_service(services);
        server.start().await.map_err(Error::Serve)?;
        served.shutdown.notified().await;
        match served.get() {
            Some(sandbox) => sandbox.destroy().await,
            None => unwind::unwind(&dir, |_, _| ()).map_err(Error::Unwind)?,
        }
        // The reply to the request that ends us is on its way still.
        if tokio::time::timeout(FLUSH, server.shutdown()).await.is_err() {
            tracing::warn!("a client keeps its connection open");
        }
        Ok::<_, Error>(())
    };
    let code = match served.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "serve");
            if let Err(error) = unwind::unwind(&dir, |_, _| ()) {
                tracing::error!(error = chain(&error), "clean up");
            }
            ExitCode::FAILURE
        }
    };
    // Every publisher is gone with the sandbox: the queue ends by itself once it is empty.
    if tokio::time::timeout(FLUSH, &mut forwarding).await.is_err() {
        tracing::warn!("containerd does not take the last events");
    }
    code
}
