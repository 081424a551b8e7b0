//! Containers without containerd: runc's command line, and `vz run` on a bundle.
//!
//! Everything is done by the shim's own daemon, which these commands start and ask as containerd would: there is one
//! way to run a container. What is added is what a caller of runc expects: a state directory, a process to wait for
//! (the [`keeper`]), and the standard streams that it has left.

use std::{
    env,
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{self, Stdio},
    time::{Duration, Instant, SystemTime},
};

use nix::sys::signal::Signal;
use serde_json::json;
use vz_sys::process::Identity;

use crate::table::{Style, colours, columns};

pub mod args;
mod error;
mod features;
mod foreground;
pub mod keeper;
mod place;
mod process_table;
mod spec;
mod state;
mod stdio;
mod task;
mod tty;

use args::{Format, Global, LogFormat};
use error::Error;
use foreground::Signals;
use keeper::{Job, What};
use spec::Bundle;
use state::{Dir, State};
use task::{Task, runtime};

/// The shim's program, which is the sandbox's too.
const SHIM: &str = "containerd-shim-vz-v2";
/// How long a killed process may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What can be done.
#[derive(Debug)]
pub enum Verb {
    /// Make a container that is ready to be started.
    Create(args::New),
    /// Start it.
    Start(args::Named),
    /// Make it and start it.
    Run(args::Run),
    /// Start a further process in it.
    Exec(args::Exec),
    /// Say what it is.
    State(args::Named),
    /// Signal it.
    Kill(args::Kill),
    /// Take it away.
    Delete(args::Delete),
    /// List all.
    List(args::List),
    /// List its processes.
    Ps(String, Format, Vec<String>),
    /// Stop it for a while.
    Pause(args::Named),
    /// Go on.
    Resume(args::Named),
    /// Say what this runtime can do.
    Features,
}

/// Does it. What is to be printed, and the exit status.
pub fn run(global: &Global, verb: Verb) -> io::Result<(String, u8)> {
    act(global, verb).map_err(|error| {
        let text = crate::check::chain(&error);
        if let Some(log) = &global.log
            && let Err(e) = write_log(log, global.log_format, &text)
        {
            return io::Error::new(e.kind(), format!("{text} (write {}: {e})", log.display()));
        }
        io::Error::other(text)
    })
}

fn write_log(path: &Path, format: LogFormat, text: &str) -> io::Result<()> {
    let time = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let line = match format {
        LogFormat::Json => json!({ "level": "error", "msg": text, "time": time }).to_string(),
        LogFormat::Text => format!("time={time:?} level=error msg={text:?}"),
    };
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(format!("{line}\n").as_bytes())
}

fn act(global: &Global, verb: Verb) -> Result<(String, u8), Error> {
    if matches!(verb, Verb::Features) {
        return Ok((features::describe(), 0));
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    // Whoever calls again may be in another directory.
    let root = std::path::absolute(&global.root).map_err(Error::at("find", &global.root))?;
    let done = |()| (String::new(), 0);
    match verb {
        Verb::Features => Ok((String::new(), 0)),
        Verb::Create(new) => create(&root, global.debug, &new).map(done),
        Verb::Run(options) => start_new(&root, global.debug, &options).map(|status| (String::new(), status)),
        Verb::Exec(options) => exec(&root, &options).map(|status| (String::new(), status)),
        Verb::Start(named) => start(&root, &named.id).map(done),
        Verb::State(named) => Ok((state(&root, &named.id)?, 0)),
        Verb::Kill(options) => kill(&root, &options).map(done),
        Verb::Delete(options) => delete(&root, &options.id, options.force).map(done),
        Verb::List(options) => Ok((list(&root, &options)?, 0)),
        Verb::Ps(id, format, options) => {
            let dir = Dir::open(&root, &id)?;
            let state = read(&dir)?;
            let mut all: Vec<i32> =
                state.init.filter(|init| init.is_alive()).map(|init| init.pid).into_iter().collect();
            all.extend(dir.execs().into_iter().map(|exec| exec.pid));
            Ok((process_table::show(&all, format, &options)?, 0))
        }
        Verb::Pause(named) => asked(&root, &named.id, async |task| task.pause().await).map(done),
        Verb::Resume(named) => asked(&root, &named.id, async |task| task.resume().await).map(done),
    }
}

/// Asks the daemon of a container that has one.
fn asked(root: &Path, id: &str, ask: impl AsyncFnOnce(Task) -> Result<(), Error>) -> Result<(), Error> {
    let dir = Dir::open(root, id)?;
    let state = read(&dir)?;
    if !state.init.is_some_and(Identity::is_alive) {
        return Err(Error::NotRunning(id.to_owned()));
    }
    runtime()?.block_on(async { ask(Task::connect(&dir).await?).await })
}

fn read(dir: &Dir) -> Result<State, Error> {
    dir.read()?.ok_or_else(|| Error::Missing(dir.id().to_owned()))
}

/// What a container is, in the words of the specification.
fn status(dir: &Dir, state: &State) -> &'static str {
    match state.init {
        None if state.creator.is_alive() => "creating",
        None => "stopped",
        Some(init) if !init.is_alive() => "stopped",
        Some(_) if !state.made => "creating",
        Some(_) => {
            let asked =
                runtime().and_then(|runtime| runtime.block_on(async { Task::connect(dir).await?.status().await }));
            match asked {
                Ok(Some(status)) => status,
                // It has just ended, and its daemon with it.
                Ok(None) | Err(_) => "stopped",
            }
        }
    }
}

