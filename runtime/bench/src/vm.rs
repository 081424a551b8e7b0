//! A VM: the `vmm` process of this same program, started the way the shim starts its own.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
};

use nix::sys::signal::Signal;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
};
use vz_machine::{
    control::{self, BootConfig, Ended, Event, MachineKind, Request},
    spawn::{Spawn, SpawnError},
};
use vz_sys::{channel::Channel, process::Process};

/// Why a VM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its control channel.
    #[error("talk to vmm process")]
    Channel(#[source] io::Error),
    /// It has ended.
    #[error("{}", .0.message)]
    Ended(Ended),
    /// It has ended without a word.
    #[error("vmm process is gone")]
    Gone,
    /// The guest refuses a connection.
    #[error("connect to guest port {port}: {reason}")]
    Dial {
        /// The port.
        port: u32,
        /// What the vmm said.
        reason: String,
    },
}

/// A VM that was started; it ends with this.
#[derive(Debug)]
pub struct Vm {
    channel: AsyncFd<Channel>,
    process: Process,
    machine: Option<MachineKind>,
    /// Connections of the guest that nobody has asked for yet.
    accepted: Vec<(u32, UnixStream)>,
    dials: u64,
}

impl Vm {
    /// Starts it. Call it from the main thread, and in a runtime.
    pub fn start(config: BootConfig, taps: &[OwnedFd]) -> Result<Self, Error> {
        let stderr = io::stderr();
        // As the shim does, so that what is measured is what containers get.
        let spawn =
            Spawn { name: c"vz-linux-bench", stderr: Some(stderr.as_fd()), user_namespace: true, admit: &|_| Ok(()) };
        let (channel, process) = spawn.boot(config, taps)?;
        match channel.set_nonblocking(true).and_then(|()| watch(channel)) {
            Ok(channel) => Ok(Self { channel, process, machine: None, accepted: Vec::new(), dials: 0 }),
            Err(e) => {
                end(&process);
                Err(Error::Channel(e))
            }
        }
    }

    /// Which machine it runs on, once something was heard of the guest.
    pub fn machine(&self) -> Option<MachineKind> {
        self.machine
    }

    async fn event(&self) -> Result<(Event, Option<OwnedFd>), Error> {
        let message = self.channel.async_io(Interest::READABLE, Channel::recv).await.map_err(Error::Channel)?;
        let message = message.ok_or(Error::Gone)?;
        Ok((control::decode(&message.bytes).map_err(Error::Channel)?, message.fds.into_iter().next()))
    }

    /// What can happen at any time; the answer to a dial is handed back.
    async fn next(&mut self) -> Result<Option<(u64, Result<UnixStream, String>)>, Error> {
        match self.event().await? {
            (Event::Launched { machine, .. }, _) => self.machine = Some(machine),
            (Event::Accepted { port }, Some(fd)) => self.accepted.push((port, stream(fd)?)),
            (Event::Dialed { id, error }, fd) => {
                let result = match fd {
                    Some(fd) => Ok(stream(fd)?),
                    None => Err(error.unwrap_or_else(|| "no connection was passed".into())),
                };
                return Ok(Some((id, result)));
            }
            (Event::Ended(ended), _) => return Err(Error::Ended(ended)),
            (Event::Accepted { .. }, None) => {}
        }
        Ok(None)
    }

    /// Waits for the guest's connection to a port of the host's.
    pub async fn connection(&mut self, port: u32) -> Result<UnixStream, Error> {
        loop {
            if let Some(index) = self.accepted.iter().position(|(to, _)| *to == port) {
                return Ok(self.accepted.remove(index).1);
            }
            self.next().await?;
        }
    }

    /// Connects to a port of the guest.
    pub async fn dial(&mut self, port: u32) -> Result<UnixStream, Error> {
        self.dials += 1;
        self.send(&Request::Dial { id: self.dials, port })?;
        loop {
            if let Some((id, result)) = self.next().await?
                && id == self.dials
            {
                return result.map_err(|reason| Error::Dial { port, reason });
            }
        }
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> Error {
        loop {
            if let Err(ended) = self.next().await {
                return ended;
            }
        }
    }

    /// The queue has room for all that is asked here.
    fn send(&self, request: &Request) -> Result<(), Error> {
        control::send(self.channel.get_ref(), request, &[]).map_err(Error::Channel)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        end(&self.process);
    }
}

#[expect(deprecated, reason = "its successor is unsafe; a channel owns one descriptor for as long as it lives")]
fn watch(channel: Channel) -> io::Result<AsyncFd<Channel>> {
    AsyncFd::new(channel)
}

/// Kills it, and waits until everything in its pid namespace is gone. What fails has failed because it is gone already.
fn end(process: &Process) {
    if process.kill(Signal::SIGKILL).is_ok() {
        drop(process.wait());
    }
}

fn stream(fd: OwnedFd) -> Result<UnixStream, Error> {
    let stream = StdUnixStream::from(fd);
    stream.set_nonblocking(true).map_err(Error::Channel)?;
    UnixStream::from_std(stream).map_err(Error::Channel)
}
