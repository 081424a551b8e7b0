//! How a container comes to be and is taken away, step by step, with one way back from each step.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::api::CreateTaskRequest;
use nix::{sys::signal::Signal, unistd::Pid};
use oci_spec::runtime::ContainerState;
use tokio::net::UnixStream;
use ttrpc::Code;
use vz_proto::{
    AgentClient, ContainerRequest, CreateContainerRequest, ExecProcessRequest, STREAM_PORT, SignalProcessRequest,
    Stdio as AgentStdio, frame,
};

use crate::{
    container::{
        Container, Exit, Process, copyup,
        spec::{self, Plan, ReadOnly},
        stdio::{self, Guest, Stdio},
    },
    error::{Error, chain},
    host::{
        anchor::Anchor,
        disks::{self, Disk},
        etc_files::{Names, Source},
        hooks::{self, Context},
        journal::Resource,
        mirror, network,
        offload::{self, Doing},
        oom::Score,
    },
    sandbox::{Sandbox, read_spec},
    service::process_request,
};

/// Makes a container that is ready to be started. After a failure nothing of it is left.
pub async fn create(sandbox: &Arc<Sandbox>, request: &CreateTaskRequest) -> Result<Arc<Container>, Error> {
    if !request.checkpoint.is_empty() {
        return Err(Error::Unimplemented("restoring a checkpoint"));
    }
    sandbox.reserve(&request.id)?;
    match host_side(sandbox, request).await {
        Ok((container, guest_spec)) => {
            let container = Arc::new(container);
            sandbox.insert(container.clone());
            // Nothing of its init is published before it has been created; who waits for the end of a creation that
            // fails finds nothing of it.
            let _transition = container.init.transition.lock().await;
            let made = guest_side(sandbox, &container, guest_spec).await;
            if made.is_err() {
                undo(sandbox, &request.id).await;
            }
            made.map(|()| container.clone())
        }
        Err(error) => {
            undo(sandbox, &request.id).await;
            Err(error)
        }
    }
}

async fn undo(sandbox: &Arc<Sandbox>, id: &str) {
    match sandbox.container(id) {
        Ok(container) => {
            // Whoever waits for it already is told that nothing will come.
            container.init.set_stopped(Exit::now(255));
            if let Err(error) = delete(sandbox, &container, || {}).await {
                tracing::error!(container = id, error = chain(&error), "undo create");
            }
        }
        Err(_) => {
            if let Err(error) = remove_files(sandbox, id).await {
                tracing::error!(container = id, error = chain(&error), "undo create");
            }
            sandbox.remove(id);
        }
    }
}

/// What the host's file systems have been asked for.
struct Files {
    plan: Plan,
    /// The root file system for the anchor.
    rootfs: OwnedFd,
    /// Files that are followed when their owner replaces them.
    names: Vec<Source>,
    score: Score,
}

/// Mounts the root file system and the volumes. Each step may hang where a file system does.
fn mount_files(sandbox: &Sandbox, request: &CreateTaskRequest, doing: &Doing) -> Result<Files, Error> {
    let bundle = Path::new(&request.bundle);
    doing.now(format!("read the spec in {}", bundle.display()));
    let spec = read_spec(bundle)?;
    let score = Score::of(&spec)?;
    sandbox.network.check(&spec)?;
    let root = spec.root().as_ref().map(|root| bundle.join(root.path())).unwrap_or_default();
    let disks = sandbox.disks_of(&request.id);
    doing.now("look at the sources of mounts");
    disks::refuse_others(&spec, disks)?;
    let looking = |source: &Path| doing.now(format!("look at {}", source.display()));
    let mut plan = spec::plan(spec, &request.id, disks, &looking)?;
    let place = sandbox.share.place(&request.id)?;
    doing.now("mount the root file system");
    place.mount_rootfs(&request.rootfs, &root)?;
    copyup::settle(&mut plan.guest, place.rootfs()?.as_fd())?;
    let mut names = Vec::new();
    // Each source's descriptor is closed as soon as it is bound: it would keep the host from unmounting.
    for bind in plan.binds.drain(..) {
        doing.now(format!("bind {}", bind.source.display()));
        let bound = place.bind(&bind)?;
        if bind.is_name {
            names.push(Source { path: bind.source, bound, readonly: bind.readonly != ReadOnly::No });
        }
    }
    Ok(Files { plan, rootfs: place.rootfs_tree()?, names, score })
}