fn describe(dir: &Dir, state: &State) -> serde_json::Value {
    let status = status(dir, state);
    let pid = state.init.filter(|_| matches!(status, "created" | "running" | "paused")).map_or(0, |init| init.pid);
    json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": pid,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "annotations": state.annotations,
        "owner": "",
    })
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn state(root: &Path, id: &str) -> Result<String, Error> {
    let dir = Dir::open(root, id)?;
    let state = read(&dir)?;
    Ok(pretty(&describe(&dir, &state)))
}

fn list(root: &Path, options: &args::List) -> Result<String, Error> {
    let mut found = Vec::new();
    for id in Dir::list(root)? {
        // One may go while we look.
        let Ok(dir) = Dir::open(root, &id) else { continue };
        let Ok(Some(state)) = dir.read() else { continue };
        found.push(describe(&dir, &state));
    }
    let text = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if options.quiet {
        return Ok(found.iter().map(|container| text(&container["id"]) + "\n").collect());
    }
    if options.json || options.format == Format::Json {
        return Ok(pretty(&found.into()));
    }
    let mut rows =
        vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(|head| (head.to_owned(), Style::Dim)).to_vec()];
    for container in &found {
        let cell = |key: &str| (text(&container[key]), Style::Plain);
        rows.push(["id", "pid", "status", "bundle", "created"].map(cell).to_vec());
    }
    Ok(columns(&rows, colours()))
}

fn refuse_descriptors(count: u32) -> Result<(), Error> {
    if count == 0 {
        return Ok(());
    }
    Err(Error::Option {
        option: format!("--preserve-fds {count}"),
        why: "a descriptor of the host cannot be handed to a process in a VM: use a volume or a published port",
    })
}

/// The shim's program: beside this one, or in PATH.
fn find_shim() -> Result<PathBuf, Error> {
    let own = env::current_exe().map_err(Error::step("find own program"))?;
    let own = own.parent().unwrap_or(Path::new("/")).to_owned();
    let path = env::var_os("PATH").unwrap_or_default();
    let mut places = std::iter::once(own.clone()).chain(env::split_paths(&path));
    places.find_map(|dir| Some(dir.join(SHIM)).filter(|path| path.is_file())).ok_or(Error::NoShim(own))
}

/// Makes a container and its keeper; after a failure nothing of them is left.
fn make(root: &Path, new: &args::New, what: What, detached: bool) -> Result<(Dir, vz_sys::process::Process), Error> {
    refuse_descriptors(new.preserve_fds)?;
    let shim = find_shim()?;
    let bundle = Bundle::read(&new.bundle)?;
    let terminal = bundle.terminal();
    check_console(terminal, detached, new.console_socket.as_deref())?;
    let dir = Dir::create(root, &new.id)?;
    let made = || -> Result<_, Error> {
        let state = State {
            oci_version: bundle.config.oci_version.clone(),
            id: new.id.clone(),
            rootfs: bundle.rootfs(),
            bundle: bundle.dir,
            created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
            annotations: bundle.config.annotations.unwrap_or_default(),
            namespace: state::namespace(root),
            shim: shim.clone(),
            creator: Identity::this().map_err(Error::step("look up own process"))?,
            init: None,
            made: false,
        };
        dir.write(&state)?;
        let console = new.console_socket.as_deref().map(tty::to_socket).transpose()?;
        let job = Job { root: root.to_owned(), id: new.id.clone(), what, terminal, detached };
        let keeper = keeper::start(&job, console)?;
        match write_pid(new.pid_file.as_deref(), &keeper) {
            Ok(()) => Ok(keeper),
            Err(error) => {
                keeper.kill(Signal::SIGKILL).map_err(Error::step("undo"))?;
                keeper.wait().map_err(Error::step("undo"))?;
                Err(error)
            }
        }
    };
    match made() {
        Ok(keeper) => Ok((dir, keeper)),
        Err(error) => {
            if let Err(more) = take_away(root, &dir, &shim) {
                return Err(Error::Said(format!(
                    "{}; undo: {}",
                    crate::check::chain(&error),
                    crate::check::chain(&more)
                )));
            }
            Err(error)
        }
    }
}

