//! How containerd calls the shim: `start`, `delete`, `-info`, `-v`, in the forms of containerd 1.7 to 2.3.
//!
//! | containerd | stdin of `start` | reply |
//! | --- | --- | --- |
//! | 1.7 | runtime options (`Any`) | JSON, version 2 at most |
//! | 2.0 to 2.2 | runtime options | JSON, version 2 or 3 |
//! | 2.3 and later | `BootstrapParams` | `BootstrapResult` |
//!
//! Nothing tells 1.7 from 2.2, so the JSON reply says version 2, which both take; the daemon serves both versions.
//! containerd reads stdout and stderr of `start` together: a failure is the only time that anything else is printed.

pub mod watcher;

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::{Flags, StartOpts, parse};
use containerd_shim_protos::{
    api::DeleteResponse,
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{CodedInputStream, Message, rt::WireType, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vz_config::Config;
use vz_sys::error::chain;

use crate::{
    daemon,
    host::{
        hooks,
        journal::{self, Journal},
        socket, unwind,
    },
    report,
};

/// What containerd calls us.
const RUNTIME: &str = "io.containerd.vz.v2";
/// Most bytes that are read from stdin; containerd's own limit.
const MAX_INPUT: u64 = 10 << 20;
/// Annotations that put a container into another one's sandbox, the first that is set counts.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
/// How long the daemon of a sandbox may take to have its VM on the way. Installing a bundle takes a second of it.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// How long processes and cgroups of an earlier sandbox may take to end.
const START_OVER_DEADLINE: Duration = Duration::from_secs(10);
/// The same where containerd waits, which gives `delete` five seconds in all.
const DELETE_DEADLINE: Duration = Duration::from_secs(4);
/// The same where nobody waits.
const WATCHER_DEADLINE: Duration = Duration::from_secs(60);
/// Exit status of a task whose shim has died.
const KILLED: u32 = 137;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line.
    #[error("read command line")]
    Flags(#[source] containerd_shim::Error),
    /// Neither start, delete nor the daemon.
    #[error("unknown action {0:?}: containerd calls this program, see `containerd-shim-vz-v2 -v`")]
    Action(String),
    /// A flag is missing.
    #[error("flag -{0} is missing: containerd calls this program, see `containerd-shim-vz-v2 -v`")]
    Missing(&'static str),
    /// stdin, stdout or the working directory.
    #[error("{action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What containerd wrote is for another shim.
    #[error("bootstrap parameters are for {found}, the command line for {wanted}")]
    Mismatch {
        /// Namespace and id in the parameters.
        found: String,
        /// Those of the command line.
        wanted: String,
    },
    /// The socket.
    #[error("listen on {path}")]
    Listen {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The sandbox runs.
    #[error(
        "container {namespace}/{id} runs already, under the shim with pid {pid}: use another id, or remove it first"
    )]
    Living {
        /// Its namespace.
        namespace: String,
        /// Its id.
        id: String,
        /// Its shim's pid.
        pid: i32,
    },
    /// The daemon did not come up.
    #[error("{0}")]
    Daemon(String),
    /// A message could not be read or written.
    #[error("{what}")]
    Message {
        /// Which.
        what: &'static str,
        /// Why not.
        source: containerd_shim_protos::protobuf::Error,
    },
    /// The journal of an earlier sandbox.
    #[error(transparent)]
    Journal(#[from] journal::Error),
    /// Cleaning up.
    #[error(transparent)]
    Unwind(#[from] unwind::Error),
}

fn fail(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// What `start` was told.
#[derive(Debug, Clone, PartialEq)]
struct Parameters {
    options: StartOptions,
    reply: ReplyForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReplyForm {
    Protobuf,
    Json,
}

#[derive(Debug, Clone, PartialEq)]
struct StartOptions {
    id: String,
    namespace: String,
    /// containerd's gRPC address.
    address: String,
    ttrpc_address: String,
    debug: bool,
    socket_dir: Option<String>,
    extensions: Vec<Any>,
}

/// The program, as containerd calls it.
pub fn main(args: &[OsString]) -> ExitCode {
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            let text = chain(&error);
            // The one line that containerd shows to its client.
            drop(writeln!(io::stderr(), "{text}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[OsString]) -> Result<ExitCode, Error> {
    let flags = parse(args).map_err(Error::Flags)?;
    if flags.version {
        let text = format!("containerd-shim-vz-v2:\n  Version: {}\n  Runtime: {RUNTIME}\n", env!("CARGO_PKG_VERSION"));
        print(text.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    if flags.info {
        return info();
    }
    for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
        if value.is_empty() {
            return Err(Error::Missing(name));
        }
    }
    match flags.action.as_str() {
        "start" => start(&flags),
        "delete" => delete(&flags),
        watcher::ACTION => Ok(watcher::main(|| {
            // Nobody is there to be told. What cannot be taken away stays in the journal for the next `start`.
            drop(take_away(&Journal::dir(&flags.namespace, &flags.id), WATCHER_DEADLINE));
        })),
        "" => Ok(daemon::main(&flags)),
        other => Err(Error::Action(other.to_owned())),
    }
}

fn info() -> Result<ExitCode, Error> {
    // What containerd sends along are options, none of which change what this runtime is.
    read_stdin()?;
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").into();
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.into();
    info.version = Some(version).into();
    print(&info.write_to_bytes().map_err(|source| Error::Message { what: "write runtime info", source })?)?;
    Ok(ExitCode::SUCCESS)
}

fn start(flags: &Flags) -> Result<ExitCode, Error> {
    let ttrpc = env::var("TTRPC_ADDRESS").unwrap_or_default();
    let grpc = env::var("GRPC_ADDRESS").unwrap_or_default();
    let parameters = parameters(&read_stdin()?, flags, ttrpc, grpc)?;
    let options = &parameters.options;
    if options.ttrpc_address.is_empty() {
        return Err(Error::Missing("TTRPC_ADDRESS (in the environment)"));
    }
    let bundle = env::current_dir().map_err(fail("find working directory"))?;
    let group = group(&bundle).unwrap_or_else(|| options.id.clone());
    let socket = StartOpts {
        id: options.id.clone(),
        namespace: options.namespace.clone(),
        address: options.address.clone(),
        ttrpc_address: options.ttrpc_address.clone(),
        socket_dir: options.socket_dir.clone(),
        publish_binary: String::new(),
        debug: options.debug,
        log_level: Default::default(),
        containerd_version: String::new(),
        extensions: Vec::new(),
    }
    .socket_address(&group);
    let member = group != options.id;
    if !member {
        // Whatever an earlier sandbox of this name has left, its socket among it. A living one is another containerd's:
        // one refuses duplicate ids itself.
        let dir = Journal::dir(&options.namespace, &options.id);
        if let Some(pid) = Journal::living_shim(&dir)? {
            let (namespace, id) = (options.namespace.clone(), options.id.clone());
            return Err(Error::Living { namespace, id, pid });
        }
        take_away(&dir, START_OVER_DEADLINE)?;
    }
    if let Some(listener) = listen(socket_path(&socket), member)? {
        spawn(options, &socket, listener, &bundle)?;
    }
    print(&reply(&socket, parameters.reply)?)?;
    Ok(ExitCode::SUCCESS)
}

fn read_stdin() -> Result<Vec<u8>, Error> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    // Nothing comes from somebody who tries this by hand.
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(fail("read stdin"))?;
    }
    Ok(input)
}

/// Makes one set of parameters out of what the different versions of containerd pass.
fn parameters(input: &[u8], flags: &Flags, ttrpc: String, grpc: String) -> Result<Parameters, Error> {
    let or = |first: String, second: String| if first.is_empty() { second } else { first };
    let legacy_address = or(flags.address.clone(), grpc);
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && !params.instance_id.is_empty()
    {
        if params.instance_id == flags.id && params.namespace == flags.namespace {
            let level = params.log_level.value();
            let options = StartOptions {
                id: params.instance_id,
                namespace: params.namespace,
                address: or(params.containerd_grpc_address, legacy_address),
                ttrpc_address: or(params.containerd_ttrpc_address, ttrpc),
                debug: flags.debug || (level != 0 && level <= DEBUG_LEVEL),
                socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
                extensions: params.extensions.into_iter().filter_map(|e| e.value.into_option()).collect(),
            };
            return Ok(Parameters { options, reply: ReplyForm::Protobuf });
        }
        // Options of the older form decode as this message too, with their type in the place of the id.
        let looks_like_any = BootstrapParams {
            instance_id: params.instance_id.clone(),
            namespace: params.namespace.clone(),
            ..Default::default()
        };
        if params != looks_like_any {
            return Err(Error::Mismatch {
                found: format!("{}/{}", params.namespace, params.instance_id),
                wanted: format!("{}/{}", flags.namespace, flags.id),
            });
        }
    }
    let extensions = Any::parse_from_bytes(input).ok().filter(|any| !any.type_url.is_empty());
    let options = StartOptions {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        address: legacy_address,
        ttrpc_address: ttrpc,
        debug: flags.debug,
        socket_dir: None,
        extensions: extensions.into_iter().collect(),
    };
    Ok(Parameters { options, reply: ReplyForm::Json })
}

/// `LOG_LEVEL_DEBUG` of the bootstrap protocol; lower is more verbose, 0 is unset.
const DEBUG_LEVEL: i32 = containerd_shim_protos::bootstrap_api::LogLevel::LOG_LEVEL_DEBUG as i32;

/// Whose sandbox a container belongs to, where it is not its own.
fn group(bundle: &Path) -> Option<String> {
    let spec = oci_spec::runtime::Spec::load(bundle.join("config.json")).ok()?;
    let annotations = spec.annotations().as_ref()?;
    GROUPS.iter().find_map(|key| annotations.get(*key)).filter(|group| !group.is_empty()).cloned()
}

/// Listens on the socket; `None` where the sandbox that the container belongs to listens there already.
fn listen(path: &Path, member: bool) -> Result<Option<UnixListener>, Error> {
    let error = |source| Error::Listen { path: path.to_owned(), source };
    match socket::listen(path).map_err(error)? {
        None if !member => Err(error(io::ErrorKind::AddrInUse.into())),
        listener => Ok(listener),
    }
}

/// Starts the daemon, and waits until it has its VM on the way or says why not.
fn spawn(options: &StartOptions, socket: &str, listener: UnixListener, bundle: &Path) -> Result<(), Error> {
    let path = socket_path(socket);
    // Before anybody can think that it is dead.
    let inode = socket::inode(path).map_err(|source| Error::Listen { path: path.to_owned(), source })?;
    let exe = env::current_exe().map_err(fail("find own program"))?;
    let mut command = Command::new(exe);
    command
        .args(["-namespace", &options.namespace, "-id", &options.id, "-address", &options.address])
        .args(["-socket", socket])
        .env("TTRPC_ADDRESS", &options.ttrpc_address)
        .current_dir(bundle)
        // The daemon takes the socket over as its stdin, and reports on its stdout.
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0);
    if options.debug {
        command.arg("-debug");
    }
    if let Some(path) = config_path(&options.extensions) {
        command.env(daemon::CONFIG_PATH, path);
    }
    let mut child = command.spawn().map_err(fail("start daemon"))?;
    // The command has the listener still.
    drop(command);
    let mut pipe =
        child.stdout.take().ok_or_else(|| fail("read the daemon's report")(io::ErrorKind::BrokenPipe.into()))?;
    let why = match await_report(&mut pipe, START_DEADLINE).map_err(fail("read the daemon's report"))? {
        Some(report) if report == report::READY => {
            let Err(error) = watcher::start(&options.namespace, &options.id, pipe.into()) else { return Ok(()) };
            child.kill().map_err(fail("kill the daemon"))?;
            let mut why = chain(&error);
            why.extend(left_behind(options));
            why
        }
        // It has cleaned up itself.
        Some(report) if !report.is_empty() => {
            child.wait().map_err(fail("wait for the daemon"))?;
            report
        }
        // Killed: containerd calls `delete` for shims that it knows, and it does not know this one yet.
        Some(_) => {
            let status = child.wait().map_err(fail("wait for the daemon"))?;
            let mut why = format!("daemon ended with {status}");
            why.extend(left_behind(options));
            why
        }
        None => {
            child.kill().map_err(fail("kill the daemon"))?;
            let mut why = format!(
                "the sandbox's daemon was not ready after {} s, and was killed: something that it needs of this host hangs",
                START_DEADLINE.as_secs()
            );
            // Waits for its end too.
            why.extend(left_behind(options));
            why
        }
    };
    drop(socket::remove(path, Some(inode)));
    Err(Error::Daemon(why))
}

/// Takes away what a daemon that was killed has left. What is in the way, where something is.
fn left_behind(options: &StartOptions) -> Option<String> {
    let error = take_away(&Journal::dir(&options.namespace, &options.id), START_OVER_DEADLINE).err()?;
    Some(format!("; {}", chain(&error)))
}

/// What a daemon reports: that it is ready, or all that it says before its end. `None` if neither comes by the deadline.
fn await_report(from: &mut (impl Read + AsFd), deadline: Duration) -> io::Result<Option<String>> {
    let end = Instant::now() + deadline;
    let (mut said, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
        match from.read(&mut part)? {
            0 => return Ok(Some(String::from_utf8_lossy(&said).into_owned())),
            count => said.extend(part.get(..count).unwrap_or_default()),
        }
        if said == report::READY.as_bytes() {
            return Ok(Some(report::READY.to_owned()));
        }
    }
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.trim_start_matches("unix://"))
}

/// containerd's ConfigPath for this runtime, where it is set.
fn config_path(extensions: &[Any]) -> Option<PathBuf> {
    let any = extensions.iter().find(|any| any.type_url.ends_with("runtimeoptions.v1.Options"))?;
    // containerd's api/types/runtimeoptions/v1: `string config_path = 2`.
    let mut input = CodedInputStream::from_bytes(&any.value);
    let mut path = String::new();
    while let Some(tag) = input.read_raw_tag_or_eof().ok()? {
        match tag {
            CONFIG_PATH_TAG => path = input.read_string().ok()?,
            tag => input.skip_field(WireType::new(tag & 7)?).ok()?,
        }
    }
    Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty())
}

/// Field 2, length-delimited.
const CONFIG_PATH_TAG: u32 = 2 << 3 | 2;

fn reply(address: &str, form: ReplyForm) -> Result<Vec<u8>, Error> {
    match form {
        ReplyForm::Json => {
            Ok(serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" }).to_string().into_bytes())
        }
        ReplyForm::Protobuf => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".into(),
                ..Default::default()
            };
            result.write_to_bytes().map_err(|source| Error::Message { what: "write bootstrap result", source })
        }
    }
}

fn print(bytes: &[u8]) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(fail("write stdout"))
}

/// Takes away everything that the sandbox in `dir` owns, and runs the hooks that are due then. What is left is the error.
fn take_away(dir: &Path, time: Duration) -> Result<(), Error> {
    let mut bundles = Vec::new();
    let unwound = unwind::unwind_within(time, dir, |id, bundle| bundles.push((id.to_owned(), bundle.to_owned())));
    if bundles.is_empty() {
        return Ok(unwound?);
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail("start runtime for hooks"))?;
    // This process is where its caller has started it. A configuration that is wrong by now must not keep anything here.
    let limit = Config::load(None).unwrap_or_default().timeouts.hook_s;
    let launch = hooks::Launch { surroundings: None, limit: Duration::from_secs(limit) };
    for (id, bundle) in bundles {
        runtime.block_on(hooks::poststop(&id, &bundle, None, &launch));
    }
    runtime.shutdown_background();
    Ok(unwound?)
}

/// Takes away whatever a dead shim has left.
///
/// What cannot be taken away is no failure: containerd would keep a task whose `delete` fails, and its id, for good. It logs
/// what is said here, the journal has what is left, and the next `start` with this id tries again.
fn delete(flags: &Flags) -> Result<ExitCode, Error> {
    if let Err(error) = take_away(&Journal::dir(&flags.namespace, &flags.id), DELETE_DEADLINE) {
        drop(writeln!(io::stderr(), "{}", chain(&error)));
        if let Err(error) = watcher::go_on(&flags.namespace, &flags.id) {
            drop(writeln!(io::stderr(), "{}", chain(&error)));
        }
    }
    let mut response = DeleteResponse::new();
    response.set_exit_status(KILLED);
    response.set_exited_at(SystemTime::now().into());
    print(&response.write_to_bytes().map_err(|source| Error::Message { what: "write reply", source })?)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "c1".into(), namespace: "ns".into(), address: "/grpc".into(), ..Default::default() }
    }

    fn read(input: &[u8]) -> Result<Parameters, Error> {
        parameters(input, &flags(), "/ttrpc".into(), String::new())
    }

    #[test]
    fn nothing_on_stdin_is_the_older_form() {
        let read = read(&[]).unwrap();
        assert_eq!(read.reply, ReplyForm::Json);
        assert_eq!((read.options.address.as_str(), read.options.ttrpc_address.as_str()), ("/grpc", "/ttrpc"));
    }

    #[test]
    fn options_on_stdin_are_not_taken_for_parameters() {
        let mut any = Any::new();
        any.type_url = "runtimeoptions.v1.Options".into();
        any.value = vec![0x12, 2, b'/', b'x'];
        let read = read(&any.write_to_bytes().unwrap()).unwrap();
        assert_eq!((read.reply, read.options.extensions.len()), (ReplyForm::Json, 1));
        assert_eq!(config_path(&read.options.extensions).as_deref(), Some(Path::new("/x")));
    }

    #[test]
    fn parameters_win_over_flags_and_fall_back_to_them() {
        let mut params = BootstrapParams::new();
        params.instance_id = "c1".into();
        params.namespace = "ns".into();
        params.socket_dir = Some("/s".into());
        params.extensions.push(Extension { value: Some(Any::new()).into(), ..Default::default() });
        let read = read(&params.write_to_bytes().unwrap()).unwrap();
        assert_eq!(read.reply, ReplyForm::Protobuf);
        assert_eq!(read.options.socket_dir.as_deref(), Some("/s"));
        assert_eq!((read.options.address.as_str(), read.options.ttrpc_address.as_str()), ("/grpc", "/ttrpc"));
    }

    #[test]
    fn parameters_for_somebody_else_are_refused() {
        let mut params = BootstrapParams::new();
        params.instance_id = "c2".into();
        params.namespace = "ns".into();
        params.containerd_ttrpc_address = "/t".into();
        assert!(matches!(read(&params.write_to_bytes().unwrap()), Err(Error::Mismatch { .. })));
    }

    #[test]
    fn a_living_sandboxs_socket_is_for_its_members_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/living");
        let _listener = listen(&path, false).unwrap().unwrap();
        assert!(listen(&path, true).unwrap().is_none());
        assert!(matches!(listen(&path, false), Err(Error::Listen { .. })));
    }

    #[test]
    fn a_daemon_has_a_deadline() {
        let said = |script: &str, deadline| {
            let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
            let said = await_report(child.stdout.as_mut().unwrap(), deadline).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            said
        };
        let (short, long) = (Duration::from_millis(100), Duration::from_secs(30));
        assert_eq!(said("echo ready", long).as_deref(), Some(report::READY));
        assert_eq!(said("exit 1", long).as_deref(), Some(""));
        assert_eq!(said("printf no; sleep 0.1; printf ' bundle'", long).as_deref(), Some("no bundle"));
        assert_eq!(said("exec sleep 1000", short), None);
        assert_eq!(said("echo ready; exec sleep 1000", long).as_deref(), Some(report::READY));
        // Other words are no end.
        assert_eq!(said("echo readily; exec sleep 1000", short), None);
    }
}
