//! The guest agent, as the shim sees it: a link that comes up once the guest has booted, and may come up again.
//!
//! Threat: the guest may say anything. Messages are bounded by `vz_proto`, answers are checked where they are used,
//! log records are limited in rate.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::protobuf::Message;
use tokio::{
    net::UnixStream,
    sync::{Semaphore, watch},
    time::timeout,
};
use ttrpc::{
    Code,
    asynchronous::{Client, transport::Socket},
    context::{self, Context},
    proto::MESSAGE_LENGTH_MAX,
};
use vz_proto::{AgentClient, Empty, Event, Welcome, handshake};

use super::{answers::Answers, error::Error, log::bounded};

/// How long the handshake may take once the guest has connected.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a new connection may wait for the end of the one that it replaces.
const REPLACE_DEADLINE: Duration = Duration::from_secs(2);
/// Requests under way or waiting for the agent, of one sandbox.
const MOST_REQUESTS: usize = 128;
/// Largest request: ttrpc's limit without what it puts around one (service, method, deadline; some 100 bytes).
const LARGEST_REQUEST: u64 = (MESSAGE_LENGTH_MAX - 1024) as u64;
/// How long the news of the VM's end may take after its connections have broken.
const NEWS: Duration = Duration::from_secs(1);

/// Whether the agent can be asked.
#[derive(Debug, Clone)]
enum State {
    /// It has not connected yet.
    Booting,
    Up(Connected),
    /// Its connection broke, and it may come back.
    Lost,
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
    places: Semaphore,
    log_level: &'static str,
}

/// Why the agent's connection is not used.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// What it said.
    #[error(transparent)]
    Hello(#[from] handshake::Error),
    /// It did not say hello in time.
    #[error("the guest agent said nothing for {} s", HANDSHAKE_DEADLINE.as_secs())]
    Timeout,
}

impl Agent {
    /// A link that waits for the guest. Requests take at most `deadline`.
    pub fn new(deadline: Duration, log_level: &'static str) -> Self {
        let (state, places) = (watch::Sender::new(State::Booting), Semaphore::new(MOST_REQUESTS));
        Self { state, deadline, places, log_level }
    }

    /// Says hello on a new control connection, and takes it for all requests from now on.
    pub async fn connect(&self, mut stream: UnixStream, wanted: &str, hostname: &str) -> Result<(), HandshakeError> {
        let hello = timeout(HANDSHAKE_DEADLINE, async {
            let hello = handshake::hello(&mut stream, wanted).await?;
            let settings =
                Welcome { log_level: self.log_level.to_owned(), hostname: hostname.to_owned(), ..Default::default() };
            handshake::welcome(&mut stream, settings).await?;
            Ok::<_, handshake::Error>(hello)
        })
        .await
        .map_err(|_| HandshakeError::Timeout)??;
        tracing::info!(
            init_ms = hello.init_ns / 1_000_000,
            hello_ms = hello.uptime_ns / 1_000_000,
            incarnation = hello.incarnation,
            "guest agent is connected"
        );
        let client = AgentClient::new(Client::new(Socket::new(Answers::new(stream))));
        self.set(State::Up(Connected(client)));
        Ok(())
    }

    /// Changes the state, except of a link that has ended.
    fn set(&self, to: State) {
        self.state.send_if_modified(|state| match state {
            State::Down(_) => false,
            state => {
                *state = to;
                true
            }
        });
    }

    /// Ends the link for good: every request from now on fails with `why`.
    pub fn down(&self, why: &str) {
        self.set(State::Down(why.into()));
    }

    /// Whether a new control connection may take the link's place: not while the one that there is works.
    ///
    /// Any process of the guest can connect to the host's port, and must not pass for the agent. An agent that was
    /// started again may be faster than the news of the end of its predecessor's connection, which is waited for.
    pub async fn is_free(&self) -> bool {
        let mut state = self.state.subscribe();
        let free = state.wait_for(|state| matches!(state, State::Booting | State::Lost));
        matches!(timeout(REPLACE_DEADLINE, free).await, Ok(Ok(_)))
    }

    /// The connection was lost: requests wait for the agent's next one.
    pub fn lost(&self) {
        self.state.send_if_modified(|state| match state {
            State::Up(_) => {
                *state = State::Lost;
                true
            }
            _ => false,
        });
    }

    /// Waits for the guest's first connection. The vmm has a deadline for the boot; this one is for a vmm that says
    /// nothing.
    pub async fn booted(&self, deadline: Duration) -> Result<(), Error> {
        match timeout(deadline, self.client()).await {
            Ok(client) => client.map(drop),
            Err(_) => Err(Error::Away { what: "boot", after: deadline }),
        }
    }

