//! Serves a virtio backend to another VMM over vhost-user.
//!
//! The VMM (QEMU) connects, tells where guest memory and rings are, and passes an eventfd for each direction of each
//! queue. Threads of this process then serve the rings; nothing goes through the VMM any more.
//!
//! Threat: the rings and all guest memory are the guest's; see `vz-virtio`. What comes over the socket is the VMM's,
//! which a guest may have taken over: its messages are checked by the `vhost` crate, and the worst that they can do is
//! to make this device fail, which ends the machine.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::panic
)]

use std::{
    fmt,
    fs::File,
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as ServeError, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::epoll::EventSet;
use vz_jail::Role;
use vz_sys::error::chain;
use vz_virtio::{Memory, Worker};

mod adapter;

use adapter::Adapter;

/// Why a device can no longer be served. The machine cannot go on without it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A thread of the device panicked.
    #[error("device thread {thread} panicked: {message}")]
    Panic {
        /// Its name.
        thread: String,
        /// What it said.
        message: String,
    },
    /// A thread could not be prepared.
    #[error("device thread {thread}: {message}")]
    Thread {
        /// Its name.
        thread: String,
        /// What failed.
        message: String,
    },
    /// The VMM sent what cannot be.
    #[error("vhost-user connection of device {device}: {message}")]
    Protocol {
        /// The device's name.
        device: String,
        /// What failed.
        message: String,
    },
}

/// Called, from any thread of a device, when it failed; more than once where more than one thread did.
pub type OnFailure = Arc<dyn Fn(Failure) + Send + Sync>;

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be made.
    #[error("make vhost-user socket in {dir}")]
    Socket {
        /// The directory.
        dir: String,
        /// Why.
        source: io::Error,
    },
    /// A device needs a thread.
    #[error("device {0} has no queues")]
    Empty(String),
    /// The service does not start.
    #[error("serve device {device}: {message}")]
    Serve {
        /// The device's name.
        device: String,
        /// What failed.
        message: String,
    },
    /// A thread does not start.
    #[error("start thread for device {device}")]
    Thread {
        /// The device's name.
        device: String,
        /// Why.
        source: io::Error,
    },
}

/// Our end of a connection between a device and a VMM. It was made without a lasting name: nobody else can connect.
#[derive(Debug)]
pub struct Endpoint(UnixListener);

impl Endpoint {
    /// Makes one, and the VMM's end for it to inherit. A name exists in `dir`, which only we may write, for the length
    /// of this call.
    pub fn new(dir: &Path, device: &str) -> Result<(Self, UnixStream), Error> {
        Self::connect(dir, device).map_err(|source| Error::Socket { dir: dir.display().to_string(), source })
    }

    fn connect(dir: &Path, device: &str) -> io::Result<(Self, UnixStream)> {
        // By the descriptor, since an address has room for some hundred bytes only.
        let dir = File::open(dir)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{device}.sock", dir.as_raw_fd()));
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let vmm = UnixStream::connect(&path);
        std::fs::remove_file(&path)?;
        Ok((Self(listener), vmm?))
    }
}

/// A device that is served until the process ends.
#[derive(Debug)]
pub struct Served;

/// Serves a device on its endpoint, each worker in a thread of its own.
///
/// `queues` is how many queues the VMM is told of; it must not be more than the workers serve.
pub fn serve(
    name: &str,
    queues: usize,
    workers: Vec<Worker<Role>>,
    endpoint: Endpoint,
    on_failure: OnFailure,
) -> Result<Served, Error> {
    let failed = |e: &dyn fmt::Display| Error::Serve { device: name.to_owned(), message: e.to_string() };
    let memory = GuestMemoryAtomic::new(Memory::new());
    let sources: Vec<_> = workers.iter().map(|worker| worker.backend.sources()).collect();
    let adapter = Adapter::new(queues, workers, memory.clone(), Arc::clone(&on_failure))
        .ok_or_else(|| Error::Empty(name.to_owned()))?;
    let adapter = Arc::new(adapter);
    let mut daemon =
        VhostUserDaemon::new(format!("{name}-vhost"), Arc::clone(&adapter), memory).map_err(|e| failed(&e))?;
    for (handler, sources) in daemon.get_epoll_handlers().iter().zip(sources) {
        for source in sources {
            let data = adapter.event_of(source.token);
            handler.register_listener(source.fd, EventSet::IN, data.into()).map_err(|e| failed(&e))?;
        }
    }
    let device = name.to_owned();
    let mut listener = Listener::from(endpoint.0);
    // The connection is there already, so this does not wait for the VMM.
    daemon.start(&mut listener).map_err(|e| failed(&e))?;
    let thread = format!("{name}-end");
    let (refused_thread, refused) = (thread.clone(), Arc::clone(&on_failure));
    let wait = move || {
        if let Some(message) = catch_unwind(AssertUnwindSafe(|| ended(&mut daemon)))
            .unwrap_or_else(|_| Some("its thread panicked".to_owned()))
        {
            on_failure(Failure::Protocol { device, message });
        }
    };
    vz_jail::spawn(Role::Protocol, &thread, wait, move |e| {
        refused(Failure::Thread { thread: refused_thread, message: chain(&e) });
    })
    .map_err(|source| Error::Thread { device: name.to_owned(), source })?;
    Ok(Served)
}

/// Waits for the connection's end; what was wrong with it, unless the VMM just went away.
fn ended(daemon: &mut VhostUserDaemon<Arc<Adapter>>) -> Option<String> {
    match daemon.wait() {
        Ok(()) | Err(ServeError::HandleRequest(ProtocolError::Disconnected | ProtocolError::PartialMessage)) => None,
        Err(ServeError::WaitDaemon(panic)) => Some(format!("its thread panicked: {}", words(panic.as_ref()))),
        Err(e) => Some(e.to_string()),
    }
}

/// What a panic said.
fn words(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
