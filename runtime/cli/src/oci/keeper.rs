//! The keeper: one process on the host for each process of a container, which stands for it.
//!
//! Callers of a runtime wait for the pid that `create` or `exec` names, take its exit status for the process's, signal
//! it, and look up namespaces and the cgroup by it. The keeper is that pid: the child of whoever called (or of their
//! subreaper), in the namespaces and the cgroup of the container's anchor, ended with the container's own status.
//!
//! The keeper of the init is the parent of the sandbox's daemon too, which the kernel kills when the keeper ends, and
//! with the daemon everything below it. So nothing of a container runs on without its keeper, whatever killed that; and
//! what is left then is in the sandbox's journal, which `delete` replays.

use std::{
    env,
    ffi::{CString, OsString},
    fs::File,
    io::{self, BufRead, Read, Seek},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixListener},
    },
    path::PathBuf,
    process::ExitCode,
    rc::Rc,
    time::SystemTime,
};

use nix::{
    sched::CloneFlags,
    sys::memfd::{MFdFlags, memfd_create},
    unistd::{UnlinkatFlags, unlinkat},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use vz_state::READY;
use vz_sys::{
    channel::Channel,
    fork::KILLED,
    process::{Command, Identity, Process, inherited_fd, own_oom_score, set_oom_score},
};

use super::{
    error::Error,
    place,
    spec::Bundle,
    state::{Dir, State, replace},
    stdio::{Copies, Stdio},
    task::{Task, runtime},
};
use crate::check::chain;

/// The word by which `vz` is told to be a keeper.
pub const VERB: &str = "keep";
/// Descriptor of its channel to the command that starts it.
const CHANNEL_FD: i32 = 3;
/// What it says once the process is there.
const DONE: &[u8] = b"done";
/// Most bytes of an error that it says.
const MOST: usize = 64 * 1024;

/// What there is to keep.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// `--root`.
    pub root: PathBuf,
    /// The container.
    pub id: String,
    /// Which process.
    pub what: What,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether the command that starts it ends before the process does.
    pub detached: bool,
}

/// A process of a container.
#[derive(Debug, Serialize, Deserialize)]
pub enum What {
    /// Its first.
    Init {
        /// More in the daemon's log.
        debug: bool,
        /// `--kernel-profile`.
        kernel_profile: Option<String>,
        /// Whether it is started at once.
        start: bool,
    },
    /// One more.
    Exec {
        /// As in the specification.
        process: serde_json::Value,
    },
}

/// Starts a keeper with the caller's standard streams, and `terminal` if it has one of its own, and waits until its
/// process is there. It is killed when the caller ends before that; and at any time, if it is not detached.
pub fn start(job: &Job, terminal: Option<OwnedFd>) -> Result<Process, Error> {
    let said = || -> io::Result<(Process, Channel)> {
        let (ours, theirs) = Channel::pair()?;
        let text = |text: OsString| CString::new(text.as_bytes()).map_err(io::Error::from);
        let env: Result<Vec<_>, _> = env::vars_os()
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                text(name)
            })
            .collect();
        let process = Command {
            program: c"/proc/self/exe".into(),
            args: vec![c"vz".into(), text(VERB.into())?, text(job.id.clone().into())?],
            env: env?,
            fds: vec![(theirs.as_fd(), CHANNEL_FD)],
            namespaces: CloneFlags::empty(),
            outlives_parent: false,
        }
        .spawn()?;
        let mut file = File::from(memfd_create("job", MFdFlags::MFD_CLOEXEC)?);
        serde_json::to_writer(&file, job)?;
        file.rewind()?;
        let mut fds = vec![file.as_fd()];
        fds.extend(terminal.as_ref().map(AsFd::as_fd));
        ours.send(b"job", &fds)?;
        Ok((process, ours))
    };
    let (process, channel) = said().map_err(Error::step("start keeper process"))?;
    drop(terminal);
    match channel.recv().map_err(Error::step("wait for keeper process"))? {
        Some(message) if message.bytes == DONE => Ok(process),
        message => {
            let status = process.wait().map_err(Error::step("wait for keeper process"))?;
            Err(match message {
                Some(message) => Error::Said(String::from_utf8_lossy(&message.bytes).into_owned()),
                None => Error::Died { what: "keeper process", status: format!("{status:?}") },
            })
        }
    }
}

