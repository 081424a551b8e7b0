//! The sandbox that a daemon serves: there from the start for a container's bundle, made at CreateSandbox for a pod.
//!
//! A pod's steps are Create, Start, Stop and Shutdown. Stop and Shutdown may come at any step and more than once. The
//! pod's end is that of its pause container, whatever ends it: Stop, or the VM.

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::SystemTime,
};

use containerd_shim_protos::api::CreateTaskRequest;
use tokio::sync::{Notify, watch};
use vz_sys::{error::chain, sync::lock};

use super::{
    Identity, Sandbox,
    pod::Pod,
    prepare::{self, Ground},
};
use crate::{
    container::{self, Exit},
    events::Publisher,
};

/// Why a pod's step fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox that is asked for is not the one that is served.
    #[error("sandbox {0}: not found")]
    NotFound(String),
    /// The step does not follow the one before.
    #[error("sandbox {id} {state}, {wanted}")]
    Step {
        /// Its id.
        id: String,
        /// What it is.
        state: &'static str,
        /// What it must be for this.
        wanted: &'static str,
    },
    /// The pod's description.
    #[error(transparent)]
    Pod(#[from] super::pod::Error),
    /// The sandbox cannot be made.
    #[error(transparent)]
    Sandbox(Box<super::Error>),
    /// Its pause container.
    #[error(transparent)]
    Container(Box<container::Error>),
}

impl From<super::Error> for Error {
    fn from(error: super::Error) -> Self {
        Self::Sandbox(Box::new(error))
    }
}

impl From<container::Error> for Error {
    fn from(error: container::Error) -> Self {
        Self::Container(Box::new(error))
    }
}

/// A pod that runs or has run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Life {
    /// The pause container's pid on the host.
    pub pid: u32,
    /// When it was started.
    pub created: SystemTime,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// What a daemon serves.
#[derive(Debug)]
pub struct Served {
    identity: Identity,
    /// The parts that [`Self::create`] makes a pod's sandbox of; taken by it.
    ground: Mutex<Option<(Ground, Publisher)>>,
    sandbox: OnceLock<Arc<Sandbox>>,
    life: watch::Sender<Option<Life>>,
    /// Notified once when the shim is to exit.
    pub shutdown: Notify,
}

impl Served {
    /// Serves a sandbox that is there.
    pub fn there(identity: Identity, sandbox: Arc<Sandbox>) -> Self {
        let served = Self::new(identity, None);
        drop(served.sandbox.set(sandbox));
        served
    }

    /// Serves one that is made by [`Self::create`].
    pub fn to_come(identity: Identity, ground: Ground, publisher: Publisher) -> Self {
        Self::new(identity, Some((ground, publisher)))
    }

    fn new(identity: Identity, ground: Option<(Ground, Publisher)>) -> Self {
        Self {
            identity,
            ground: Mutex::new(ground),
            sandbox: OnceLock::new(),
            life: watch::Sender::new(None),
            shutdown: Notify::new(),
        }
    }

    /// The sandbox, if it is there.
    pub fn get(&self) -> Option<&Arc<Sandbox>> {
        self.sandbox.get()
    }

    /// The sandbox, for a request about one of its containers.
    pub fn of_container(&self, id: &str) -> Result<Arc<Sandbox>, container::Error> {
        self.get().cloned().ok_or_else(|| container::Error::NotFound { what: "container", id: id.into() })
    }

    /// Refuses a request for another sandbox.
    pub fn check(&self, id: &str) -> Result<(), Error> {
        if id == self.identity.id { Ok(()) } else { Err(Error::NotFound(id.to_owned())) }
    }

    /// Makes the sandbox of a pod. This blocks: the process must be single-threaded, and nothing else is served yet.
    pub fn create(&self, pod: &Pod) -> Result<(), Error> {
        let Some((ground, publisher)) = lock(&self.ground).take() else {
            return Err(self.step("was created already", "must be new"));
        };
        let files = pod.make_bundle(&self.identity.bundle, &self.identity.id)?;
        let prepared = prepare::prepare(&self.identity, ground)?;
        let sandbox = prepared.run(self.identity.clone(), publisher, Some(Arc::new(files)))?;
        drop(self.sandbox.set(sandbox));
        Ok(())
    }

    /// Starts a pod's pause container; its life so far.
    pub async fn start(self: &Arc<Self>) -> Result<Life, Error> {
        let sandbox = self.created()?;
        if self.life.borrow().is_some() {
            return Err(self.step("was started already", "must be created"));
        }
        let mut request = CreateTaskRequest::new();
        request.set_id(self.identity.id.clone());
        request.set_bundle(self.identity.bundle.to_string_lossy().into_owned());
        let pause = sandbox.create(&request).await?;
        pause.start().await?;
        let life = Life { pid: pause.pid, created: SystemTime::now(), exit: None };
        self.life.send_replace(Some(life));
        let served = Arc::clone(self);
        tokio::spawn(async move {
            let exit = pause.init.wait().await;
            served.life.send_modify(|life| {
                if let Some(life) = life {
                    life.exit = Some(exit);
                }
            });
        });
        Ok(life)
    }

    /// Ends everything that runs in the pod, and its VM. What containerd has to delete stays until then.
    pub async fn stop(&self) -> Result<(), Error> {
        // Whatever is made from now on is refused.
        drop(lock(&self.ground).take());
        let Some(sandbox) = self.get() else { return Ok(()) };
        sandbox.stop().await;
        if let Ok(pause) = sandbox.container(&self.identity.id) {
            match sandbox.delete_container(&pause).await {
                Ok(_) | Err(container::Error::NotFound { .. }) => {}
                Err(error) => tracing::error!(error = chain(&error), "delete the pause container"),
            }
        }
        Ok(())
    }

    /// Waits for a started pod's end.
    pub async fn wait(&self) -> Result<Exit, Error> {
        let mut life = self.life.subscribe();
        let ended = life.wait_for(|life| life.is_some_and(|life| life.exit.is_some())).await;
        // The sender is in self.
        let exit = ended.ok().and_then(|life| life.and_then(|life| life.exit));
        exit.ok_or_else(|| self.step("has ended", "must be there"))
    }

    /// What is known of a pod; nothing before its start.
    pub fn life(&self) -> Option<Life> {
        *self.life.borrow()
    }

    fn created(&self) -> Result<Arc<Sandbox>, Error> {
        self.get().cloned().ok_or_else(|| self.step("is not created", "must be created"))
    }

    fn step(&self, state: &'static str, wanted: &'static str) -> Error {
        Error::Step { id: self.identity.id.clone(), state, wanted }
    }
}
