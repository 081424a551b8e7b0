//! Stdio streams that the host has opened, until the call that names them comes; or the other way round.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_vsock::VsockStream;
use vz_proto::frame;
use vz_sys::sync;

use super::error::{CallError, Result};

/// For a connection to say its token.
const TOKEN: Duration = Duration::from_secs(5);
/// For a stream that a call names to arrive.
const ARRIVAL: Duration = Duration::from_secs(5);
/// For a stream that has arrived to be named.
const CLAIM: Duration = Duration::from_secs(60);
/// Most streams that wait to be named.
const MOST: usize = 1024;

/// The streams that have no call yet, and the calls that have no stream yet, by token.
#[derive(Debug, Default)]
pub struct Streams(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    arrived: HashMap<String, VsockStream>,
    wanted: HashMap<String, oneshot::Sender<VsockStream>>,
}

impl Streams {
    /// Takes a new connection.
    pub async fn arrive(self: Arc<Self>, mut stream: VsockStream) {
        let token = match timeout(TOKEN, frame::read_token(&mut stream)).await {
            Ok(Ok(token)) => token,
            Ok(Err(e)) => return tracing::warn!("stream without a token: {}", crate::text::chain(&e)),
            Err(_) => return tracing::warn!("stream without a token"),
        };
        if self.keep(token.clone(), stream) {
            sleep(CLAIM).await;
            if self.lock().arrived.remove(&token).is_some() {
                tracing::warn!("closed a stream that no call has named");
            }
        }
    }

    /// Passes a stream on, or keeps it: whether it is kept.
    fn keep(&self, token: String, stream: VsockStream) -> bool {
        let mut waiting = self.lock();
        if let Some(wanted) = waiting.wanted.remove(&token) {
            // Where the call has given up meanwhile, the stream is closed.
            let _ = wanted.send(stream);
            return false;
        }
        if waiting.arrived.len() >= MOST {
            tracing::warn!("refused a stream: {MOST} others wait to be named");
            return false;
        }
        waiting.arrived.insert(token, stream);
        true
    }

    /// The stream of that token; `what` says in an error which it is.
    pub async fn claim(&self, token: &str, what: &str) -> Result<VsockStream> {
        let arrival = {
            let mut waiting = self.lock();
            if let Some(stream) = waiting.arrived.remove(token) {
                return Ok(stream);
            }
            let (send, receive) = oneshot::channel();
            waiting.wanted.insert(token.into(), send);
            receive
        };
        if let Ok(Ok(stream)) = timeout(ARRIVAL, arrival).await {
            return Ok(stream);
        }
        self.lock().wanted.remove(token);
        Err(CallError::Failed(format!("no stream for {what} has arrived within {} s", ARRIVAL.as_secs())))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        sync::lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::{fd::OwnedFd, unix::net::UnixStream as StdStream};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
    };

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    /// The host's end of a connection and ours. Any connected socket will do for what is done with it.
    fn pair() -> (UnixStream, VsockStream) {
        let (near, far) = StdStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        (UnixStream::from_std(near).unwrap(), OwnedFd::from(far).into())
    }

    #[tokio::test]
    async fn streams_and_calls_meet_whichever_is_first() {
        for call_first in [false, true] {
            let streams = Arc::new(Streams::default());
            let (mut near, far) = pair();
            frame::write_token(&mut near, TOKEN).await.unwrap();
            near.write_all(b"x").await.unwrap();
            let arrive = tokio::spawn(Arc::clone(&streams).arrive(far));
            if !call_first {
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
            let mut stream = streams.claim(TOKEN, "stdin").await.unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), b'x');
            arrive.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_does_not_wait_for_ever() {
        let streams = Streams::default();
        let error = streams.claim(TOKEN, "stdin").await.unwrap_err();
        assert_eq!(error, CallError::Failed("no stream for stdin has arrived within 5 s".into()));
        assert!(streams.lock().wanted.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_nobody_names_is_closed() {
        let streams = Arc::new(Streams::default());
        let (mut near, far) = pair();
        frame::write_token(&mut near, TOKEN).await.unwrap();
        Arc::clone(&streams).arrive(far).await;
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}