/// The keeper's process.
pub fn main() -> ExitCode {
    let Ok(channel) = inherited_fd(CHANNEL_FD).map(Channel::from_fd) else { return ExitCode::FAILURE };
    match keep(&channel) {
        Ok(status) => ExitCode::from(u8::try_from(status & 0xff).unwrap_or(u8::MAX)),
        Err(error) => {
            let mut text = chain(&error).into_bytes();
            text.truncate(MOST);
            // Whoever started us may be gone; there is nobody else to tell.
            drop(channel.send(&text, &[]));
            ExitCode::FAILURE
        }
    }
}

fn keep(channel: &Channel) -> Result<u32, Error> {
    let receive = Error::step::<io::Error>;
    let message = channel.recv().map_err(receive("receive job"))?;
    let mut fds = message.map(|message| message.fds.into_iter()).unwrap_or_default();
    let mut text = Vec::new();
    if let Some(job) = fds.next() {
        File::from(job).read_to_end(&mut text).map_err(receive("receive job"))?;
    }
    let job: Job = serde_json::from_slice(&text).map_err(|source| Error::Json { path: "job".into(), source })?;
    // A session of its own: keys that are meant for the caller's do not reach what is below.
    nix::unistd::setsid().map_err(Error::step("begin session"))?;
    let console = fds.next();
    if let Some(console) = &console {
        // Its hangup and its changes of size are told by signals.
        vz_sys::tty::set_controlling(console).map_err(Error::step("take terminal"))?;
    }
    let (stdio, terminal) = match &console {
        _ if !job.terminal => (Stdio::inherited()?, None),
        Some(console) => (Stdio::terminal(duplicate(console)?, duplicate(console)?)?, Some(duplicate(console)?)),
        None => {
            let (keyboard, screen) = (duplicate(io::stdin())?, duplicate(io::stdout())?);
            (Stdio::terminal(keyboard, screen)?, Some(duplicate(io::stdin())?))
        }
    };
    drop(console);
    let dir = Dir::open(&job.root, &job.id)?;
    let process = Kept { channel, dir: Rc::new(dir), terminal, detached: job.detached };
    match job.what {
        What::Init { debug, kernel_profile, start } => process.init(stdio, debug, kernel_profile.as_deref(), start),
        What::Exec { process: spec } => process.exec(stdio, &spec),
    }
}

fn duplicate(terminal: impl AsFd) -> Result<OwnedFd, Error> {
    terminal.as_fd().try_clone_to_owned().map_err(Error::step("duplicate terminal"))
}

/// What a keeper has while its process lives.
struct Kept<'c> {
    channel: &'c Channel,
    dir: Rc<Dir>,
    /// The terminal whose size is the process's.
    terminal: Option<OwnedFd>,
    detached: bool,
}

