//! The control channel as whoever has started a vmm process uses it, in a tokio runtime.
//!
//! [`Client::next`] must be called for as long as anything is expected: answers to [`Client::dial`] come that way too.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    sync::oneshot::{self, Sender},
};
use vz_sys::{channel::Channel, sync::lock};

use crate::control::{self, Ended, Event, MachineKind, Request};

/// Why the vmm cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not answer any more.
    #[error("vmm process is gone")]
    Gone,
    /// The channel cannot be used.
    #[error("use channel to vmm")]
    Channel(#[source] io::Error),
    /// A message could not be sent.
    #[error("send request to vmm")]
    Send(#[source] io::Error),
    /// Receiving a message failed, or its bytes are no message.
    #[error("receive from vmm")]
    Receive(#[source] io::Error),
    /// A connection to the guest was refused.
    #[error("connect to guest port {port}: {reason}")]
    Dial {
        /// The port.
        port: u32,
        /// What the vmm said.
        reason: String,
    },
    /// The passed descriptor is unusable.
    #[error("use connection from vmm")]
    Connection(#[source] io::Error),
}

/// What the vmm says by itself.
#[derive(Debug)]
pub enum Said {
    /// The VM runs.
    Launched {
        /// On which machine.
        machine: MachineKind,
        /// CPU time of the vmm until then, in microseconds.
        cpu_us: u64,
    },
    /// The guest has connected to a port of the host's.
    Accepted {
        /// The port.
        port: u32,
        /// The connection, or why it cannot be used.
        stream: Result<UnixStream, Error>,
    },
    /// The VM has ended; the last one.
    Ended(Ended),
}

type Answer = Sender<Result<OwnedFd, String>>;

/// This end of the channel.
#[derive(Debug)]
pub struct Client {
    channel: AsyncFd<Channel>,
    dials: Mutex<HashMap<u64, Answer>>,
    next: AtomicU64,
}

/// A dial that is waited for; forgotten with whoever waits.
struct Dialing<'c> {
    client: &'c Client,
    id: u64,
}

impl Drop for Dialing<'_> {
    fn drop(&mut self) {
        self.client.dials().remove(&self.id);
    }
}

impl Client {
    /// Makes a channel usable in the current runtime.
    pub fn new(channel: Channel) -> Result<Self, Error> {
        channel.set_nonblocking(true).map_err(Error::Channel)?;
        let channel = watch(channel).map_err(Error::Channel)?;
        Ok(Self { channel, dials: Mutex::default(), next: AtomicU64::default() })
    }

    /// Connects to a port of the guest. The vmm has a deadline for the guest; one that is stopped itself does not even
    /// refuse. Whoever drops this has given up, and an answer that comes after that reaches nobody.
    pub async fn dial(&self, port: u32) -> Result<UnixStream, Error> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.dials().insert(id, answer);
        let _dialing = Dialing { client: self, id };
        self.send(&Request::Dial { id, port }).await?;
        let answer = answered.await.map_err(|_| Error::Gone)?;
        stream(answer.map_err(|reason| Error::Dial { port, reason })?)
    }

    /// The next that the vmm says; `None` where it has closed its end. Nothing is lost if this is dropped.
    pub async fn next(&self) -> Result<Option<Said>, Error> {
        loop {
            let Some((event, fd)) = self.receive().await.map_err(Error::Receive)? else { return Ok(None) };
            match event {
                Event::Launched { machine, cpu_us } => return Ok(Some(Said::Launched { machine, cpu_us })),
                Event::Ended(ended) => return Ok(Some(Said::Ended(ended))),
                Event::Dialed { id, error } => {
                    if let Some(answer) = self.dials().remove(&id) {
                        let result = fd.ok_or_else(|| error.unwrap_or_else(|| "no connection was passed".into()));
                        // A caller that gave up needs no answer.
                        drop(answer.send(result));
                    }
                }
                Event::Accepted { port } => {
                    // Without a connection it is nothing.
                    if let Some(fd) = fd {
                        return Ok(Some(Said::Accepted { port, stream: stream(fd) }));
                    }
                }
            }
        }
    }

    /// Nothing comes any more: whoever waits for a connection is told that the vmm is gone.
    pub fn close(&self) {
        self.dials().clear();
    }

    async fn send(&self, request: &Request) -> Result<(), Error> {
        let bytes = control::encode(request).map_err(Error::Send)?;
        loop {
            let mut ready = self.channel.writable().await.map_err(Error::Send)?;
            match ready.try_io(|channel| channel.get_ref().send(&bytes, &[])) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(e)) => match e.kind() {
                    // The second where it died with our messages unread.
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => return Err(Error::Gone),
                    _ => return Err(Error::Send(e)),
                },
                Err(_) => {}
            }
        }
    }

    async fn receive(&self) -> io::Result<Option<(Event, Option<OwnedFd>)>> {
        loop {
            let mut ready = self.channel.readable().await?;
            if let Ok(received) = ready.try_io(|channel| channel.get_ref().recv()) {
                let Some(message) = received? else { return Ok(None) };
                return Ok(Some((control::decode(&message.bytes)?, message.fds.into_iter().next())));
            }
        }
    }

    fn dials(&self) -> MutexGuard<'_, HashMap<u64, Answer>> {
        lock(&self.dials)
    }
}