/// Takes a container's mounts away.
async fn remove_files(sandbox: &Arc<Sandbox>, id: &str) -> Result<(), Error> {
    let (sandbox, id) = (Arc::clone(sandbox), id.to_owned());
    let deadline = sandbox.files_deadline();
    offload::run(deadline, move |doing| {
        doing.now(format!("unmount the file systems of container {id}"));
        Ok(sandbox.share.remove(&id)?)
    })
    .await
}

/// Everything on the host: root file system, volumes, anchor, hooks.
async fn host_side(sandbox: &Arc<Sandbox>, request: &CreateTaskRequest) -> Result<(Container, Vec<u8>), Error> {
    let bundle = Path::new(&request.bundle);
    let Files { plan, rootfs, names, score } = {
        let (sandbox, request) = (Arc::clone(sandbox), request.clone());
        offload::run(sandbox.files_deadline(), move |doing| mount_files(&sandbox, &request, doing)).await?
    };
    mirror::watch(sandbox);
    let annotations = spec::annotations(&plan.guest);
    for field in &plan.dropped {
        tracing::info!(container = request.id, field, "has no meaning in a vm, is left out");
    }
    let names = Names::keep(names).await.unwrap_or_else(|error| {
        // The host's limit of inotify instances, most likely (fs.inotify.max_user_instances). Writing in place works.
        tracing::warn!(container = request.id, %error, "files that replace hosts, resolv.conf or hostname are not followed");
        None
    });
    let admit = |pid: Pid| {
        score.set(pid)?;
        sandbox.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.add(pid.as_raw()).map_err(std::io::Error::other))
    };
    let anchor = Anchor::start(&request.id, rootfs, sandbox.network.netns(), &admit).await?;
    sandbox.journal.process("anchor", anchor.pid())?;
    let hold = anchor.hold().map_err(|source| Error::Anchor(crate::host::anchor::Error::Spawn(source)))?;
    let context = Context {
        id: request.id.clone(),
        bundle: bundle.to_owned(),
        pid: anchor.pid(),
        annotations,
        hold: Some(Arc::new(hold)),
        launch: sandbox.hooks.clone(),
    };
    let mut poststop = None;
    if plan.hooks.poststop().as_ref().is_some_and(|hooks| !hooks.is_empty()) {
        let resource = Resource::Poststop { id: request.id.clone(), bundle: bundle.to_owned() };
        sandbox.journal.made(resource.clone())?;
        poststop = Some(resource);
    }
    let stdio = Stdio {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    let init = Arc::new(Process::new("", stdio, None));
    let container = Container::new(init, anchor, context, plan.hooks, poststop, names);
    let state = ContainerState::Creating;
    let ran = async {
        #[allow(deprecated)]
        let prestart = container.hooks.prestart().as_ref();
        hooks::run("prestart", prestart, &container.context, state, &sandbox.journal).await?;
        let hooks = container.hooks.create_runtime().as_ref();
        hooks::run("createRuntime", hooks, &container.context, state, &sandbox.journal).await
    };
    if let Err(error) = ran.await {
        finish_hooks(sandbox, &container).await;
        return Err(error.into());
    }
    let guest = serde_json::to_vec(&plan.guest)
        .map_err(|e| Error::Message { what: "write the guest's spec", source: Box::new(e) })?;
    Ok((container, guest))
}

/// Everything in the guest: streams and the container itself.
async fn guest_side(sandbox: &Arc<Sandbox>, container: &Container, spec: Vec<u8>) -> Result<(), Error> {
    let id = &container.id;
    let stdio = &container.init.stdio;
    let host = stdio::open(stdio, id, &sandbox.identity.namespace, sandbox.surroundings()).await?;
    let connected = async {
        let news = sandbox.network.news(&sandbox.journal).await?;
        let network = news.description()?;
        sandbox.agent.booted(sandbox.boot_deadline()).await?;
        let (tokens, guest) = connect_streams(sandbox, stdio).await?;
        Ok::<_, Error>((news, network, tokens, guest))
    };
    let (news, network, tokens, guest) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            host.close().await;
            return Err(error);
        }
    };
    let disks = sandbox.disks_of(id).iter().map(Disk::to_agent).collect();
    let stdio = Some(tokens).into();
    let request =
        CreateContainerRequest { container_id: id.clone(), spec, stdio, network, disks, ..Default::default() };
    container.init.set_copies(host.connect(guest, container.init.stdio.terminal));
    container.init.said.ask();
    let call = async |agent: AgentClient, context, request| agent.create_container(context, &request).await;
    sandbox.agent.ask("create", request, call).await?;
    news.done();
    sandbox.network.watch(sandbox)?;
    Ok(())
}

