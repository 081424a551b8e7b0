//! OCI hooks that run on the host (runtime-spec, "POSIX-platform Hooks").
//!
//! A hook finds what it finds with runc: the host's mount namespace, its container's bundle as working directory, the
//! limit of open files that the shim was started with, its own environment, and the container's state on standard
//! input. Of the sandbox it holds one descriptor, the anchor's channel; a daemon that it leaves behind keeps no mount
//! of ours busy.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use command_fds::CommandFdExt;
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{ContainerState, Hook, StateBuilder};
use tokio::{
    io::AsyncWriteExt,
    process::Command,
    time::{Instant, error::Elapsed, timeout, timeout_at},
};
use vz_sys::surroundings::Surroundings;

use super::journal::{self, Journal};
use crate::spec;

/// Most bytes of a failing hook's stderr that are quoted.
const QUOTED: u64 = 2048;
/// How long a hook that is killed may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(1);

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be run.
    #[error("run {point} hook {path}")]
    Run {
        /// `createRuntime`, ...
        point: &'static str,
        /// The program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It ended with a failure.
    #[error("{point} hook {path}: {status}: {stderr}")]
    Failed {
        /// `createRuntime`, ...
        point: &'static str,
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// It did not end in time, and was killed.
    #[error("{point} hook {path}: not done after {whose} of {seconds} s")]
    Timeout {
        /// `createRuntime`, ...
        point: &'static str,
        /// The program.
        path: PathBuf,
        /// Its own timeout, or the configured one.
        whose: &'static str,
        /// How long that is.
        seconds: u64,
    },
    /// It could not be written down.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// The state that hooks are told could not be made.
    #[error("describe container state")]
    State(#[source] oci_spec::OciSpecError),
}

/// How hooks are run.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The surroundings that this process has left; `None` if it is still in them.
    pub surroundings: Option<Arc<Surroundings>>,
    /// How long a hook may take whose spec sets no timeout.
    pub limit: Duration,
}

/// What hooks are told about a container.
#[derive(Debug, Clone)]
pub struct Context {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The pid of its anchor; 0 where there is none any more.
    pub pid: i32,
    /// Its spec's annotations.
    pub annotations: std::collections::HashMap<String, String>,
    /// What keeps the anchor, and with it the network namespace, for as long as a hook runs.
    pub hold: Option<Arc<OwnedFd>>,
    /// How they are run.
    pub launch: Launch,
}

/// Runs `hooks` one after the other, each in the journal while it runs; the first that fails ends it.
pub async fn run(
    point: &'static str,
    hooks: Option<&Vec<Hook>>,
    context: &Context,
    status: ContainerState,
    journal: &Journal,
) -> Result<(), Error> {
    for hook in hooks.into_iter().flatten() {
        one(point, hook, context, status, Some(journal)).await?;
    }
    Ok(())
}

/// Runs the poststop hooks of a container's bundle. Failures are logged only, as the runtime spec says. There is no
/// journal after it has been replayed.
pub async fn poststop(id: &str, bundle: &Path, journal: Option<&Journal>, launch: &Launch) {
    let spec = match spec::read(bundle) {
        Ok(spec) => spec,
        Err(error) => {
            tracing::warn!(%error, bundle = %bundle.display(), "poststop hooks are unknown");
            return;
        }
    };
    let Some(hooks) = spec.hooks().as_ref().and_then(|hooks| hooks.poststop().clone()) else { return };
    let annotations = spec.annotations().clone().unwrap_or_default();
    let (id, bundle, launch) = (id.to_owned(), bundle.to_owned(), launch.clone());
    let context = Context { id, bundle, pid: 0, annotations, hold: None, launch };
    for hook in &hooks {
        if let Err(error) = one("poststop", hook, &context, ContainerState::Stopped, journal).await {
            tracing::warn!(error = %vz_sys::error::chain(&error), "poststop hook");
        }
    }
}

fn state(context: &Context, status: ContainerState) -> Result<Vec<u8>, Error> {
    let mut state = StateBuilder::default()
        .version("1.2.0")
        .id(context.id.clone())
        .status(status)
        .bundle(context.bundle.clone())
        .annotations(context.annotations.clone());
    // A stopped container has none, and the member is left out then.
    if context.pid != 0 {
        state = state.pid(context.pid);
    }
    serde_json::to_vec(&state.build().map_err(Error::State)?).map_err(|e| Error::State(e.into()))
}

async fn one(
    point: &'static str,
    hook: &Hook,
    context: &Context,
    status: ContainerState,
    journal: Option<&Journal>,
) -> Result<(), Error> {
    let path = hook.path();
    let fail = |source| Error::Run { point, path: path.clone(), source };
    let state = state(context, status)?;
    let mut command = Command::new(path);
    command.current_dir(&context.bundle);
    if let Some(surroundings) = &context.launch.surroundings {
        surroundings.surround(command.as_std_mut(), &context.bundle).map_err(fail)?;
    }
    if let Some((name, args)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(args);
    }
    // A memfd, not a pipe: a hook that outlives the shim must not die of SIGPIPE, and its background children must not
    // keep us reading.
    let said = memfd_create("hook", MFdFlags::MFD_CLOEXEC).map(File::from).map_err(|e| fail(e.into()))?;
    let stderr = said.try_clone().map_err(fail)?;
    command.env_clear().stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr).kill_on_drop(true);
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    if let Some(hold) = &context.hold {
        command.preserved_fds(vec![hold.try_clone().map_err(fail)?]);
    }
    let own = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let (whose, limit) = match own {
        Some(seconds) => ("its timeout", Duration::from_secs(seconds)),
        None => ("the configured timeouts.hook_s", context.launch.limit),
    };
    let late = |_: Elapsed| Error::Timeout { point, path: path.clone(), whose, seconds: limit.as_secs() };
    let deadline = Instant::now() + limit;
    // On a thread: a program on a file system that hangs keeps its exec waiting.
    let starting = tokio::task::spawn_blocking(move || command.spawn());
    let started = timeout_at(deadline, starting).await.map_err(late)?;
    let mut child = started.map_err(io::Error::other).and_then(|started| started).map_err(fail)?;
    let stdin = child.stdin.take();
    // Before it is told anything: without a state it does nothing.
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let written = match (journal, pid) {
        (Some(journal), Some(pid)) => Some((journal, journal.hook(pid)?)),
        _ => None,
    };
    let whole = async {
        if let Some(mut stdin) = stdin {
            match stdin.write_all(&state).await {
                // A hook need not read what it is told.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
                other => other?,
            }
        }
        child.wait().await
    };
    let ended = timeout_at(deadline, whole).await;
    // One that even this does not end stays in the journal, and is dealt with at the sandbox's end.
    let gone = ended.is_ok() || timeout(KILL_DEADLINE, child.kill()).await.is_ok();
    if let Some((journal, resource)) = written.filter(|_| gone) {
        journal.gone(resource)?;
    }
    let status = ended.map_err(late)?.map_err(fail)?;
    if status.success() {
        return Ok(());
    }
    let stderr = tail(&said).map_err(fail)?;
    Err(Error::Failed { point, path: path.clone(), status, stderr })
}

