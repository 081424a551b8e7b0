//! Makes a container that is ready to be started: on the host, then in the guest.
//!
//! On the host each step has an action that undoes it ([`Undo`]), which [`on_host`] runs if a later step fails:
//!
//! | step | undone by |
//! | --- | --- |
//! | mount the root file system and volumes ([`mount_files`]) | [`remove_files`] |
//! | start the anchor | its end |
//! | run prestart and createRuntime hooks | poststop hooks ([`Container::finish_hooks`]) |
//!
//! In the guest there is a container by then, and whoever deletes it ends what it has:
//!
//! | step | undone by |
//! | --- | --- |
//! | open the client's streams, connect the guest's | closing them ([`ClientEnds::with`](stdio::ClientEnds::with)) |
//! | make the container in the guest | [`Container::leave_guest`] |
//!
//! A container that has run ends in another order: the runtime spec has poststop hooks after all else is gone. So its
//! end is in [`delete`](super::delete), and these actions are for creations only.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
};

use containerd_shim_protos::api::CreateTaskRequest;
use nix::unistd::Pid;
use oci_spec::runtime::ContainerState;
use vz_proto::CreateContainerRequest;
use vz_sys::{error::chain, rate::Limit, sync::lock};

use super::{
    Container, Error, Lent, PodFiles, Process, copyup,
    peers::Peers,
    plan::{self, Plan},
    start::connect_streams,
    stdio::{self, Stdio},
    undo::Undo,
};
use crate::{
    guest::{self, follow},
    host::{
        self, Host,
        anchor::Anchor,
        disks::{self, Disk},
        etc_files::{EtcFiles, Source},
        hooks::{self, Context},
        journal::Resource,
        mount_watch,
        offload::{self, Doing},
        oom::Score,
        share::ReadOnly,
    },
    spec,
};

/// Events of a container's lack of memory in ten seconds. Who listens sets a flag.
const OUT_OF_MEMORY: u32 = 1;

/// What the host's file systems have been asked for.
struct Files {
    plan: Plan,
    /// The root file system for the anchor.
    rootfs: OwnedFd,
    /// Files that are followed when their owner replaces them.
    etc_files: Vec<Source>,
    score: Score,
}

/// Makes the host's side of a container: root file system, volumes, anchor, hooks. `disks` are those of the VM's disks
/// that are the container's, `peers` the other containers of the sandbox. Returns the container, and the spec that the
/// guest gets. After a failure nothing is left.
pub async fn on_host(
    lent: &Lent,
    request: &CreateTaskRequest,
    disks: &[Disk],
    peers: Peers,
) -> Result<(Arc<Container>, Vec<u8>), Error> {
    let mut undo = Undo::default();
    let made = host_side(lent, request, disks, peers, &mut undo).await;
    let report = |step, error| {
        tracing::error!(container = request.id, step, error = chain(&error), "undo create");
    };
    undo.settle(made, report).await
}

/// Mounts the root file system and the volumes. Each step may hang if a file system does.
fn mount_files(
    host: &Host,
    request: &CreateTaskRequest,
    disks: &[Disk],
    peers: &Peers,
    pod_files: Option<&PodFiles>,
    doing: &Doing,
) -> Result<Files, Error> {
    let bundle = Path::new(&request.bundle);
    doing.now(format!("read the spec in {}", bundle.display()));
    let mut spec = spec::read(bundle)?;
    if let Some(files) = pod_files.filter(|_| !spec::is_pod(&spec)) {
        files.complete(&mut spec);
    }
    let score = Score::of(&spec)?;
    host.network.check(&spec)?;
    let root = spec.root().as_ref().map(|root| bundle.join(root.path())).unwrap_or_default();
    doing.now("look at the sources of mounts");
    disks::refuse_others(&spec, disks)?;
    let looking = |source: &Path| doing.now(format!("look at {}", source.display()));
    let mut plan = plan::plan(spec, &request.id, disks, peers, &looking)?;
    let place = host.share.place(&request.id)?;
    doing.now("mount the root file system");
    place.mount_rootfs(&request.rootfs, &root)?;
    copyup::settle(&mut plan.guest, place.rootfs()?.as_fd())?;
    let mut etc_files = Vec::new();
    // Each source's descriptor is closed as soon as it is bound: it would keep the host from unmounting.
    for bind in plan.binds.drain(..) {
        doing.now(format!("bind {}", bind.source.display()));
        let bound = place.bind(&bind)?;
        if bind.is_etc_file {
            etc_files.push(Source { path: bind.source, bound, readonly: bind.readonly != ReadOnly::No });
        }
    }
    Ok(Files { plan, rootfs: place.rootfs_tree()?, etc_files, score })
}

/// Takes a container's mounts away.
pub async fn remove_files(host: Arc<Host>, id: String) -> Result<(), host::Error> {
    let deadline = host.files_deadline;
    offload::run(deadline, move |doing| {
        doing.now(format!("unmount the file systems of container {id}"));
        Ok(host.share.remove(&id)?)
    })
    .await
}

