//! Containers and execs, by libcontainer's builders.

use std::{
    error::Error,
    fs, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
};

use libcontainer::{
    container::{Container, builder::ContainerBuilder},
    oci_spec::runtime::{LinuxNamespaceType, Process, Spec},
    syscall::syscall::SyscallType,
};
use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns},
    sys::stat::Mode,
};

use vz_proto::PAUSE_ANNOTATION;

use super::{Made, console, devices, executor::Program, seccomp::Late};
use crate::{
    home, paths,
    protocol::{Key, Stream},
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Why a process was not made, where it is not libcontainer that says so.
#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error("spec has no process")]
    NoProcess,
    #[error("container has no process to join")]
    NoPid,
    #[error("{0}")]
    Unsupported(&'static str),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{0}")]
    Process(String),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> MakeError {
    move |source| MakeError::Io { what, source }
}

/// Creates a container. What is left of one that failed is the server's to remove.
pub fn create(id: &str, terminal: bool, stdio: Vec<(Stream, OwnedFd)>) -> Result<Made> {
    let bundle = paths::bundle(id);
    let spec = Spec::load(bundle.join("config.json"))?;
    let process = spec.process().as_ref().ok_or(MakeError::NoProcess)?;
    let program = Program { terminal: false, speaks: true, late: None, pauses: is_pause(&spec) };
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(paths::LIBCONTAINER)?
        .with_executor(program);
    if !terminal {
        let container =
            with_stdio(builder, stdio, process)?.as_init(&bundle).with_systemd(false).with_detach(true).build()?;
        let pid = container.pid().ok_or(MakeError::NoPid)?.as_raw();
        finish(id, pid, &spec)?;
        return Ok((pid, None));
    }
    // Bound by a relative name: a socket's path is shorter than an id may be.
    std::env::set_current_dir(&bundle).map_err(io_error("enter the bundle"))?;
    let socket = UnixListener::bind("console.sock").map_err(io_error("listen for the terminal"))?;
    let container = builder
        .with_console_socket(Some(bundle.join("console.sock")))
        .as_init(&bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let master = console::receive_master(&socket).map_err(io_error("receive the terminal"))?;
    let slave = vz_sys::tty::open_slave(&master).map_err(io_error("open the terminal"))?;
    console::prepare(&slave, process).map_err(io_error("prepare the terminal"))?;
    fs::remove_file("console.sock").map_err(io_error("remove the terminal's socket"))?;
    let pid = container.pid().ok_or(MakeError::NoPid)?.as_raw();
    finish(id, pid, &spec)?;
    Ok((pid, Some(master)))
}

/// What runc does for a created container and libcontainer does not.
fn finish(id: &str, pid: i32, spec: &Spec) -> Result<()> {
    let cgroup = format!("{}{}", paths::CGROUP, paths::cgroup(id));
    devices::restrict(spec, Path::new(&cgroup)).map_err(io_error("restrict the container's devices"))?;
    if has_own_network(spec) {
        let namespace =
            fs::File::open(format!("/proc/{pid}/ns/net")).map_err(io_error("open the network namespace"))?;
        // The worker ends soon, and needs no network of its own.
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        crate::net::loopback_up().map_err(io_error("bring up the container's loopback interface"))?;
    }
    Ok(())
}

/// Whether the container is there for its namespaces only.
fn is_pause(spec: &Spec) -> bool {
    spec.annotations().as_ref().is_some_and(|all| all.contains_key(PAUSE_ANNOTATION))
}

/// Whether the container gets a new network namespace, in which nothing is up.
fn has_own_network(spec: &Spec) -> bool {
    let mut namespaces = spec.linux().iter().flat_map(|l| l.namespaces().iter().flatten());
    namespaces.any(|n| n.typ() == LinuxNamespaceType::Network && n.path().is_none())
}

/// Starts a process in a running container. Comes back when its program runs.
pub fn exec(key: &Key, terminal: bool, mut stdio: Vec<(Stream, OwnedFd)>) -> Result<Made> {
    let directory = paths::exec(&key.container, &key.exec);
    let spec = Spec::load(paths::bundle(&key.container).join("config.json"))?;
    let state = paths::state(&key.container);
    let init = Container::load(state.clone())?.pid().ok_or(MakeError::NoPid)?.as_raw();
    let file = directory.join("process.json");
    let mut process = read_process(&file)?;
    let late = Late::prepare(&spec, &mut process).map_err(MakeError::Unsupported)?;
    // The terminal is made here and not by libcontainer, which would make it root's and tell nobody where it is until
    // the program runs.
    process.set_terminal(Some(false));
    home::settle(&mut process, Path::new(&format!("/proc/{init}/root")));
    let mut made = None;
    if terminal {
        let (master, slave) = console::open_in_container(init).map_err(io_error("make a terminal in the container"))?;
        console::prepare(&slave, &process).map_err(io_error("prepare the terminal"))?;
        let copy = || slave.try_clone().map_err(io_error("duplicate the terminal"));
        stdio = vec![(Stream::Stdin, copy()?), (Stream::Stdout, copy()?), (Stream::Stderr, copy()?)];
        made = Some(master);
    }
    let bytes = serde_json::to_vec(&process)?;
    fs::write(&file, bytes).map_err(io_error("write process.json"))?;
    // libcontainer leaves sockets in the state directory of the container that it works with: it gets one of its own.
    let root = directory.join("root");
    let own = root.join(&key.container);
    fs::create_dir_all(&own).map_err(io_error("create the exec's state"))?;
    fs::copy(state.join("state.json"), own.join("state.json")).map_err(io_error("copy the container's state"))?;
    let program = Program { terminal, speaks: false, late, pauses: false };
    let builder = ContainerBuilder::new(key.container.clone(), SyscallType::default())
        .with_root_path(root)?
        .with_executor(program);
    let pid = with_stdio(builder, stdio, &process)?
        .as_tenant()
        .with_detach(true)
        .with_process(Some(&file))
        .build()
        // The text has filling bytes.
        .map_err(|e| MakeError::Process(crate::text::chain(&e).replace('\0', "")))?;
    Ok((pid.as_raw(), made))
}

fn read_process(file: &Path) -> Result<Process> {
    let bytes = fs::read(file).map_err(io_error("read process.json"))?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Gives the process the descriptors that there are, and `/dev/null` for the others.
fn with_stdio(
    builder: ContainerBuilder,
    mut stdio: Vec<(Stream, OwnedFd)>,
    process: &Process,
) -> Result<ContainerBuilder> {
    let mut take = |stream, flags| -> Result<OwnedFd> {
        match stdio.iter().position(|(s, _)| *s == stream) {
            Some(index) => {
                let (_, fd) = stdio.swap_remove(index);
                console::give(&fd, process).map_err(io_error("change the owner of a pipe"))?;
                Ok(fd)
            }
            None => Ok(open("/dev/null", flags | OFlag::O_CLOEXEC, Mode::empty())?),
        }
    };
    let stdin = take(Stream::Stdin, OFlag::O_RDONLY)?;
    let stdout = take(Stream::Stdout, OFlag::O_WRONLY)?;
    let stderr = take(Stream::Stderr, OFlag::O_WRONLY)?;
    Ok(builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr))
}
