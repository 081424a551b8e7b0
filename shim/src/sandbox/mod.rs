//! A sandbox: one VM, and the containers in it.
//!
//! The sandbox owns the host's and the guest's side, and lends both to its containers. One rule of its own ends the VM:
//! see [`Sandbox::delete`].

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    cgroups_v2::metrics::Metrics,
    events::task::{TaskCreate, TaskIO},
};
use vz_sys::{error::chain, sync::lock};

use crate::{
    container::{self, Container, Exit, Lent, Process, State, create, peers::Peers},
    events::Publisher,
    host::{
        self,
        cgroup::Cgroup,
        disks::Disk,
        unwind::{self, Unwound},
    },
};

pub mod error;
pub mod pod;
pub mod prepare;
pub mod served;
pub mod shape;
pub mod watch;

pub use error::Error;

/// Who the sandbox is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// The id of the sandbox, which is that of its first container.
    pub id: String,
    /// The first container's bundle.
    pub bundle: PathBuf,
}

/// A sandbox.
#[derive(Debug)]
pub struct Sandbox {
    identity: Identity,
    /// Both its sides, as its containers have them.
    lent: Lent,
    containers: Mutex<HashMap<String, Slot>>,
}

/// A container's id in its sandbox.
#[derive(Debug)]
enum Slot {
    /// It is being made on the host.
    Reserved,
    /// It is there.
    Living(Arc<Container>),
    /// It is being taken away.
    Leaving(Arc<Container>),
}

impl Slot {
    fn container(&self) -> Option<&Arc<Container>> {
        match self {
            Self::Reserved => None,
            Self::Living(container) | Self::Leaving(container) => Some(container),
        }
    }
}

impl Sandbox {
    /// A sandbox without containers.
    pub fn new(identity: Identity, lent: Lent) -> Self {
        Self { identity, lent, containers: Mutex::default() }
    }