/// The steps, each of which pushes to `undo` what undoes it.
async fn host_side(
    lent: &Lent,
    request: &CreateTaskRequest,
    disks: &[Disk],
    peers: Peers,
    undo: &mut Undo,
) -> Result<(Arc<Container>, Vec<u8>), Error> {
    let (host, bundle) = (&lent.host, Path::new(&request.bundle));
    undo.push("mount files", remove_files(Arc::clone(host), request.id.clone()));
    let Files { plan, rootfs, etc_files, score } = {
        let (host, request, disks) = (Arc::clone(host), request.clone(), disks.to_vec());
        let pod_files = lent.pod_files.clone();
        offload::run(host.files_deadline, move |doing| {
            mount_files(&host, &request, &disks, &peers, pod_files.as_deref(), doing)
        })
        .await?
    };
    mount_watch::start(&host.share, host.files_deadline);
    for field in &plan.dropped {
        tracing::info!(container = request.id, field, "has no meaning in a vm, is left out");
    }
    let etc_files = EtcFiles::keep(etc_files).await.unwrap_or_else(|error| {
        // The host's limit of inotify instances, most likely (fs.inotify.max_user_instances). Writing in place works.
        tracing::warn!(container = request.id, %error, "files that replace hosts, resolv.conf or hostname are not followed");
        None
    });
    let admit = |pid: Pid| host.admit(pid, score);
    let anchor = Anchor::start(&request.id, rootfs, host.network.netns(), &admit).await?;
    let (pid, hold) = (anchor.pid(), anchor.hold());
    let anchor = Arc::new(Mutex::new(Some(anchor)));
    undo.push("start anchor", drop_anchor(Arc::clone(&anchor)));
    host.journal.process("anchor", pid)?;
    let hold = hold.map_err(host::anchor::Error::Spawn)?;
    let context = Context {
        id: request.id.clone(),
        bundle: bundle.to_owned(),
        pid,
        annotations: spec::annotations(&plan.guest),
        hold: Some(Arc::new(hold)),
        launch: host.hooks.clone(),
    };
    let guest_spec = spec::write("spec", &plan.guest)?;
    let mut poststop = None;
    if plan.hooks.poststop().as_ref().is_some_and(|hooks| !hooks.is_empty()) {
        let resource = Resource::Poststop { id: request.id.clone(), bundle: bundle.to_owned() };
        host.journal.made(resource.clone())?;
        poststop = Some(resource);
    }
    let stdio = Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let container = Arc::new(Container {
        id: context.id.clone(),
        bundle: context.bundle.clone(),
        init: Arc::new(Process::new("", stdio, None)),
        hooks: plan.hooks,
        poststop,
        pid: pid.unsigned_abs(),
        context,
        deletion: tokio::sync::Mutex::default(),
        lent: lent.clone(),
        disks: disks.to_vec(),
        anchor,
        out_of_memory: Limit::new(OUT_OF_MEMORY),
        _etc_files: etc_files,
        execs: Mutex::default(),
        forgetting: Mutex::default(),
    });
    undo.push("run hooks", finish_hooks(Arc::clone(&container)));
    container.creation_hooks().await?;
    Ok((container, guest_spec))
}

/// Ends an anchor without waiting for it.
async fn drop_anchor(anchor: Arc<Mutex<Option<Anchor>>>) -> Result<(), host::Error> {
    drop(lock(&anchor).take());
    Ok(())
}

async fn finish_hooks(container: Arc<Container>) -> Result<(), host::Error> {
    container.finish_hooks().await;
    Ok(())
}

impl Container {
    async fn creation_hooks(&self) -> Result<(), hooks::Error> {
        let (journal, state) = (&self.lent.host.journal, ContainerState::Creating);
        #[allow(deprecated)]
        let prestart = self.hooks.prestart().as_ref();
        hooks::run("prestart", prestart, &self.context, state, journal).await?;
        hooks::run("createRuntime", self.hooks.create_runtime().as_ref(), &self.context, state, journal).await
    }

    /// Makes the guest's side: streams, and the container itself from its `spec`.
    pub async fn create_in_guest(&self, spec: Vec<u8>) -> Result<(), Error> {
        let (host, guest) = (&self.lent.host, &self.lent.guest);
        let stdio = &self.init.stdio;
        let surroundings = host.hooks.surroundings.as_deref();
        let ends = stdio::open(stdio, &self.id, &self.lent.namespace, surroundings).await?;
        let connected = async {
            let news = host.network.news(&host.journal).await.map_err(host::Error::from)?;
            let network = news.description().map_err(host::Error::from)?;
            guest.agent.booted(guest.deadlines.boot).await?;
            let (tokens, streams) = connect_streams(guest, stdio).await?;
            Ok::<_, guest::Error>((news, network, tokens, streams))
        };
        let (ends, (news, network, tokens, streams)) = ends.with(connected).await?;
        let request = CreateContainerRequest {
            container_id: self.id.clone(),
            spec,
            stdio: Some(tokens).into(),
            network,
            disks: self.disks.iter().map(Disk::to_agent).collect(),
            ..Default::default()
        };
        self.init.set_copies(ends.connect(streams, stdio.terminal));
        self.init.said.ask();
        guest.agent.create_container(request).await?;
        news.done();
        Ok(follow::start(host, guest)?)
    }
}