impl Kept<'_> {
    fn init(&self, stdio: Stdio, debug: bool, kernel_profile: Option<&str>, start: bool) -> Result<u32, Error> {
        let dir = &self.dir;
        let mut state = dir.read()?.ok_or_else(|| Error::Missing(dir.id().to_owned()))?;
        state.init = Some(Identity::this().map_err(Error::step("look up own process"))?);
        dir.write(&state)?;
        let execs = UnixListener::bind(dir.short("exec")).map_err(Error::at("listen on", dir.path().join("exec")))?;
        let _daemon = start_daemon(dir, &state, debug, kernel_profile)?;
        env::set_current_dir("/").map_err(Error::at("enter", "/"))?;
        let mounts = Bundle::read(&state.bundle)?.config.mounts.unwrap_or_default();
        let volumes = place::volumes(&mounts)?;
        runtime()?.block_on(async {
            let task = Task::connect(dir).await?;
            let signals = signals()?;
            let anchor = task.create(&state.bundle.to_string_lossy(), stdio.addresses()).await?;
            state.made = true;
            dir.write(&state)?;
            place::join(anchor, &volumes)?;
            let copies = stdio.begin()?;
            if start {
                task.start("").await?;
            }
            execs.set_nonblocking(true).map_err(Error::step("listen for exec processes"))?;
            let execs = tokio::net::UnixListener::from_std(execs).map_err(Error::step("listen for exec processes"))?;
            let local = tokio::task::LocalSet::new();
            local.spawn_local(watch_execs(execs, task.clone(), dir.clone()));
            local.run_until(self.until_the_end(&task, "", copies, signals)).await
        })
    }

    fn exec(&self, stdio: Stdio, spec: &serde_json::Value) -> Result<u32, Error> {
        let dir = &self.dir;
        let spec = serde_json::to_vec(spec).map_err(|source| Error::Json { path: "process".into(), source })?;
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let exec_id = format!("{}-{}", std::process::id(), since.as_nanos());
        let known = Identity::this().map_err(Error::step("look up own process"))?;
        runtime()?.block_on(async {
            let task = Task::connect(dir).await?;
            let signals = signals()?;
            // The container's keeper takes the process away once this connection ends, however that comes.
            let connect = Error::step::<io::Error>;
            let mut keeper =
                UnixStream::connect(dir.short("exec")).await.map_err(connect("connect to the container's keeper"))?;
            keeper
                .write_all(format!("{exec_id}\n").as_bytes())
                .await
                .map_err(connect("tell the container's keeper"))?;
            task.exec(&exec_id, spec, stdio.addresses()).await?;
            task.start(&exec_id).await?;
            let copies = stdio.begin()?;
            dir.note_exec(&exec_id, known)?;
            self.until_the_end(&task, &exec_id, copies, signals).await
        })
    }

    /// Tells the caller that the process is there, and passes on to it what comes, until it ends.
    async fn until_the_end(
        &self,
        task: &Task,
        exec_id: &str,
        copies: Copies,
        mut signals: mpsc::UnboundedReceiver<i32>,
    ) -> Result<u32, Error> {
        self.resize(task, exec_id).await;
        if self.detached {
            nix::sys::prctl::set_pdeathsig(None).map_err(Error::step("stay"))?;
        }
        self.channel.send(DONE, &[]).map_err(Error::step("tell the caller"))?;
        let end = task.wait(exec_id);
        tokio::pin!(end);
        let status = loop {
            tokio::select! {
                // No answer is its end too: the daemon has died, and nothing lives without it.
                status = &mut end => break status.unwrap_or(KILLED),
                Some(signal) = signals.recv() => match signal {
                    libc::SIGWINCH => self.resize(task, exec_id).await,
                    // A process that has just ended takes none.
                    signal => drop(task.kill(exec_id, signal.unsigned_abs(), false).await),
                },
            }
        };
        copies.finish();
        // The daemon ends with us. It answers in turn: this is the last answer, after those of all who wait for this
        // end.
        let _ = task.status().await;
        Ok(status)
    }

    async fn resize(&self, task: &Task, exec_id: &str) {
        let Some(terminal) = &self.terminal else { return };
        if let Ok(size) = vz_sys::tty::size(terminal)
            && size != (0, 0)
        {
            // One that is not started yet is told when it is.
            drop(task.resize(exec_id, size).await);
        }
    }
}

/// All signals that can be passed on.
fn signals() -> Result<mpsc::UnboundedReceiver<i32>, Error> {
    const PASSED_ON: [i32; 11] = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGTERM,
        libc::SIGCONT,
        libc::SIGTSTP,
        libc::SIGWINCH,
        libc::SIGIO,
    ];
    let (to, from) = mpsc::unbounded_channel();
    for number in PASSED_ON {
        let mut stream = signal(SignalKind::from_raw(number)).map_err(Error::step("catch signals"))?;
        let to = to.clone();
        tokio::spawn(async move { while stream.recv().await.is_some() && to.send(number).is_ok() {} });
    }
    Ok(from)
}