    /// The client, once there is a connection.
    async fn client(&self) -> Result<AgentClient, Error> {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| matches!(state, State::Up(_) | State::Down(_))).await;
        match known.map(|state| state.clone()) {
            Ok(State::Up(Connected(client))) => Ok(client),
            Ok(State::Down(why)) => Err(Error::Ended(why)),
            Ok(State::Booting | State::Lost) | Err(_) => Err(Error::Ended("the sandbox has ended".into())),
        }
    }

    /// One request, with the usual deadline; see [`Agent::ask_within`].
    pub async fn ask<T, R: Message, F>(
        &self,
        what: &'static str,
        request: R,
        ask: impl FnOnce(AgentClient, Context, R) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        self.ask_within(self.deadline, what, request, ask).await
    }

    /// One request. The deadline is for all of it: the agent's return, the way there, and the answer.
    pub async fn ask_within<T, R: Message, F>(
        &self,
        deadline: Duration,
        what: &'static str,
        request: R,
        ask: impl FnOnce(AgentClient, Context, R) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let bytes = request.compute_size();
        if bytes > LARGEST_REQUEST {
            return Err(Error::TooLarge { what, bytes, most: LARGEST_REQUEST });
        }
        let Ok(_place) = self.places.try_acquire() else {
            return Err(Error::Busy { what, most: MOST_REQUESTS });
        };
        let begun = Instant::now();
        let asked = async {
            let client = self.client().await?;
            // The agent gives up then too, and lets the exits go that it has held back for the answer.
            let left = deadline.saturating_sub(begun.elapsed());
            let context = context::with_timeout(i64::try_from(left.as_nanos()).unwrap_or(i64::MAX));
            match ask(client, context, request).await {
                Ok(answer) => Ok(answer),
                // ttrpc reports its own time-out as one of many errors without a code.
                Err(_) if begun.elapsed() >= deadline => Err(self.late(what, deadline)),
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::DEADLINE_EXCEEDED => {
                    Err(self.late(what, deadline))
                }
                Err(ttrpc::Error::RpcStatus(status)) => {
                    Err(Error::Refused { code: status.code(), message: bounded(status.message()).into() })
                }
                Err(error) => Err(self.broken(what, &error).await),
            }
        };
        // A VM that ends must not leave a request waiting for its deadline.
        tokio::select! {
            answer = timeout(deadline, asked) => answer.unwrap_or_else(|_| Err(self.late(what, deadline))),
            () = self.ended() => Err(self.why()),
        }
    }

    /// What a request is told whose time is up.
    fn late(&self, what: &'static str, after: Duration) -> Error {
        match &*self.state.borrow() {
            State::Up(_) => Error::Timeout { what, after },
            State::Booting | State::Lost => Error::Away { what, after },
            State::Down(why) => Error::Ended(why.clone()),
        }
    }

    /// What a broken connection means: the VM's end, whose cause follows at once, or the agent's restart.
    async fn broken(&self, what: &'static str, error: &ttrpc::Error) -> Error {
        match timeout(NEWS, self.ended()).await {
            Ok(()) => self.why(),
            Err(_) => Error::Lost { what, why: error.to_string() },
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
            State::Down(why) => Error::Ended(why.clone()),
            _ => Error::Ended("the sandbox has ended".into()),
        }
    }

    /// Hands on every event of the connected agent until the connection is lost.
    pub async fn events(&self, mut each: impl FnMut(Event)) -> Result<(), Error> {
        let client = self.client().await?;
        let failed = |error: ttrpc::Error| Error::Lost { what: "the stream of events", why: error.to_string() };
        let mut stream = client.events(Context::default(), &Empty::default()).await.map_err(failed)?;
        while let Some(event) = stream.recv().await.map_err(failed)? {
            each(event);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use ttrpc::{
        asynchronous::{Server, TtrpcContext, transport::Listener},
        get_status,
    };
    use vz_proto::{Agent as Service, ContainerRequest, Hello, StatsResponse, create_agent, frame};

    use super::*;
    use vz_sys::sync::lock;

    const VERSION: &str = "1.2.3";
    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(60);

    /// An agent whose answer to every request about statistics is the container's id: a code, or nothing at all.
    struct Fake;

    #[async_trait]
    impl Service for Fake {
        async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
            match request.container_id.as_str() {
                "silent" => std::future::pending().await,
                "refused" => Err(ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, "no such container"))),
                "talkative" => Err(ttrpc::Error::RpcStatus(get_status(Code::INTERNAL, "x".repeat(2 * 4096)))),
                _ => Ok(StatsResponse::default()),
            }
        }
    }

    fn link(deadline: Duration) -> Agent {
        Agent::new(deadline, "info")
    }

    /// Says hello on a new connection; the guest's end of it.
    async fn hello(agent: &Agent, version: &str) -> Result<UnixStream, HandshakeError> {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let hello = Hello { agent_version: version.into(), ..Default::default() };
        frame::write(&mut guest, &hello).await.unwrap();
        agent.connect(ours, VERSION, "host").await?;
        let welcome: Welcome = frame::read(&mut guest).await.unwrap().unwrap();
        assert_eq!((welcome.hostname.as_str(), welcome.seed.len()), ("host", 64));
        Ok(guest)
    }

    /// Connects an agent that answers. It does so until the server is dropped.
    async fn answering(agent: &Agent) -> Server {
        let guest = hello(agent, VERSION).await.unwrap();
        let once = Box::pin(futures::stream::once(async { Ok::<_, std::io::Error>(guest) }));
        let mut server = Server::new().add_listener(Listener::new(once)).register_service(create_agent(Arc::new(Fake)));
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn an_agent_of_the_bundle_is_connected_and_no_other() {
        let agent = link(SOON);
        let error = hello(&agent, "0.0.1").await.unwrap_err();
        assert!(matches!(error, HandshakeError::Hello(handshake::Error::Version { found, .. }) if found == "0.0.1"));
        let (ours, guest) = UnixStream::pair().unwrap();
        drop(guest);
        assert!(matches!(
            agent.connect(ours, VERSION, "host").await,
            Err(HandshakeError::Hello(handshake::Error::Closed))
        ));
        assert!(agent.is_free().await);
        let _guest = hello(&agent, VERSION).await.unwrap();
        assert!(!agent.is_free().await);
        agent.lost();
        assert!(agent.is_free().await);
    }

    #[tokio::test]
    async fn a_request_says_why_it_has_no_answer() {
        let agent = link(SOON);
        let error = agent.stats("c").await.unwrap_err();
        assert!(matches!(error, Error::Away { what: "stats", .. }) && error.is_open(), "{error}");
        let server = answering(&agent).await;
        let error = agent.stats("silent").await.unwrap_err();
        assert!(matches!(error, Error::Timeout { what: "stats", .. }) && error.is_open(), "{error}");
        assert!(agent.stats("refused").await.unwrap_err().is_not_found());
        let error = agent.stats("talkative").await.unwrap_err();
        assert!(matches!(&error, Error::Refused { message, .. } if message.len() == 4096), "{error}");
        agent.stats("c").await.unwrap();
        agent.down("the vm has ended");
        drop(server);
        assert!(matches!(agent.stats("c").await.unwrap_err(), Error::Ended(why) if &*why == "the vm has ended"));
    }

    #[tokio::test]
    async fn the_vms_end_answers_all_who_wait() {
        let agent = Arc::new(link(LATE));
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let agent = agent.clone();
                tokio::spawn(async move { agent.stats("c").await })
            })
            .collect();
        tokio::task::yield_now().await;
        agent.down("over");
        for waiter in waiting {
            assert!(matches!(waiter.await.unwrap().unwrap_err(), Error::Ended(_)));
        }
        // It does not come back.
        assert!(hello(&agent, VERSION).await.is_ok());
        assert!(matches!(agent.stats("c").await.unwrap_err(), Error::Ended(_)));
    }

    #[tokio::test]
    async fn requests_are_bounded_in_size_and_number() {
        let agent = Arc::new(link(LATE));
        let large = agent.update_network(vec![0; 5 << 20]).await.unwrap_err();
        assert!(matches!(large, Error::TooLarge { what: "update network", .. }), "{large}");
        let waiting: Vec<_> = (0..MOST_REQUESTS)
            .map(|_| {
                let agent = agent.clone();
                tokio::spawn(async move { agent.stats("c").await })
            })
            .collect();
        while agent.places.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        assert!(matches!(agent.stats("c").await.unwrap_err(), Error::Busy { most: MOST_REQUESTS, .. }));
        agent.down("over");
        for waiter in waiting {
            waiter.await.unwrap().unwrap_err();
        }
    }

    #[tokio::test]
    async fn requests_wait_for_an_agent_that_comes_back() {
        let agent = Arc::new(link(LATE));
        let first = hello(&agent, VERSION).await.unwrap();
        drop(first);
        agent.lost();
        let answered = Arc::new(Mutex::new(false));
        let waiting = {
            let (agent, answered) = (agent.clone(), answered.clone());
            tokio::spawn(async move {
                agent.stats("c").await.unwrap();
                *lock(&answered) = true;
            })
        };
        tokio::task::yield_now().await;
        assert!(!*lock(&answered));
        let _server = answering(&agent).await;
        waiting.await.unwrap();
        assert!(*lock(&answered));
    }
}