fn check_console(terminal: bool, detached: bool, socket: Option<&Path>) -> Result<(), Error> {
    let option = |why| Err(Error::Option { option: "--console-socket".into(), why });
    match (terminal, detached, socket) {
        (true, true, None) => {
            option("the process wants a terminal, and this command does not stay: say where to send it")
        }
        (_, false, Some(_)) => option("the terminal stays with this command: leave it out, or add --detach"),
        (false, _, Some(_)) => option("the process has no terminal: leave it out, or set process.terminal"),
        _ => Ok(()),
    }
}

fn write_pid(path: Option<&Path>, keeper: &vz_sys::process::Process) -> Result<(), Error> {
    path.map_or(Ok(()), |path| state::replace(path, keeper.pid().to_string().as_bytes()))
}

fn create(root: &Path, debug: bool, new: &args::New) -> Result<(), Error> {
    let what = What::Init { debug, kernel_profile: new.kernel_profile.clone(), start: false };
    make(root, new, what, true).map(drop)
}

fn start_new(root: &Path, debug: bool, options: &args::Run) -> Result<u8, Error> {
    let what = What::Init { debug, kernel_profile: options.new.kernel_profile.clone(), start: true };
    if options.detach {
        return make(root, &options.new, what, true).map(|_| 0);
    }
    let terminal = Bundle::read(&options.new.bundle)?.terminal();
    let signals = Signals::take()?;
    let raw = if terminal { Some(tty::Raw::stdin()?) } else { None };
    let (dir, keeper) = make(root, &options.new, what, false)?;
    let status = signals.until_the_end(&keeper);
    drop(raw);
    if !options.keep {
        take_away(root, &dir, &find_shim()?)?;
    }
    status
}

fn exec(root: &Path, options: &args::Exec) -> Result<u8, Error> {
    refuse_descriptors(options.preserve_fds)?;
    let dir = Dir::open(root, &options.id)?;
    let state = read(&dir)?;
    match status(&dir, &state) {
        "running" => {}
        "paused" => {
            return Err(Error::Option { option: options.id.clone(), why: "the container is paused: resume it" });
        }
        _ => return Err(Error::NotRunning(options.id.clone())),
    }
    let process = spec::exec_process(options, &state.bundle)?;
    let terminal = process["terminal"] == true;
    check_console(terminal, options.detach, options.console_socket.as_deref())?;
    let what = What::Exec { process };
    let job = Job { root: root.to_owned(), id: options.id.clone(), what, terminal, detached: options.detach };
    if options.detach {
        let console = options.console_socket.as_deref().map(tty::to_socket).transpose()?;
        let keeper = keeper::start(&job, console)?;
        return write_pid(options.pid_file.as_deref(), &keeper).map(|()| 0);
    }
    let signals = Signals::take()?;
    let raw = if terminal { Some(tty::Raw::stdin()?) } else { None };
    let keeper = keeper::start(&job, None)?;
    write_pid(options.pid_file.as_deref(), &keeper)?;
    let status = signals.until_the_end(&keeper);
    drop(raw);
    status
}

fn start(root: &Path, id: &str) -> Result<(), Error> {
    let dir = Dir::open(root, id)?;
    let state = read(&dir)?;
    match status(&dir, &state) {
        "created" => asked(root, id, async |task| task.start("").await),
        status => Err(Error::NotCreated { id: id.to_owned(), status }),
    }
}

fn kill(root: &Path, options: &args::Kill) -> Result<(), Error> {
    let signal = signal(&options.signal)?;
    let dir = Dir::open(root, &options.id)?;
    let state = read(&dir)?;
    match status(&dir, &state) {
        "created" | "running" | "paused" => {}
        _ => return Err(Error::NotRunning(options.id.clone())),
    }
    asked(root, &options.id, async |task| match task.kill("", signal, options.all).await {
        // The daemon's words for a process that has ended meanwhile.
        Err(Error::Said(said)) if said.contains("process already finished") => {
            Err(Error::NotRunning(options.id.clone()))
        }
        // The container has ended, and its daemon with it, before that could answer.
        Err(Error::Task { .. }) if !state.init.is_some_and(Identity::is_alive) => Ok(()),
        other => other,
    })
}