#[expect(deprecated, reason = "its successor is unsafe; a channel owns one descriptor for as long as it lives")]
fn watch(channel: Channel) -> io::Result<AsyncFd<Channel>> {
    AsyncFd::new(channel)
}

fn stream(fd: OwnedFd) -> Result<UnixStream, Error> {
    let stream = StdUnixStream::from(fd);
    stream.set_nonblocking(true).map_err(Error::Connection)?;
    UnixStream::from_std(stream).map_err(Error::Connection)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::fd::{AsFd, BorrowedFd},
        time::Duration,
    };

    use tokio::{io::AsyncReadExt, time::timeout};

    use super::*;

    fn pair() -> (Client, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        (Client::new(ours).unwrap(), theirs)
    }

    fn tell(theirs: &Channel, event: &Event, fds: &[BorrowedFd<'_>]) {
        control::send(theirs, event, fds).unwrap();
    }

    /// The request that the vmm is sent.
    fn asked(theirs: &Channel) -> Request {
        control::decode(&theirs.recv().unwrap().unwrap().bytes).unwrap()
    }

    /// Dials, and has what the vmm says handed on.
    async fn dial(client: &Client, port: u32) -> Result<UnixStream, Error> {
        tokio::select! {
            dialed = client.dial(port) => dialed,
            said = async { while client.next().await?.is_some() {} Ok::<_, Error>(()) } => {
                said?;
                client.close();
                Err(Error::Gone)
            }
        }
    }

    #[tokio::test]
    async fn each_dial_gets_its_own_answer() {
        let (client, theirs) = pair();
        let (near, mut far) = StdUnixStream::pair().unwrap();
        let vmm = tokio::task::spawn_blocking(move || {
            let asked = [asked(&theirs), asked(&theirs)];
            for dial in [Request::Dial { id: 0, port: 7 }, Request::Dial { id: 1, port: 8 }] {
                assert!(asked.contains(&dial), "{asked:?}");
            }
            // Not in their order, and one that nobody has asked for.
            tell(&theirs, &Event::Dialed { id: 1, error: Some("nobody listens".into()) }, &[]);
            tell(&theirs, &Event::Dialed { id: 9, error: None }, &[]);
            tell(&theirs, &Event::Dialed { id: 0, error: None }, &[near.as_fd()]);
            theirs
        });
        let both = async { tokio::join!(client.dial(7), client.dial(8)) };
        let (first, second) = tokio::select! {
            both = both => both,
            said = client.next() => panic!("{said:?}"),
        };
        assert_eq!(second.unwrap_err().to_string(), "connect to guest port 8: nobody listens");
        far.write_all(b"hello").unwrap();
        drop(far);
        let mut said = String::new();
        first.unwrap().read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello");
        drop(vmm.await.unwrap());
        assert!(client.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_dial_that_is_given_up_is_forgotten() {
        let (client, theirs) = pair();
        assert!(timeout(Duration::from_millis(20), dial(&client, 7)).await.is_err());
        assert!(client.dials().is_empty());
        let (near, _far) = StdUnixStream::pair().unwrap();
        tell(&theirs, &Event::Dialed { id: 0, error: None }, &[near.as_fd()]);
        tell(&theirs, &Event::Launched { machine: MachineKind::Kvm, cpu_us: 5 }, &[]);
        assert!(matches!(client.next().await, Ok(Some(Said::Launched { machine: MachineKind::Kvm, cpu_us: 5 }))));
    }

    #[tokio::test]
    async fn a_vmm_that_is_gone_takes_nothing_and_answers_nobody() {
        let (client, theirs) = pair();
        let (dialed, ()) = tokio::join!(client.dial(7), async {
            while client.dials().is_empty() {
                tokio::task::yield_now().await;
            }
            client.close();
        });
        assert!(matches!(dialed, Err(Error::Gone)), "{dialed:?}");
        drop(theirs);
        let dialed = client.dial(7).await;
        assert!(matches!(dialed, Err(Error::Gone)), "{dialed:?}");
        assert!(client.dials().is_empty());
    }

    #[tokio::test]
    async fn a_connection_of_the_guests_comes_with_its_port_and_never_without_itself() {
        let (client, theirs) = pair();
        let (near, _far) = StdUnixStream::pair().unwrap();
        tell(&theirs, &Event::Accepted { port: 6 }, &[]);
        tell(&theirs, &Event::Accepted { port: 5 }, &[near.as_fd()]);
        assert!(matches!(client.next().await, Ok(Some(Said::Accepted { port: 5, stream: Ok(_) }))));
        theirs.send(b"no event", &[]).unwrap();
        assert!(matches!(client.next().await, Err(Error::Receive(_))));
    }
}
