//! A VM: the `vmm` process of this same program, started the way the shim starts its own.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    sync::Arc,
};

use nix::sys::signal::Signal;
use tokio::net::UnixStream;
use vz_machine::{
    client::{self, Client, Said},
    control::{BootConfig, Ended, MachineKind},
    spawn::{Spawn, SpawnError},
};
use vz_sys::process::Process;

/// Why a VM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its control channel, or a connection to the guest.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// It has ended.
    #[error("{}", .0.message)]
    Ended(Ended),
}

/// A VM that was started; it ends with this.
#[derive(Debug)]
pub struct Vm {
    client: Arc<Client>,
    process: Process,
    machine: Option<MachineKind>,
    /// Connections of the guest that nobody has asked for yet.
    accepted: Vec<(u32, UnixStream)>,
}

impl Vm {
    /// Starts it. Call it from the main thread, and in a runtime.
    pub fn start(config: BootConfig, taps: &[OwnedFd]) -> Result<Self, Error> {
        let stderr = io::stderr();
        // As the shim does, so that what is measured is what containers get.
        let spawn =
            Spawn { name: c"vz-linux-bench", stderr: Some(stderr.as_fd()), user_namespace: true, admit: &|_| Ok(()) };
        let (channel, process) = spawn.boot(config, taps)?;
        match Client::new(channel) {
            Ok(client) => Ok(Self { client: Arc::new(client), process, machine: None, accepted: Vec::new() }),
            Err(error) => {
                end(&process);
                Err(error.into())
            }
        }
    }

    /// Which machine it runs on, once something was heard of the guest.
    pub fn machine(&self) -> Option<MachineKind> {
        self.machine
    }

    /// Notes what can happen at any time. An end is an error.
    fn note(&mut self, said: Option<Said>) -> Result<(), Error> {
        match said {
            Some(Said::Launched { machine, .. }) => self.machine = Some(machine),
            Some(Said::Accepted { port, stream }) => self.accepted.push((port, stream?)),
            Some(Said::Ended(ended)) => return Err(Error::Ended(ended)),
            None => return Err(client::Error::Gone.into()),
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<(), Error> {
        let said = self.client.next().await?;
        self.note(said)
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
        let client = Arc::clone(&self.client);
        let mut dialed = pin!(client.dial(port));
        loop {
            tokio::select! {
                dialed = &mut dialed => return Ok(dialed?),
                said = client.next() => self.note(said?)?,
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
}

impl Drop for Vm {
    fn drop(&mut self) {
        end(&self.process);
    }
}

/// Kills it, and waits until everything in its pid namespace is gone. What fails has failed because it is gone already.
fn end(process: &Process) {
    if process.kill(Signal::SIGKILL).is_ok() {
        drop(process.wait());
    }
}