/// A signal, by name (with or without SIG) or number.
fn signal(text: &str) -> Result<u32, Error> {
    if let Ok(number) = text.parse::<u32>() {
        return if number <= 64 { Ok(number) } else { Err(Error::Signal(text.to_owned())) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    name.parse::<Signal>().map(|signal| (signal as i32).unsigned_abs()).map_err(|_| Error::Signal(text.to_owned()))
}

fn delete(root: &Path, id: &str, force: bool) -> Result<(), Error> {
    let dir = match Dir::open(root, id) {
        Err(Error::Missing(_)) if force => {
            // Somebody may have removed the directory, and with it all but the sandbox's own journal.
            return unwind(&find_shim()?, &state::namespace(root), id);
        }
        other => other?,
    };
    if !dir.try_lock()? {
        if !force {
            return Err(Error::Busy(id.to_owned()));
        }
        if let Some(state) = dir.read()? {
            for process in [Some(state.creator), state.init].into_iter().flatten() {
                end(process).map_err(Error::step("end the container's creation"))?;
            }
        }
        dir.lock()?;
    }
    // It may be gone by now.
    if !dir.path().exists() {
        return if force { Ok(()) } else { Err(Error::Missing(id.to_owned())) };
    }
    let state = match dir.read() {
        // One that cannot be read is in nobody's way.
        Err(Error::Json { .. }) if force => None,
        other => other?,
    };
    if let (Some(state), false) = (&state, force) {
        match status(&dir, state) {
            "stopped" | "created" => {}
            status => return Err(Error::NotStopped { id: id.to_owned(), status }),
        }
    }
    let shim = state.map(|state| state.shim).filter(|shim| shim.is_file()).map_or_else(find_shim, Ok)?;
    take_away(root, &dir, &shim)
}

/// Ends all that lives of a container, and takes away all that it has. The caller has the lock.
fn take_away(root: &Path, dir: &Dir, shim: &Path) -> Result<(), Error> {
    let state = match dir.read() {
        Err(Error::Json { .. }) => None,
        other => other?,
    };
    if let Some(init) = state.as_ref().and_then(|state| state.init) {
        end(init).map_err(Error::step("end the container's keeper"))?;
    }
    let namespace = state.map_or_else(|| state::namespace(root), |state| state.namespace);
    unwind(shim, &namespace, dir.id())?;
    dir.remove()
}

/// Kills a process and waits until it has ended.
fn end(process: Identity) -> io::Result<()> {
    match process.kill(Instant::now() + KILL_DEADLINE)? {
        true => Ok(()),
        false => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Has the shim replay a sandbox's journal, as containerd does after a crash.
fn unwind(shim: &Path, namespace: &str, id: &str) -> Result<(), Error> {
    let done = process::Command::new(shim)
        .args(["-namespace", namespace, "-id", id, "delete"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir("/")
        .output()
        .map_err(Error::at("run", shim))?;
    if done.status.success() {
        return Ok(());
    }
    match String::from_utf8_lossy(&done.stderr).trim() {
        "" => Err(Error::Died { what: "the shim's delete", status: done.status.to_string() }),
        said => Err(Error::Said(said.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for text in ["9", "KILL", "SIGKILL", "sigkill", "kill"] {
            assert_eq!(signal(text).unwrap(), 9, "{text}");
        }
        assert_eq!((signal("0").unwrap(), signal("64").unwrap()), (0, 64));
        for text in ["65", "-1", "SIG", "NOPE", ""] {
            assert!(signal(text).unwrap_err().to_string().contains("is not a signal"), "{text}");
        }
    }

    #[test]
    fn an_error_is_logged_as_callers_of_runc_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        write_log(&path, LogFormat::Json, "no \"c1\"").unwrap();
        write_log(&path, LogFormat::Text, "no \"c1\"").unwrap();
        let text = fs::read_to_string(path).unwrap();
        let (json, text) = text.split_once('\n').unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!((json["level"].as_str(), json["msg"].as_str()), (Some("error"), Some("no \"c1\"")));
        assert!(text.starts_with("time=\"2") && text.ends_with("level=error msg=\"no \\\"c1\\\"\"\n"), "{text}");
    }
}
