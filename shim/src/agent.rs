//! The guest agent, as the shim sees it: a link that comes up once the guest has booted, and may come up again.
//!
//! Threat: the guest may say anything. Messages are bounded by `vz_proto`, answers are checked where they are used,
//! log records are limited in rate.

use std::{
    fs::File,
    future::Future,
    io::Read,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{net::UnixStream, sync::watch};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
};
use vz_proto::{AgentClient, Empty, Event, Hello, LogRecord, Welcome, frame};

use crate::{error::Error, limit::Limit};

/// How long the handshake may take once the guest has connected.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a new connection may wait for the end of the one that it replaces.
const REPLACE_DEADLINE: Duration = Duration::from_secs(2);
/// Log records of the guest that are passed on in ten seconds; what is more is counted.
pub const LOG_RATE: u32 = 1000;
/// Longest log message, in bytes.
const LOG_LINE: usize = 4096;

/// Whether the agent can be asked.
#[derive(Debug, Clone)]
enum State {
    Booting,
    Up(Connected),
    Down(Arc<str>),
}

#[derive(Clone)]
struct Connected(AgentClient);

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connected")
    }
}

/// The link to the agent.
#[derive(Debug)]
pub struct Agent {
    state: watch::Sender<State>,
    deadline: Duration,
    log_level: &'static str,
}

/// Why the agent's connection is not used.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// A frame could not be read or written.
    #[error("exchange hello with the guest agent")]
    Frame(#[from] frame::Error),
    /// It closed the connection.
    #[error("the guest agent closed its connection without a hello")]
    Closed,
    /// It did not say hello in time.
    #[error("the guest agent said nothing for {} s", HANDSHAKE_DEADLINE.as_secs())]
    Timeout,
    /// It is not the agent of the bundle.
    #[error(
        "the guest agent has version {found:?}, the guest bundle names {wanted:?}: build or install the bundle again"
    )]
    Version {
        /// What it says.
        found: String,
        /// What version.json says.
        wanted: String,
    },
    /// No entropy for the guest.
    #[error("read entropy for the guest")]
    Entropy(#[source] std::io::Error),
}

impl Agent {
    /// A link that waits for the guest. Requests take at most `deadline`.
    pub fn new(deadline: Duration, log_level: &'static str) -> Self {
        Self { state: watch::Sender::new(State::Booting), deadline, log_level }
    }