/// Starts a created container's init, in the network that it has by now.
pub async fn start_init(sandbox: &Arc<Sandbox>, container: &Container) -> Result<(), Error> {
    network::update(sandbox).await?;
    if let Some(cgroup) = &sandbox.cgroup {
        cgroup.limit_cpu()?;
    }
    let request = ContainerRequest { container_id: container.id.clone(), ..Default::default() };
    let call = async |agent: AgentClient, context, request| agent.start_container(context, &request).await;
    sandbox.agent.ask("start", request, call).await.map(drop)
}

/// Runs a started container's poststart hooks; a failure is logged, as the runtime spec says.
pub async fn poststart(sandbox: &Sandbox, container: &Container) {
    let hooks = container.hooks.poststart().as_ref();
    if let Err(error) =
        hooks::run("poststart", hooks, &container.context, ContainerState::Running, &sandbox.journal).await
    {
        tracing::warn!(container = container.id, error = chain(&error), "poststart hook");
    }
}

/// Starts an exec process. After a failure nothing of it is left in the guest, or will be soon, and its streams are
/// closed.
pub async fn start_exec(sandbox: &Arc<Sandbox>, container: &Arc<Container>, process: &Process) -> Result<(), Error> {
    let mut spec = process.spec.clone().ok_or_else(|| Error::Invalid("exec has no process".into()))?;
    spec.set_terminal(Some(process.stdio.terminal));
    let spec = serde_json::to_vec(&spec::exec_process(spec))
        .map_err(|e| Error::Message { what: "write the guest's process", source: Box::new(e) })?;
    let host = stdio::open(&process.stdio, &container.id, &sandbox.identity.namespace, sandbox.surroundings()).await?;
    let (stdio, guest) = match connect_streams(sandbox, &process.stdio).await {
        Ok(connected) => connected,
        Err(error) => {
            host.close().await;
            return Err(error);
        }
    };
    let request = ExecProcessRequest {
        container_id: container.id.clone(),
        exec_id: process.exec_id.clone(),
        process: spec,
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    process.set_copies(host.connect(guest, process.stdio.terminal));
    process.said.ask();
    let call = async |agent: AgentClient, context, request| agent.exec_process(context, &request).await;
    let started = sandbox.agent.ask("exec", request, call).await;
    if let Err(error) = &started {
        process.said.withdraw();
        if matches!(error, Error::AgentTimeout { .. } | Error::AgentAway { .. } | Error::AgentLost { .. }) {
            let (sandbox, of, id) = (sandbox.clone(), container.clone(), process.exec_id.clone());
            container.forget_exec(&process.exec_id, async move { purge(&sandbox, &of, &id).await });
        }
        process.close().await;
    }
    started.map(drop)
}

/// Removes an exec process that the guest may have begun, and did not say so. What the guest does not do ends with the
/// container.
async fn purge(sandbox: &Sandbox, container: &Container, exec_id: &str) {
    let (begun, deadline) = (Instant::now(), Duration::from_secs(sandbox.config.timeouts.agent_s));
    let ended = loop {
        let kill = SignalProcessRequest {
            container_id: container.id.clone(),
            exec_id: exec_id.to_owned(),
            signal: Signal::SIGKILL as u32,
            ..Default::default()
        };
        let call = async |agent: AgentClient, context, request| agent.signal_process(context, &request).await;
        match sandbox.agent.ask_within(sandbox.kill_deadline(), "kill", kill, call).await {
            // It has ended, or does not run yet.
            Ok(_) | Err(Error::Agent { code: Code::NOT_FOUND, .. }) => {}
            Err(error) => break Err(error),
        }
        let call = async |agent: AgentClient, context, request| agent.wait_process(context, &request).await;
        let wait = process_request(&container.id, exec_id);
        match sandbox.agent.ask_within(sandbox.kill_deadline(), "wait", wait, call).await {
            // It was not there yet when it was killed.
            Err(Error::AgentTimeout { .. }) if begun.elapsed() < deadline => {}
            other => break other.map(drop),
        }
    };
    match ended {
        Ok(()) => forget(sandbox, container, exec_id).await,
        Err(Error::Sandbox(_) | Error::Agent { code: Code::NOT_FOUND, .. }) => {}
        Err(error) => tracing::warn!(
            container = container.id,
            exec = exec_id,
            error = chain(&error),
            "the guest may have started a process whose start has failed"
        ),
    }
}

/// Connects a stream to the guest for each that is wanted, under a token of its own; all at once, as each takes a way to the
/// guest and back.
async fn connect_streams(sandbox: &Sandbox, stdio: &Stdio) -> Result<(AgentStdio, Guest), Error> {
    let connect = async |wanted: bool| match wanted {
        true => connect_stream(sandbox).await.map(|(token, stream)| (token, Some(stream))),
        false => Ok(Default::default()),
    };
    let (stdin, stdout, stderr) = stdio.wanted();
    let (stdin, stdout, stderr) = tokio::try_join!(connect(stdin), connect(stdout), connect(stderr))?;
    let agent = AgentStdio {
        stdin: stdin.0,
        stdout: stdout.0,
        stderr: stderr.0,
        terminal: stdio.terminal,
        ..Default::default()
    };
    Ok((agent, Guest { stdin: stdin.1, stdout: stdout.1, stderr: stderr.1 }))
}

async fn connect_stream(sandbox: &Sandbox) -> Result<(String, UnixStream), Error> {
    let failed =
        |source: Box<dyn std::error::Error + Send + Sync>| Error::Message { what: "open stdio stream", source };
    let token = token().map_err(|e| failed(e.into()))?;
    let deadline = Duration::from_secs(sandbox.config.timeouts.agent_s);
    let mut stream = sandbox.vmm.dial(STREAM_PORT, deadline).await?;
    // Fits into the socket's buffer, whether the guest reads or not.
    frame::write_token(&mut stream, &token).await.map_err(|e| failed(e.into()))?;
    Ok((token, stream))
}

/// A name that nobody in the guest can guess.
fn token() -> std::io::Result<String> {
    use std::io::Read;
    let mut bytes = [0u8; frame::TOKEN_LEN / 2];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Forgets an ended process in the guest, where there is a guest still. For a container the guest has as long as for a
/// SIGKILL, since its client waits; one that has disks writes them back then, and may take as long as for any request.
pub async fn forget(sandbox: &Sandbox, container: &Container, exec_id: &str) {
    let is_waited_for = exec_id.is_empty() && sandbox.disks_of(&container.id).is_empty();
    let usual = Duration::from_secs(sandbox.config.timeouts.agent_s);
    let deadline = if is_waited_for { sandbox.kill_deadline() } else { usual };
    let call = async |agent: AgentClient, context, request| agent.delete_process(context, &request).await;
    let request = process_request(&container.id, exec_id);
    match sandbox.agent.ask_within(deadline, "delete", request, call).await {
        Ok(_) | Err(Error::Sandbox(_) | Error::Agent { code: Code::NOT_FOUND, .. }) => {}
        Err(error) => tracing::warn!(container = container.id, exec = exec_id, error = chain(&error), "forget process"),
    }
}

/// Takes away a container, ended or never started: in the guest, then on the host. With the last one ends the VM.
///
/// This happens once: whoever asks meanwhile waits, and is told that the container is not found. A step that fails does
/// not keep the others from being taken; the first failure is returned, and the journal has what is left.
pub async fn delete(sandbox: &Arc<Sandbox>, container: &Arc<Container>, publish: impl FnOnce()) -> Result<(), Error> {
    let _deletion = container.deletion.lock().await;
    if !sandbox.has(container) {
        return Err(Error::NotFound { what: "container", id: container.id.clone() });
    }
    forget(sandbox, container, "").await;
    let closing: Vec<_> =
        container.processes().into_iter().map(|process| tokio::spawn(async move { process.close().await })).collect();
    for closed in closing {
        drop(closed.await);
    }
    container.end_anchor().await;
    let mut results = Vec::new();
    if sandbox.leave(container) {
        sandbox.end_vm().await;
        results.push(sandbox.network.undo(&sandbox.journal).map_err(Error::from));
    }
    if let Err(error) = remove_files(sandbox, &container.id).await {
        // They end with the last process of the sandbox in any case.
        tracing::error!(container = container.id, error = chain(&error), "take away mounts");
    }
    finish_hooks(sandbox, container).await;
    sandbox.remove(&container.id);
    publish();
    let mut failures = results.into_iter().filter_map(Result::err);
    let first = failures.next();
    for error in failures {
        tracing::error!(container = container.id, error = chain(&error), "delete");
    }
    first.map_or(Ok(()), Err)
}

async fn finish_hooks(sandbox: &Sandbox, container: &Container) {
    let Some(resource) = container.poststop.clone() else { return };
    hooks::poststop(&container.id, &container.bundle, Some(&sandbox.journal), &sandbox.hooks).await;
    if let Err(error) = sandbox.journal.gone(resource) {
        tracing::error!(container = container.id, error = chain(&error), "write journal");
    }
}
