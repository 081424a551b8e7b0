//! `start`: finds or starts the daemon of a container's sandbox.

use std::{
    env,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixListener, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use containerd_shim::{Flags, StartOpts};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vz_sys::error::chain;

use super::{
    delete::take_away,
    error::{Error, fail},
    parameters::{self, StartOptions, config_path, parameters, reply},
    watcher,
};
use crate::{
    daemon,
    host::{journal::Journal, socket},
};

/// How long the daemon of a sandbox may take to have its VM on the way. Installing a bundle takes a second of it.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// How long processes and cgroups of an earlier sandbox may take to end.
const START_OVER_DEADLINE: Duration = Duration::from_secs(10);

/// `start`: finds the sandbox's daemon or starts one. The reply for containerd.
pub fn start(flags: &Flags, input: &[u8]) -> Result<Vec<u8>, Error> {
    let ttrpc = env::var("TTRPC_ADDRESS").unwrap_or_default();
    let grpc = env::var("GRPC_ADDRESS").unwrap_or_default();
    let parameters = parameters(input, flags, ttrpc, grpc)?;
    let options = &parameters.options;
    if options.ttrpc_address.is_empty() {
        return Err(Error::Missing("TTRPC_ADDRESS (in the environment)"));
    }
    let bundle = env::current_dir().map_err(fail("find working directory"))?;
    let group = parameters::group(&bundle).unwrap_or_else(|| options.id.clone());
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
        let dir = vz_state::dir(&options.namespace, &options.id);
        if let Some(pid) = Journal::living_shim(&dir)? {
            let (namespace, id) = (options.namespace.clone(), options.id.clone());
            return Err(Error::Living { namespace, id, pid });
        }
        take_away(&dir, START_OVER_DEADLINE)?;
    }
    if let Some(listener) = listen(socket_path(&socket), member)? {
        spawn(options, &socket, listener, &bundle)?;
    }
    reply(&socket, parameters.reply)
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
        Some(report) if report == vz_state::READY => {
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
                "the sandbox's daemon was not ready after {} s, and was killed: something that it needs of this host \
                 hangs",
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
    let error = take_away(&vz_state::dir(&options.namespace, &options.id), START_OVER_DEADLINE).err()?;
    Some(format!("; {}", chain(&error)))
}

/// What a daemon reports: that it is ready, or all that it says before its end. `None` if neither comes by the
/// deadline.
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
        if said == vz_state::READY.as_bytes() {
            return Ok(Some(vz_state::READY.to_owned()));
        }
    }
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.trim_start_matches("unix://"))
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(said("echo ready", long).as_deref(), Some(vz_state::READY));
        assert_eq!(said("exit 1", long).as_deref(), Some(""));
        assert_eq!(said("printf no; sleep 0.1; printf ' bundle'", long).as_deref(), Some("no bundle"));
        assert_eq!(said("exec sleep 1000", short), None);
        assert_eq!(said("echo ready; exec sleep 1000", long).as_deref(), Some(vz_state::READY));
        // Other words are no end.
        assert_eq!(said("echo readily; exec sleep 1000", short), None);
    }
}