    /// A container.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, container::Error> {
        let found = self.containers().get(id).and_then(Slot::container).cloned();
        found.ok_or_else(|| container::Error::NotFound { what: "container", id: id.into() })
    }

    /// A container, and one of its processes: the init for an empty id.
    pub fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), container::Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        Ok((container, process))
    }

    /// Makes a container that is ready to be started, and publishes that. After a failure nothing of it is left.
    pub async fn create(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<Arc<Container>, container::Error> {
        let id = &request.id;
        self.reserve(id)?;
        let made = create::on_host(&self.lent_to(id), request, self.disks_of(id), self.peers()).await;
        let (container, spec) = match made {
            Ok(made) => made,
            Err(error) => {
                self.remove(id);
                return Err(error);
            }
        };
        self.containers().insert(id.clone(), Slot::Living(container.clone()));
        // Nothing of its init is published before it has been created; who waits for the end of a creation that fails
        // finds nothing of it.
        let transition = container.init.transition.lock().await;
        if let Err(error) = container.create_in_guest(spec).await {
            // Whoever waits for it already is told that nothing will come.
            container.init.set_stopped(Exit::now(255));
            if let Err(error) = self.delete(&container, || {}).await {
                tracing::error!(container = id, error = chain(&error), "undo create");
            }
            return Err(error);
        }
        self.publish_create(request, &container);
        drop(transition);
        Ok(container)
    }

    fn publish_create(&self, request: &CreateTaskRequest, container: &Container) {
        let mut io = TaskIO::new();
        io.set_stdin(request.stdin.clone());
        io.set_stdout(request.stdout.clone());
        io.set_stderr(request.stderr.clone());
        io.set_terminal(request.terminal);
        let mut event = TaskCreate::new();
        event.set_container_id(request.id.clone());
        event.set_bundle(request.bundle.clone());
        event.set_rootfs(request.rootfs.clone());
        event.set_io(io);
        event.set_checkpoint(request.checkpoint.clone());
        event.set_pid(container.pid);
        self.lent_to(&request.id).publisher.publish("/tasks/create", Box::new(event));
        tracing::info!(container = container.id, at_ms = self.lent.elapsed_ms(), "container is created");
    }

    /// Takes away a container that has ended or was never started, and publishes that. How its init ended.
    pub async fn delete_container(&self, container: &Arc<Container>) -> Result<Exit, container::Error> {
        let init = &container.init;
        match init.state() {
            State::Stopped(_) => {}
            State::Running => return Err(container.wrong_state(init, "must be stopped")),
            State::Created => {
                self.abandon(init);
                container.kill_init(false).await?;
            }
        }
        let exit = init.wait().await;
        self.delete(container, || container.publish_delete(exit)).await?;
        Ok(exit)
    }

    /// Takes away a container: in the guest, then on the host. The sandbox's rule is here: the last container takes the
    /// VM along.
    ///
    /// This happens once: whoever asks meanwhile waits, and is told that the container is not found. A step that fails
    /// does not keep the others from being taken; the first failure is returned, and the journal has what is left.
    async fn delete(&self, container: &Arc<Container>, publish: impl FnOnce()) -> Result<(), container::Error> {
        let _deletion = container.deletion.lock().await;
        if !self.has(container) {
            return Err(container::Error::NotFound { what: "container", id: container.id.clone() });
        }
        container.leave_guest().await;
        let mut result = Ok(());
        if self.leave(container) {
            self.lent.guest.end().await;
            result = self.lent.host.network.undo(&self.lent.host.journal).map_err(host::Error::from);
        }
        container.leave_host().await;
        self.remove(&container.id);
        publish();
        Ok(result?)
    }

    /// Whether there is no container, nor one in the making.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty()
    }

    /// Ends the VM, and takes away everything that the sandbox owns.
    pub async fn destroy(&self) {
        self.lent.guest.end().await;
        let dir = self.lent.host.journal.path().to_owned();
        // On a thread: processes and cgroups are waited for.
        let unwinding = tokio::task::spawn_blocking(move || unwind::unwind_within(unwind::DEADLINE, &dir));
        let Unwound { result, due } = match unwinding.await {
            Ok(unwound) => unwound,
            Err(error) => return tracing::error!(%error, "clean up"),
        };
        if let Err(error) = result {
            tracing::error!(error = chain(&error), "clean up");
        }
        due.run(&self.lent.host.hooks).await;
    }

    /// Takes an id for a container that is about to be made.
    fn reserve(&self, id: &str) -> Result<(), container::Error> {
        let mut containers = self.containers();
        if containers.contains_key(id) {
            return Err(container::Error::AlreadyExists { what: "container", id: id.into() });
        }
        containers.insert(id.to_owned(), Slot::Reserved);
        Ok(())
    }

    /// The disks that are a container's: all are the first one's.
    fn disks_of(&self, container: &str) -> &[Disk] {
        if container == self.identity.id { &self.lent.host.disks } else { &[] }
    }

    /// What a container is lent. containerd does not know the pause container that a pod's sandbox has made, and hears
    /// nothing of it.
    fn lent_to(&self, id: &str) -> Lent {
        let mut lent = self.lent.clone();
        if lent.pod_files.is_some() && id == self.identity.id {
            lent.publisher = Publisher::to_nobody();
        }
        lent
    }

    /// Kills all containers, and ends the VM once they have left it. They stay until they are deleted.
    pub async fn stop(&self) {
        let containers = self.all();
        let stopping: Vec<_> = containers
            .into_iter()
            .map(|container| {
                tokio::spawn(async move {
                    // Its end is published then. An end that the kernel holds up is not waited for.
                    if let Err(error) = container.kill_init(true).await {
                        tracing::warn!(container = container.id, error = chain(&error), "kill");
                    }
                    // Its file systems are unmounted in the guest before the VM ends.
                    container.leave_guest().await;
                })
            })
            .collect();
        for stopped in stopping {
            drop(stopped.await);
        }
        self.lent.guest.end().await;
    }

    /// What the sandbox uses on the host.
    pub fn metrics(&self) -> Metrics {
        self.lent.host.cgroup.as_ref().map(Cgroup::metrics).unwrap_or_default()
    }

    /// The containers that are there, as a new one's spec may name them.
    fn peers(&self) -> Peers {
        self.all().iter().map(|container| (container.pid, container.id.clone())).collect()
    }

    /// Whether this container has not been removed.
    fn has(&self, container: &Arc<Container>) -> bool {
        self.containers()
            .get(&container.id)
            .and_then(Slot::container)
            .is_some_and(|known| Arc::ptr_eq(known, container))
    }

    /// A container is about to be removed. True if it is the last: none is there or being made.
    fn leave(&self, container: &Arc<Container>) -> bool {
        let mut containers = self.containers();
        containers.insert(container.id.clone(), Slot::Leaving(container.clone()));
        containers.values().all(|slot| matches!(slot, Slot::Leaving(_)))
    }

    /// Forgets a container, or gives its reserved id back.
    fn remove(&self, id: &str) {
        self.containers().remove(id);
    }

    /// Aborts a creation in progress if this is the only container, so that deleting it does not wait for a guest that
    /// does not boot or does not answer.
    fn abandon(&self, init: &Process) {
        if init.transition.try_lock().is_err() && self.containers().len() == 1 {
            self.lent.guest.agent.down("the container was deleted while it was created");
        }
    }

    /// All containers that are there.
    fn all(&self) -> Vec<Arc<Container>> {
        self.containers().values().filter_map(Slot::container).cloned().collect()
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        lock(&self.containers)
    }
}
