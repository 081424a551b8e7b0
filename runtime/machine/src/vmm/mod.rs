//! The `vmm` process: runs one VM for the shim that started it, and dies with either.
//!
//! It is pid 1 of a pid namespace, so that nothing in there outlives it, and starts in a mount namespace in which the
//! share is a shared mount. One thread, the main one, talks to the shim and watches the machine; each device has
//! threads of its own.
//!
//! Threat: the guest, through the devices and its console, see `vz-virtio`; and QEMU, which a guest may have taken
//! over. Neither can reach the shim but through the events below.

use std::{
    io,
    os::fd::OwnedFd,
    panic,
    process::ExitCode,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};

use nix::{
    sys::eventfd::{EfdFlags, EventFd},
    time::{ClockId, clock_gettime},
};
use vz_jail::{Denied, Role};
use vz_sys::{channel::Channel, error::chain, process::inherited_fd};

use crate::{
    LaunchError, Machine,
    control::{self, BootConfig, CONTROL_FD, Cause, Ended, Event, Request},
    devices::{Devices, ShareRoot},
    launch,
};

mod console;
mod log;
mod outbox;
mod run;

use console::Console;
use outbox::Outbox;

/// Runs the process from its start to its end. Call it first thing in `main`, with one thread.
///
/// Its exit status is 0 where the shim got [`Event::Ended`].
pub fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // The shim is gone or talks nonsense: there is nobody else to tell.
            tracing::error!("vmm: {}", chain(&e));
            ExitCode::FAILURE
        }
    }
}

/// What cannot be told to the shim.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("take over control channel")]
    Channel(#[source] io::Error),
    #[error("shim closed the control channel before it asked for anything")]
    Closed,
    #[error("first request is not a boot")]
    Order,
    #[error("watch machine")]
    Watch(#[source] io::Error),
}

/// Why the VM could not be started.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Jail(#[from] vz_jail::Error),
    #[error("create console.log in {dir}")]
    Console { dir: String, source: io::Error },
}

/// Failures of threads, which end the machine.
#[derive(Debug)]
struct Failures {
    said: Receiver<String>,
    news: Arc<EventFd>,
}

impl Failures {
    fn new() -> io::Result<(Self, Alarm)> {
        let news = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let news = Arc::new(news);
        let (say, said) = channel();
        Ok((Self { said, news: Arc::clone(&news) }, Alarm { say, news }))
    }
}

/// The other end of [`Failures`].
#[derive(Debug, Clone)]
pub(crate) struct Alarm {
    say: Sender<String>,
    news: Arc<EventFd>,
}

impl Alarm {
    /// Ends the machine, for this reason.
    pub(crate) fn raise(&self, message: String) {
        // The receiver lives as long as the process.
        if self.say.send(message).is_ok() {
            let _ = self.news.write(1);
        }
    }
}

fn serve() -> Result<(), Error> {
    let control = Channel::from_fd(inherited_fd(CONTROL_FD).map_err(Error::Channel)?);
    let message = control.recv().map_err(Error::Channel)?.ok_or(Error::Closed)?;
    let Request::Boot(config) = control::decode(&message.bytes).map_err(Error::Channel)? else {
        return Err(Error::Order);
    };
    log::install(&config.sandbox, &config.log_level);
    let (failures, alarm) = Failures::new().map_err(Error::Channel)?;
    watch_panics(alarm.clone());
    control.set_nonblocking(true).map_err(Error::Channel)?;
    let mut outbox = Outbox::new(control);

    let started = match start(&config, message.fds, alarm) {
        Ok(started) => started,
        Err(e) => {
            let ended = Ended { cause: Cause::Launch, message: chain(&e), console: String::new() };
            outbox.push(Event::Ended(ended), None);
            return outbox.flush_blocking().map_err(Error::Channel);
        }
    };
    run::Loop::new(&config, started, failures, outbox).map_err(Error::Watch)?.run().map_err(Error::Watch)
}

/// A VM that runs.
#[derive(Debug)]
struct Started {
    machine: Box<dyn Machine>,
    vsock: vz_virtio::vsock::Handle,
    console: Console,
    cpu_us: u64,
}

/// The privileged sequence: everything of the host that is needed is opened, then left behind.
fn start(config: &BootConfig, files: Vec<OwnedFd>, alarm: Alarm) -> Result<Started, StartError> {
    let nofile = vz_jail::prepare()?;
    let console = Console::create(&config.state_dir, config.console_limit)
        .map_err(|source| StartError::Console { dir: config.state_dir.display().to_string(), source })?;
    let bundle = vz_linux::Bundle::open(&config.guest_bundle).map_err(LaunchError::from)?;
    // QEMU first: it starts while we go on, and waits for its devices.
    let mut machine = launch(config, &bundle, files)?;
    drop(bundle);
    let proc_self_fd = vz_jail::enter_root(&config.share)?;
    vz_jail::restrict(if config.report_denied_calls { Denied::Report } else { Denied::Kill })?;
    let share = ShareRoot { path: "/".into(), proc_self_fd, nofile };
    let (devices, vsock) = Devices::new(config, share)?;
    machine.serve(devices, alarm).map_err(StartError::Launch)?;
    // The last to do so: the threads that were started got what this one had.
    vz_jail::enter(Role::Main)?;
    Ok(Started { machine, vsock, console, cpu_us: cpu_us() })
}

/// CPU time that this process has used.
fn cpu_us() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A panic of any thread ends the machine, whoever catches it.
fn watch_panics(alarm: Alarm) {
    panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let message = format!("thread {} panicked: {info}", thread.name().unwrap_or("without name"));
        tracing::error!("{message}");
        alarm.raise(message);
    }));
}

/// A descriptor that is read until its end.
#[derive(Debug)]
struct Pipe(Option<OwnedFd>);

#[cfg(test)]
mod tests;
