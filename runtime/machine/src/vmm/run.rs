//! The main loop: waits for the shim, the machine, the devices and the clock, and tells the shim.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use vz_sys::fd::set_nonblocking;
use vz_virtio::vsock;

use super::{Console, Failures, Outbox, Pipe, Started};
use crate::{
    Exit, Machine,
    control::{self, BootConfig, Cause, Ended, Event, MachineKind, Request},
};

/// Time for the guest's kernel to answer a dial; it does so without its agent.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes that are kept of what QEMU says.
const COMPLAINTS: usize = 4096;
/// Time for a machine that lost a device to end by itself.
const LAST_GASP: Duration = Duration::from_millis(500);

/// Why the machine is being ended by us.
#[derive(Debug)]
struct Verdict {
    cause: Cause,
    message: String,
}

pub(super) struct Loop {
    machine: Box<dyn Machine>,
    kind: MachineKind,
    vsock: vsock::Handle,
    failures: Failures,
    outbox: Outbox,
    console: Console,
    console_pipe: Pipe,
    complaints_pipe: Pipe,
    complaints: Vec<u8>,
    /// Until the guest's first connection.
    boot_deadline: Option<Instant>,
    boot_limit: Duration,
    /// Dials without an answer, by when they must have one.
    dials: HashMap<u64, Instant>,
    /// Set where the machine is to end, with the time at which it is killed.
    verdict: Option<(Verdict, Instant)>,
}

impl Loop {
    pub(super) fn new(
        config: &BootConfig,
        started: Started,
        failures: Failures,
        mut outbox: Outbox,
    ) -> io::Result<Self> {
        let Started { mut machine, vsock, console, cpu_us } = started;
        let kind = machine.kind();
        tracing::info!(machine = ?kind, cpu_us, "launched");
        outbox.push(Event::Launched { machine: kind, cpu_us }, None);
        let outputs = machine.outputs();
        for fd in outputs.console.iter().chain(&outputs.complaints) {
            set_nonblocking(fd, true)?;
        }
        let boot_limit = Duration::from_millis(config.boot_deadline_ms);
        Ok(Self {
            machine,
            kind,
            vsock,
            failures,
            outbox,
            console,
            console_pipe: Pipe(outputs.console),
            complaints_pipe: Pipe(outputs.complaints),
            complaints: Vec::new(),
            boot_deadline: Instant::now().checked_add(boot_limit),
            boot_limit,
            dials: HashMap::new(),
            verdict: None,
        })
    }