/// The end of what a hook has written.
fn tail(said: &File) -> io::Result<String> {
    let from = said.metadata()?.len().saturating_sub(QUOTED);
    let mut bytes = Vec::new();
    let mut said = said;
    said.seek(SeekFrom::Start(from))?;
    said.take(QUOTED).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn context(bundle: &Path) -> Context {
        Context {
            id: "c1".into(),
            bundle: bundle.to_owned(),
            pid: 42,
            annotations: [("a".into(), "b".into())].into(),
            hold: None,
            launch: Launch { surroundings: None, limit: Duration::from_secs(1) },
        }
    }

    async fn run_in(context: &Context, script: &str, timeout: Option<i64>) -> Result<(), Error> {
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["X=y"], "timeout": timeout });
        let hooks = vec![serde_json::from_value(hook).unwrap()];
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(&dir.path().join("ns/c1")).unwrap();
        run("createRuntime", Some(&hooks), context, ContainerState::Created, &journal).await
    }

    async fn shell(script: &str, timeout: Option<i64>) -> Result<(), Error> {
        run_in(&context(Path::new("/")), script, timeout).await
    }

    #[tokio::test]
    async fn a_hook_is_told_the_state_and_gets_its_own_environment() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().to_str().unwrap();
        run_in(&context(dir.path()), "cat > said; echo $X$HOME >> said; pwd >> said", None).await.unwrap();
        let said = std::fs::read_to_string(dir.path().join("said")).unwrap();
        let (state, rest) = said.rsplit_once('}').unwrap();
        let state: serde_json::Value = serde_json::from_str(&format!("{state}}}")).unwrap();
        let mut expected = json!({
            "ociVersion": "1.2.0", "id": "c1", "status": "created", "pid": 42, "bundle": bundle,
            "annotations": { "a": "b" },
        });
        assert_eq!(state, expected);
        assert_eq!(rest.trim(), format!("y\n{bundle}"));
        // Nothing of a process that is gone.
        let stopped = Context { pid: 0, ..context(dir.path()) };
        let stopped: serde_json::Value =
            serde_json::from_slice(&super::state(&stopped, ContainerState::Stopped).unwrap()).unwrap();
        expected["status"] = "stopped".into();
        expected.as_object_mut().unwrap().remove("pid");
        assert_eq!(stopped, expected);
    }

    #[tokio::test]
    async fn a_hook_is_where_the_shim_was() {
        if !nix::unistd::geteuid().is_root() {
            vz_tally::skip!("not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let surroundings = Some(Arc::new(Surroundings::current().unwrap()));
        let launch = Launch { surroundings, limit: Duration::from_secs(10) };
        let context = Context { launch, ..context(dir.path()) };
        run_in(&context, "readlink /proc/self/ns/mnt > said; pwd >> said", None).await.unwrap();
        let said = std::fs::read_to_string(dir.path().join("said")).unwrap();
        let mounts = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        assert_eq!(said, format!("{}\n{}\n", mounts.display(), dir.path().display()));
    }

    #[tokio::test]
    async fn a_failing_hook_is_quoted() {
        let error = shell("echo no bridge >&2; exit 3", None).await.unwrap_err().to_string();
        assert!(error.contains("no bridge") && error.contains("exit status: 3"), "{error}");
    }

    #[tokio::test]
    async fn nobody_waits_for_what_a_hook_leaves_behind() {
        let ran = shell("sleep 1000 >/dev/null & echo $! >&2; exit 4", Some(20)).await.unwrap_err();
        let Error::Failed { stderr, .. } = ran else { panic!("{ran}") };
        let left = nix::unistd::Pid::from_raw(stderr.parse().unwrap());
        nix::sys::signal::kill(left, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended_at_its_timeout() {
        let error = shell("exec sleep 1000", Some(1)).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { whose: "its timeout", seconds: 1, .. }));
    }

    #[tokio::test]
    async fn a_hook_without_a_timeout_has_the_configured_one() {
        for timeout in [None, Some(0)] {
            let error = shell("exec sleep 1000", timeout).await.unwrap_err();
            let said = error.to_string();
            assert!(said.ends_with("not done after the configured timeouts.hook_s of 1 s"), "{said}");
        }
    }
}
