//! The guest's side of a sandbox: its VM, and the agent that answers in it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::net::UnixStream;
use vz_proto::{STREAM_PORT, frame};

pub mod agent;
pub mod answers;
pub mod calls;
pub mod error;
pub mod follow;
pub mod forward;
pub mod log;
pub mod metrics;
pub mod vmm;

pub use error::Error;

/// How long the guest may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines {
    /// For a request to the agent, its return after its connection was lost included.
    pub request: Duration,
    /// To confirm an end.
    pub kill: Duration,
    /// To connect for the first time.
    pub boot: Duration,
}

/// What a VM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory, in MiB.
    pub memory_mib: u64,
}

/// The guest's side of a sandbox. Containers borrow it; it knows none of them.
#[derive(Debug)]
pub struct Guest {
    /// The VM's process.
    pub vmm: vmm::Vmm,
    /// The link to the agent.
    pub agent: agent::Agent,
    /// How long either may take.
    pub deadlines: Deadlines,
    /// What the VM has. It does not change: this is the place for a VM that grows.
    pub size: Size,
    /// Whether the VM's end is our own doing.
    ending: AtomicBool,
}

impl Guest {
    /// A guest that boots.
    pub fn new(vmm: vmm::Vmm, agent: agent::Agent, deadlines: Deadlines, size: Size) -> Self {
        Self { vmm, agent, deadlines, size, ending: AtomicBool::new(false) }
    }

    /// Whether the VM's end is our own doing.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Ends the VM, and waits until nothing of it is left.
    ///
    /// A vmm process that the kernel does not let go is in the journal still. Its guest counts as ended: the sandbox is
    /// told so as of any other end.
    pub async fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.vmm.end().await;
    }

    /// Connects a stream for a process that the agent is about to be asked for, under a token that names it.
    pub async fn open_stream(&self) -> Result<(String, UnixStream), Error> {
        let token = frame::new_token().map_err(|e| Error::Stream(e.into()))?;
        let mut stream = self.vmm.dial(STREAM_PORT, self.deadlines.request).await?;
        // Fits into the socket's buffer, whether the guest reads or not.
        frame::write_token(&mut stream, &token).await.map_err(Error::Stream)?;
        Ok((token, stream))
    }
}