/// Takes away exec processes whose keepers have ended.
async fn watch_execs(listener: tokio::net::UnixListener, task: Task, dir: Rc<Dir>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (task, dir) = (task.clone(), dir.clone());
        tokio::task::spawn_local(async move {
            let mut stream = BufReader::new(stream);
            let mut exec_id = String::new();
            if stream.read_line(&mut exec_id).await.is_err() {
                return;
            }
            let exec_id = exec_id.trim_end();
            // Nothing more comes but its end.
            drop(stream.read_u8().await);
            // It has ended by itself most of the time; and one that was never added is not known.
            drop(task.kill(exec_id, libc::SIGKILL.unsigned_abs(), false).await);
            drop(task.forget(exec_id).await);
            let _ = unlinkat(&*dir, format!("exec-{exec_id}").as_str(), UnlinkatFlags::NoRemoveDir);
        });
    }
}

/// Starts the sandbox's daemon as a child that does not outlive this process, and waits until its VM is on the way.
fn start_daemon(dir: &Dir, state: &State, debug: bool, kernel_profile: Option<&str>) -> Result<Process, Error> {
    let socket = dir.path().join("task");
    let listener = UnixListener::bind(dir.short("task")).map_err(Error::at("listen on", &socket))?;
    let mut more = vec![("VZ_LOG_FILE", dir.path().join("shim.log").into_os_string())];
    if let Some(profile) = kernel_profile {
        let path = dir.path().join("config.toml");
        replace(&path, format!("linux_profile = \"{profile}\"\n").as_bytes())?;
        more.push(("VZ_CONFIG_PATH", path.into_os_string()));
    }
    // In the bundle, as containerd calls it; and without an address of containerd's.
    env::set_current_dir(&state.bundle).map_err(Error::at("enter", &state.bundle))?;
    let ours = ["TTRPC_ADDRESS", "VZ_LOG_FILE", "VZ_CONFIG_PATH"];
    let inherited = env::vars_os().filter(|(name, _)| !ours.iter().any(|ours| name == ours));
    let text = |text: &[u8]| CString::new(text).map_err(Error::step("write the daemon's command line"));
    let mut environment = Vec::new();
    for (name, value) in inherited.chain(more.into_iter().map(|(name, value)| (name.into(), value))) {
        environment.push(text(&[name.as_bytes(), b"=", value.as_bytes()].concat())?);
    }
    let mut args = vec![text(state.shim.as_os_str().as_bytes())?];
    for arg in ["-namespace", &state.namespace, "-id", &state.id, "-socket"] {
        args.push(text(arg.as_bytes())?);
    }
    args.push(text(&[b"unix://", socket.as_os_str().as_bytes()].concat())?);
    if debug {
        args.push(c"-debug".into());
    }
    let null = File::options().read(true).write(true).open("/dev/null").map_err(Error::at("open", "/dev/null"))?;
    let (report, report_to) = io::pipe().map_err(Error::step("make pipe"))?;
    let daemon = Command {
        program: text(state.shim.as_os_str().as_bytes())?,
        args,
        env: environment,
        fds: vec![(listener.as_fd(), 0), (report_to.as_fd(), 1), (null.as_fd(), 2)],
        namespaces: CloneFlags::empty(),
        outlives_parent: false,
    }
    .spawn()
    .map_err(Error::at("start", &state.shim))?;
    drop((report_to, listener));
    let mut report = io::BufReader::new(report);
    let mut said = String::new();
    report.read_line(&mut said).map_err(Error::step("read the daemon's report"))?;
    if said == READY {
        // It is the one to be sacrificed when memory is short. A host that forbids it loses nothing else.
        drop(set_oom_score(daemon.pid(), oom_score()));
        return Ok(daemon);
    }
    report.read_to_string(&mut said).map_err(Error::step("read the daemon's report"))?;
    let status = daemon.wait().map_err(Error::step("wait for the sandbox's daemon"))?;
    match said.is_empty() {
        false => Err(Error::Said(said)),
        true => Err(Error::Died { what: "the sandbox's daemon", status: format!("{status:?}") }),
    }
}

/// One above our own, as containerd has it.
fn oom_score() -> i32 {
    own_oom_score().unwrap_or(0).saturating_add(1).min(1000)
}
