//! PID 1 after the boot: one thread and one poll loop.
//!
//! It starts the server and starts it again, forks a worker for each call of libcontainer, reaps whatever ends, and
//! keeps the [`table`] of all that must outlive a server. It never waits for anybody: what the server does not read is
//! queued.

mod reap;
mod supervise;
mod table;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::pipe2,
};
use vz_sys::channel::Channel;

use crate::{
    clock::Moment,
    container::{self, Task},
    log::{self, Log},
    power,
    protocol::{Failure, Key, Report, Request, Stdio, Stream},
    text,
};
use table::{Entry, Kept, Table};

/// What a process's pipe can hold, in bytes.
const PIPE: i32 = 256 * 1024;

/// Why PID 1 cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See the text.
    #[error("watch for signals")]
    Signals(#[source] Errno),
    /// See the text.
    #[error("start the server")]
    Fork(#[source] io::Error),
    /// See the text.
    #[error("wait for events")]
    Poll(#[source] Errno),
    /// See the text.
    #[error("reap children")]
    Reap(#[source] io::Error),
}

/// PID 1.
#[derive(Debug)]
pub struct Init {
    first: Moment,
    log: Log,
    signals: SignalFd,
    server: Server,
    incarnation: u32,
    deaths: VecDeque<Instant>,
    workers: Vec<Worker>,
    table: Table,
}

#[derive(Debug)]
struct Server {
    pid: i32,
    /// Gone once the server has closed its end.
    channel: Option<Channel>,
    /// Reports that it has not had room for.
    outbox: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

/// A forked child that calls libcontainer.
#[derive(Debug)]
struct Worker {
    channel: Channel,
    /// What was asked, by which server.
    id: u64,
    incarnation: u32,
    key: Key,
    starts: bool,
}

impl Init {
    /// Starts the first server.
    pub fn start(first: Moment, log: Log) -> Result<Self, Error> {
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        children.thread_block().map_err(Error::Signals)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&children, flags).map_err(Error::Signals)?;
        let server = supervise::fork_server(&log).map_err(Error::Fork)?;
        let mut init = Self {
            first,
            log,
            signals,
            server,
            incarnation: 0,
            deaths: VecDeque::new(),
            workers: Vec::new(),
            table: Table::default(),
        };
        init.hand_over();
        Ok(init)
    }

    /// Serves until the VM ends.
    pub fn run(mut self) -> ! {
        loop {
            if let Err(e) = self.turn() {
                power::fatal(&text::chain(&e));
            }
        }
    }

    fn turn(&mut self) -> Result<(), Error> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.workers.iter().map(|w| PollFd::new(w.channel.as_fd(), PollFlags::POLLIN)));
        if let Some(channel) = &self.server.channel {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, !self.server.outbox.is_empty());
            fds.push(PollFd::new(channel.as_fd(), events));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::Poll(e)),
        }
        // Everything below asks without waiting, so what poll said need not be looked at. Workers come before exits: a
        // process's exit is told after the answer to the request that made it.
        self.results();
        while matches!(self.signals.read_signal(), Ok(Some(_))) {}
        self.reap()?;
        self.requests();
        self.flush();
        Ok(())
    }

    fn requests(&mut self) {
        loop {
            let Some(channel) = &self.server.channel else { return };
            match channel.recv() {
                Ok(Some(message)) => match serde_json::from_slice(&message.bytes) {
                    Ok(request) => self.request(request, message.fds),
                    Err(e) => tracing::error!("request of the server: {e}"),
                },
                // It has died, and will be reaped.
                Ok(None) => self.server.channel = None,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::error!("receive from the server: {e}");
                    self.server.channel = None;
                }
            }
        }
    }

    fn request(&mut self, request: Request, fds: Vec<OwnedFd>) {
        match request {
            // Nothing is answered before.
            Request::Booted { id } => self.done(id, Ok(0)),
            Request::Create { id, container, stdio } => {
                let key = Key { container, exec: String::new() };
                self.make(id, key, &stdio, fds);
            }
            Request::Exec { id, key, stdio } => self.make(id, key, &stdio, fds),
            Request::Start { id, container } => {
                let key = Key { container: container.clone(), exec: String::new() };
                if self.table.living(&key).is_none() {
                    return self.done(id, Err(Failure::Gone));
                }
                if let Err(e) = self.fork_worker(id, key, Task::Start { container }, Vec::new()) {
                    self.done(id, Err(failed("fork", &e)));
                }
            }
            Request::Signal { id, key, signal } => {
                let result = match self.table.living(&key) {
                    None => Err(Failure::Gone),
                    Some(pid) => vz_sys::fork::kill(nix::unistd::Pid::from_raw(pid), signal)
                        .map(|()| 0)
                        .map_err(|e| failed("send signal", &e)),
                };
                self.done(id, result);
            }
            Request::CloseStream { key, stream } => self.table.close_stream(&key, stream),
            Request::Forget { key } => self.table.forget(&key),
            Request::Log { level } => self.log.set_level(log::level(&level)),
        }
    }

    /// Makes a process: a container's init or an exec.
    fn make(&mut self, id: u64, key: Key, stdio: &Stdio, hosts: Vec<OwnedFd>) {
        if self.table.contains(&key) {
            return self.done(id, Err(Failure::Exists));
        }
        let made = pipes(stdio, hosts).and_then(|Pipes { kept, theirs }| {
            let task = if key.exec.is_empty() {
                Task::Create { container: key.container.clone(), terminal: stdio.terminal }
            } else {
                Task::Exec { key: key.clone(), terminal: stdio.terminal }
            };
            self.fork_worker(id, key.clone(), task, theirs)?;
            Ok(kept)
        });
        match made {
            Ok(kept) => self.table.insert(key, Entry::new(stdio.terminal, kept)),
            Err(e) => self.done(id, Err(failed("prepare the process", &e))),
        }
    }

    fn done(&mut self, id: u64, result: Result<i32, Failure>) {
        self.tell(&Report::Done { id, result, log: Vec::new() }, Vec::new());
    }

    /// Sends a report, or queues it.
    fn tell(&mut self, report: &Report, fds: Vec<OwnedFd>) {
        match serde_json::to_vec(report) {
            Ok(bytes) => self.server.outbox.push_back((bytes, fds)),
            Err(e) => tracing::error!("write report: {e}"),
        }
        self.flush();
    }

    fn flush(&mut self) {
        let Some(channel) = &self.server.channel else { return };
        while let Some((bytes, fds)) = self.server.outbox.front() {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match channel.send(bytes, &borrowed) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return,
                Err(e) => tracing::error!("report to the server: {e}"),
                Ok(()) => {}
            }
            self.server.outbox.pop_front();
        }
    }

    fn fork_worker(&mut self, id: u64, key: Key, task: Task, stdio: Vec<(Stream, OwnedFd)>) -> io::Result<()> {
        let starts = matches!(task, Task::Start { .. });
        let (ours, theirs) = Channel::pair()?;
        ours.set_nonblocking(true)?;
        if vz_sys::fork::fork()? == vz_sys::fork::Fork::Child {
            container::run(task, stdio, &theirs, &self.log);
        }
        self.workers.push(Worker { channel: ours, id, incarnation: self.incarnation, key, starts });
        Ok(())
    }
}

struct Pipes {
    kept: Vec<Kept>,
    theirs: Vec<(Stream, OwnedFd)>,
}

/// A pipe for each stream. A terminal has its connection only: its master comes when the process is there.
fn pipes(stdio: &Stdio, hosts: Vec<OwnedFd>) -> io::Result<Pipes> {
    if hosts.len() != stdio.streams.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors and streams do not match"));
    }
    let mut pipes = Pipes { kept: Vec::new(), theirs: Vec::new() };
    for (stream, host) in stdio.streams.iter().copied().zip(hosts) {
        let process = if stdio.terminal {
            // A place for the master: see `Init::results`.
            host.try_clone()?
        } else {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            // Fewer turns between the process and the server; without it things go on as well.
            let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE));
            let (ours, theirs) = if stream == Stream::Stdin { (writer, reader) } else { (reader, writer) };
            pipes.theirs.push((stream, theirs));
            ours
        };
        pipes.kept.push(Kept { stream, host, process });
    }
    Ok(pipes)
}

fn failed(what: &str, error: &io::Error) -> Failure {
    Failure::Failed(format!("{what}: {error}"))
}