    /// Runs until the machine has ended and the shim knows, or the shim is gone.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            self.outbox.flush()?;
            let ready = self.wait()?;
            if ready.console {
                let console = &mut self.console;
                self.console_pipe.read(|bytes| console.write(bytes))?;
            }
            if ready.complaints {
                let complaints = &mut self.complaints;
                self.complaints_pipe.read(|bytes| keep_last(complaints, bytes))?;
            }
            if ready.ended {
                return self.ended();
            }
            if ready.control && !self.requests()? {
                tracing::info!("shim is gone");
                return self.machine.kill();
            }
            if ready.vsock {
                self.connections();
            }
            if ready.failures {
                let _ = self.failures.news.read();
                while let Ok(message) = self.failures.said.try_recv() {
                    // A machine that dies loses its devices first; how it died says more.
                    self.end(Cause::Machine, message, LAST_GASP);
                }
            }
            self.deadlines()?;
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let input = PollFlags::POLLIN;
        let mut control = input;
        control.set(PollFlags::POLLOUT, !self.outbox.is_empty());
        let mut watched = vec![
            (Watched::Control, PollFd::new(self.outbox.channel().as_fd(), control)),
            (Watched::Ended, PollFd::new(self.machine.ended(), input)),
            (Watched::Failures, PollFd::new(self.failures.news.as_fd(), input)),
        ];
        if !self.outbox.is_full() {
            watched.push((Watched::Vsock, PollFd::new(self.vsock.readiness(), input)));
        }
        let pipes = [(Watched::Console, &self.console_pipe), (Watched::Complaints, &self.complaints_pipe)];
        watched.extend(pipes.into_iter().filter_map(|(name, pipe)| Some((name, PollFd::new(pipe.fd()?, input)))));
        let (names, mut fds): (Vec<_>, Vec<_>) = watched.into_iter().unzip();
        match poll(&mut fds, self.timeout()) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(e) => return Err(e.into()),
        }
        let mut ready = Ready::default();
        for (name, fd) in names.into_iter().zip(&fds) {
            let seen = fd.revents().unwrap_or(PollFlags::empty());
            if !seen.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
                continue;
            }
            match name {
                Watched::Control => ready.control = true,
                Watched::Ended => ready.ended = true,
                Watched::Failures => ready.failures = true,
                Watched::Vsock => ready.vsock = true,
                Watched::Console => ready.console = true,
                Watched::Complaints => ready.complaints = true,
            }
        }
        Ok(ready)
    }

    fn timeout(&self) -> PollTimeout {
        let verdict = self.verdict.as_ref().map(|(_, at)| *at);
        let next = self.dials.values().copied().chain(self.boot_deadline).chain(verdict).min();
        let Some(next) = next else { return PollTimeout::NONE };
        // Rounded up, so that the deadline has passed when poll returns.
        let left = next.saturating_duration_since(Instant::now()).as_millis().saturating_add(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    /// Reads what the shim wants; `false` where it is gone.
    fn requests(&mut self) -> io::Result<bool> {
        loop {
            let message = match self.outbox.channel().recv() {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(e) => return Err(e),
            };
            match control::decode(&message.bytes)? {
                Request::Boot(_) => tracing::error!("second boot request ignored"),
                Request::Dial { id, port } => {
                    if let Some(deadline) = Instant::now().checked_add(DIAL_DEADLINE) {
                        self.dials.insert(id, deadline);
                    }
                    self.vsock.dial(id, port);
                }
            }
        }
    }

    fn connections(&mut self) {
        while !self.outbox.is_full() {
            let Some(event) = self.vsock.next() else { return };
            match event {
                vsock::Event::Accepted { port, stream } => {
                    if self.boot_deadline.take().is_some() {
                        tracing::info!(port, "guest connected");
                    }
                    self.outbox.push(Event::Accepted { port }, Some(stream));
                }
                vsock::Event::Dialed { id, result } => {
                    // Otherwise its time was up, and the shim knows.
                    if self.dials.remove(&id).is_some() {
                        let (stream, error) = match result {
                            Ok(stream) => (Some(stream), None),
                            Err(e) => (None, Some(e.to_string())),
                        };
                        self.outbox.push(Event::Dialed { id, error }, stream);
                    }
                }
            }
        }
    }

    fn deadlines(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let late: Vec<u64> = self.dials.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in late {
            self.dials.remove(&id);
            self.vsock.cancel(id);
            let error = format!("guest did not answer within {} s", DIAL_DEADLINE.as_secs());
            self.outbox.push(Event::Dialed { id, error: Some(error) }, None);
        }
        if self.boot_deadline.is_some_and(|at| at <= now) {
            self.boot_deadline = None;
            let message = format!(
                "guest agent did not connect within {:.1} s: see the guest's console, or raise the boot deadline",
                self.boot_limit.as_secs_f64()
            );
            self.end(Cause::BootTimeout, message, Duration::ZERO);
        }
        if self.verdict.as_ref().is_some_and(|(_, at)| *at <= now) {
            self.machine.kill()?;
            // Not again: from here on its end is waited for.
            if let (Some((_, at)), Some(never)) = (&mut self.verdict, now.checked_add(Duration::from_secs(3600))) {
                *at = never;
            }
        }
        Ok(())
    }

    /// Has the machine killed after `grace`; the first reason counts.
    fn end(&mut self, cause: Cause, message: String, grace: Duration) {
        self.boot_deadline = None;
        let at = Instant::now().checked_add(grace).unwrap_or_else(Instant::now);
        match &self.verdict {
            None => self.verdict = Some((Verdict { cause, message }, at)),
            Some(_) => tracing::info!("while the machine ends: {message}"),
        }
    }

    /// The machine has ended: tells the shim how.
    fn ended(mut self) -> io::Result<()> {
        let exit = self.machine.wait()?;
        // All writers are gone, so these end.
        let console = &mut self.console;
        self.console_pipe.drain(|bytes| console.write(bytes))?;
        let complaints = &mut self.complaints;
        self.complaints_pipe.drain(|bytes| keep_last(complaints, bytes))?;
        // What the guest still got out: its connections are the shim's to read.
        self.connections();
        let ended = self.judge(&exit);
        tracing::info!(cause = ?ended.cause, "VM ended: {}", ended.message);
        self.outbox.push(Event::Ended(ended), None);
        self.outbox.flush_blocking()
    }

    fn judge(&self, exit: &Exit) -> Ended {
        let console = self.console.tail();
        let panicked = console.lines().rev().find(|line| line.contains("Kernel panic - not syncing"));
        let (cause, message) = match (&self.verdict, exit) {
            (Some((verdict, _)), exit) if verdict.cause != Cause::Machine || matches!(exit, Exit::Failed(_)) => {
                (verdict.cause, verdict.message.clone())
            }
            (_, Exit::Guest) => match panicked {
                Some(line) => (Cause::Panic, format!("guest kernel panicked: {}", strip_time(line))),
                None if self.boot_deadline.is_some() => {
                    (Cause::Shutdown, "guest ended before its agent connected: see the guest's console".into())
                }
                None => (Cause::Shutdown, "guest shut down".into()),
            },
            // Once the agent has connected the guest is not ours alone any more, and may have brought this about.
            (_, Exit::Unfit(how)) if self.boot_deadline.is_some() => (Cause::Kvm, how.clone()),
            (_, Exit::Unfit(how)) => (Cause::Machine, how.clone()),
            (_, Exit::Failed(how)) => {
                let said = String::from_utf8_lossy(&self.complaints);
                let message = match said.trim() {
                    "" => how.clone(),
                    said => format!("{how}: {said}"),
                };
                // A machine that says no before the guest says anything has not been started.
                let launched = self.boot_deadline.is_none() || !self.console.is_empty();
                (if launched { Cause::Machine } else { Cause::Launch }, message)
            }
        };
        Ended { cause, message, console }
    }
}

impl std::fmt::Debug for Loop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loop").field("machine", &self.kind).field("verdict", &self.verdict).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy)]
enum Watched {
    Control,
    Ended,
    Failures,
    Vsock,
    Console,
    Complaints,
}

/// What [`Loop::wait`] found.
#[derive(Debug, Default)]
struct Ready {
    control: bool,
    ended: bool,
    failures: bool,
    vsock: bool,
    console: bool,
    complaints: bool,
}

impl Pipe {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Reads once.
    fn read(&mut self, mut f: impl FnMut(&[u8])) -> io::Result<bool> {
        let Some(fd) = &self.0 else { return Ok(false) };
        let mut bytes = [0; 16 * 1024];
        match nix::unistd::read(fd, &mut bytes) {
            Ok(0) => {
                self.0 = None;
                Ok(false)
            }
            Ok(count) => {
                f(bytes.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(Errno::EINTR) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads what is there.
    fn drain(&mut self, mut f: impl FnMut(&[u8])) -> io::Result<()> {
        while self.read(&mut f)? {}
        Ok(())
    }
}

fn keep_last(kept: &mut Vec<u8>, bytes: &[u8]) {
    kept.extend_from_slice(bytes);
    let surplus = kept.len().saturating_sub(COMPLAINTS);
    kept.drain(..surplus);
}

/// A line of the kernel without its time stamp.
fn strip_time(line: &str) -> &str {
    line.split_once("] ").map_or(line, |(_, text)| text).trim()
}