    /// Says hello on a new control connection, and takes it for all requests from now on.
    pub async fn connect(&self, mut stream: UnixStream, wanted: &str, hostname: &str) -> Result<(), HandshakeError> {
        let hello = tokio::time::timeout(HANDSHAKE_DEADLINE, async {
            let hello: Hello = frame::read(&mut stream).await?.ok_or(HandshakeError::Closed)?;
            if hello.agent_version != wanted {
                return Err(HandshakeError::Version { found: hello.agent_version, wanted: wanted.to_owned() });
            }
            let mut seed = vec![0; 64];
            File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut seed)).map_err(HandshakeError::Entropy)?;
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let welcome = Welcome {
                seed,
                realtime_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
                log_level: self.log_level.to_owned(),
                hostname: hostname.to_owned(),
                ..Default::default()
            };
            frame::write(&mut stream, &welcome).await?;
            Ok(hello)
        })
        .await
        .map_err(|_| HandshakeError::Timeout)??;
        tracing::info!(
            init_ms = hello.init_ns / 1_000_000,
            hello_ms = hello.uptime_ns / 1_000_000,
            incarnation = hello.incarnation,
            "guest agent is connected"
        );
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        self.state.send_if_modified(|state| match state {
            State::Down(_) => false,
            state => {
                *state = State::Up(Connected(client));
                true
            }
        });
        Ok(())
    }

    /// Ends the link for good: every request from now on fails with `why`.
    pub fn down(&self, why: &str) {
        self.state.send_if_modified(|state| match state {
            State::Down(_) => false,
            state => {
                *state = State::Down(why.into());
                true
            }
        });
    }

    /// Whether a new control connection may take the link's place: not while the one that there is works.
    ///
    /// Any process of the guest can connect to the host's port, and must not pass for the agent. An agent that was
    /// started again may be faster than the news of the end of its predecessor's connection, which is waited for.
    pub async fn is_free(&self) -> bool {
        let mut state = self.state.subscribe();
        let free = state.wait_for(|state| matches!(state, State::Booting));
        matches!(tokio::time::timeout(REPLACE_DEADLINE, free).await, Ok(Ok(_)))
    }

    /// The connection was lost: requests wait for the agent's next one.
    pub fn lost(&self) {
        self.state.send_if_modified(|state| match state {
            State::Up(_) => {
                *state = State::Booting;
                true
            }
            _ => false,
        });
    }

    /// The client, once the guest has booted; that it does in time is the vmm's to see to.
    pub async fn client(&self) -> Result<AgentClient, Error> {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Booting)).await.map(|state| state.clone());
        match known {
            Ok(State::Up(Connected(client))) => Ok(client),
            Ok(State::Down(why)) => Err(Error::Sandbox(why)),
            Ok(State::Booting) | Err(_) => Err(Error::Sandbox("the sandbox has ended".into())),
        }
    }

    /// One request, with its deadline, its failure in the agent's own words.
    pub async fn ask<T, F>(&self, what: &'static str, ask: impl FnOnce(AgentClient, Context) -> F) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let client = self.client().await?;
        let deadline = i64::try_from(self.deadline.as_nanos()).unwrap_or(i64::MAX);
        let asked = ask(client, context::with_timeout(deadline));
        // A VM that ends must not leave a request waiting for its deadline.
        tokio::select! {
            answer = asked => match answer {
                Ok(answer) => Ok(answer),
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::DEADLINE_EXCEEDED => {
                    Err(Error::AgentTimeout(what))
                }
                Err(ttrpc::Error::RpcStatus(status)) => {
                    Err(Error::Agent { code: status.code(), message: bounded(status.message()).into() })
                }
                Err(error) => Err(self.broken(what, &error).await),
            },
            () = self.ended() => Err(self.why()),
        }
    }

    /// What a broken connection means: the VM's end, whose cause follows at once, or the agent's restart.
    async fn broken(&self, what: &'static str, error: &ttrpc::Error) -> Error {
        match tokio::time::timeout(Duration::from_secs(1), self.ended()).await {
            Ok(()) => self.why(),
            Err(_) => Error::Sandbox(format!("the guest agent was lost during {what}: {error}").into()),
        }
    }

    /// Waits until the link has ended for good.
    async fn ended(&self) {
        let mut state = self.state.subscribe();
        // The sender is in self: this fails only when nobody can be waiting.
        drop(state.wait_for(|state| matches!(state, State::Down(_))).await);
    }

    fn why(&self) -> Error {
        match &*self.state.borrow() {
            State::Down(why) => Error::Sandbox(why.clone()),
            _ => Error::Sandbox("the sandbox has ended".into()),
        }
    }

    /// Hands on every event of the connected agent until the connection is lost.
    pub async fn events(&self, mut each: impl FnMut(Event)) -> Result<(), Error> {
        let client = self.client().await?;
        let failed = |error| Error::Message { what: "receive events of the guest agent", source: Box::new(error) };
        let mut stream = client.events(Context::default(), &Empty::default()).await.map_err(failed)?;
        while let Some(event) = stream.recv().await.map_err(failed)? {
            each(event);
        }
        Ok(())
    }
}

/// Passes the guest's log on until its connection ends; `limit` is the sandbox's, however many connections it makes.
pub async fn forward_log(mut stream: UnixStream, limit: &Limit) -> Result<(), frame::Error> {
    loop {
        let Some(record) = frame::read::<LogRecord>(&mut stream).await? else { return Ok(()) };
        match limit.admit() {
            None => continue,
            Some(0) => {}
            Some(left_out) => tracing::warn!(left_out, "guest logs too fast"),
        }
        let (container, message) = (bounded(&record.container_id), bounded(&record.message));
        match record.level.as_str() {
            "error" => tracing::error!(target: "guest", container, "{message}"),
            "warn" => tracing::warn!(target: "guest", container, "{message}"),
            "info" => tracing::info!(target: "guest", container, "{message}"),
            _ => tracing::debug!(target: "guest", container, "{message}"),
        }
    }
}

/// A guest's text, cut to what a log line may have.
pub fn bounded(text: &str) -> &str {
    let mut end = text.len().min(LOG_LINE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
