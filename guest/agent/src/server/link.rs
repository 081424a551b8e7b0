//! The channel to PID 1.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::unix::AsyncFd,
    sync::{mpsc, oneshot},
};
use vz_sys::{channel::Channel, sync::lock};

use super::readiness;
use crate::protocol::{Failure, Report, Request};

/// Sends requests to PID 1.
#[derive(Debug)]
pub struct Link {
    queue: mpsc::UnboundedSender<(Vec<u8>, Vec<OwnedFd>)>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    next: AtomicU64,
}

/// Receives reports from PID 1, and sends what the [`Link`] has queued while it waits.
#[derive(Debug)]
pub struct Reports {
    channel: AsyncFd<Channel>,
    queue: mpsc::UnboundedReceiver<(Vec<u8>, Vec<OwnedFd>)>,
}

/// The answer to a request.
#[derive(Debug)]
pub struct Answer {
    /// A pid, or 0 where the request makes no process.
    pub result: Result<i32, Failure>,
    /// Levels and lines that libcontainer logged.
    pub log: Vec<(String, String)>,
    /// The agent's ends of the process's stdio.
    pub fds: Vec<OwnedFd>,
}

impl Answer {
    fn failed(why: &str) -> Self {
        Self { result: Err(Failure::Failed(why.into())), log: Vec::new(), fds: Vec::new() }
    }
}

/// Takes over the server's end of the channel.
pub fn open(channel: Channel) -> io::Result<(Link, Reports)> {
    channel.set_nonblocking(true)?;
    let (send, receive) = mpsc::unbounded_channel();
    let link = Link { queue: send, waiting: Mutex::default(), next: AtomicU64::new(1) };
    Ok((link, Reports { channel: readiness::register(channel)?, queue: receive }))
}

impl Link {
    /// Asks PID 1 and waits for its answer.
    pub async fn ask(&self, request: impl FnOnce(u64) -> Request, fds: Vec<OwnedFd>) -> Answer {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = oneshot::channel();
        lock(&self.waiting).insert(id, send);
        self.push(&request(id), fds);
        receive.await.unwrap_or_else(|_| Answer::failed("PID 1 does not answer"))
    }

    /// Tells PID 1 something that has no answer.
    pub fn tell(&self, request: &Request) {
        self.push(request, Vec::new());
    }

    /// Passes an answer to whom it may concern.
    pub fn answered(&self, id: u64, answer: Answer) {
        let waiting = lock(&self.waiting).remove(&id);
        // Without anybody waiting, the descriptors are closed here.
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer);
        }
    }

    fn push(&self, request: &Request, fds: Vec<OwnedFd>) {
        match serde_json::to_vec(request) {
            // The receiver goes away with the process only.
            Ok(bytes) => drop(self.queue.send((bytes, fds))),
            Err(e) => tracing::error!("write request: {e}"),
        }
    }
}

impl Reports {
    /// The next report; `None` where PID 1 has closed its end.
    pub async fn next(&mut self) -> io::Result<Option<(Report, Vec<OwnedFd>)>> {
        loop {
            tokio::select! {
                ready = self.channel.readable() => {
                    let mut ready = ready?;
                    match self.channel.get_ref().recv() {
                        Ok(None) => return Ok(None),
                        Ok(Some(message)) => {
                            let report = serde_json::from_slice(&message.bytes).map_err(io::Error::other)?;
                            return Ok(Some((report, message.fds)));
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                        Err(e) => return Err(e),
                    }
                }
                Some((bytes, fds)) = self.queue.recv() => self.send(&bytes, &fds).await?,
            }
        }
    }

    async fn send(&self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.channel.async_io(tokio::io::Interest::WRITABLE, |channel| channel.send(bytes, &borrowed)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn questions_are_answered_while_reports_are_read() {
        let (init, server) = Channel::pair().unwrap();
        let (link, mut reports) = open(server).unwrap();
        let ask = link.ask(|id| Request::Start { id, container: "c".into() }, Vec::new());
        let answer = async {
            let (report, fds) = reports.next().await.unwrap().unwrap();
            let Report::Done { id, result, log } = report else { panic!("{report:?}") };
            link.answered(id, Answer { result, log, fds });
        };
        let respond = async {
            tokio::task::yield_now().await;
            let message = loop {
                match init.recv() {
                    Ok(message) => break message.unwrap(),
                    Err(_) => tokio::task::yield_now().await,
                }
            };
            let Request::Start { id, .. } = serde_json::from_slice(&message.bytes).unwrap() else { panic!() };
            let done = Report::Done { id, result: Ok(7), log: Vec::new() };
            init.send(&serde_json::to_vec(&done).unwrap(), &[]).unwrap();
        };
        init.set_nonblocking(true).unwrap();
        let (answered, (), ()) = tokio::join!(ask, answer, respond);
        assert_eq!(answered.result, Ok(7));
        drop(init);
        assert!(reports.next().await.unwrap().is_none());
    }
}
