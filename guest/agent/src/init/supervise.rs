//! The server's life.

use std::{
    collections::VecDeque,
    io,
    time::{Duration, Instant},
};

use vz_sys::{
    channel::Channel,
    fork::{Fork, fork},
};

use super::{Init, Server};
use crate::{
    log::Log,
    power,
    protocol::{Report, Request},
    server, text,
};

/// This many deaths within [`WINDOW`] are one too many: nothing would change with the next server.
const DEATHS: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);

pub(super) fn fork_server(log: &Log) -> io::Result<Server> {
    let (ours, theirs) = Channel::pair()?;
    ours.set_nonblocking(true)?;
    match fork()? {
        Fork::Child => server::run(theirs, log),
        Fork::Parent(pid) => Ok(Server { pid: pid.as_raw(), channel: Some(ours), outbox: VecDeque::new() }),
    }
}

impl Init {
    /// Tells a new server about every process that there is.
    pub(super) fn hand_over(&mut self) {
        let reports: Vec<_> = self
            .table
            .iter()
            .filter_map(|(key, entry)| {
                let mut report = entry.report(key)?;
                let fds = entry.kept.iter().flat_map(|k| [k.host.try_clone(), k.process.try_clone()]);
                let fds = fds.collect::<io::Result<Vec<_>>>().unwrap_or_else(|e| {
                    tracing::error!(?key, "hand stdio to the new server: {e}");
                    report.stdio.streams.clear();
                    Vec::new()
                });
                Some((Report::Process(Box::new(report)), fds))
            })
            .collect();
        for (report, fds) in reports {
            self.tell(&report, fds);
        }
        self.tell(&Report::Ready { incarnation: self.incarnation, first: self.first }, Vec::new());
    }

    pub(super) fn server_died(&mut self, status: u32) {
        // What it still said is heard, except that nobody would get an answer.
        self.last_words();
        let now = Instant::now();
        self.deaths.push_back(now);
        if self.deaths.len() > DEATHS {
            self.deaths.pop_front();
        }
        if self.deaths.len() == DEATHS && self.deaths.front().is_some_and(|first| now.duration_since(*first) < WINDOW) {
            power::fatal(&format!(
                "the server died {DEATHS} times within {} s, last with status {status}",
                WINDOW.as_secs()
            ));
        }
        tracing::error!(status, "the server died, starting another");
        self.incarnation = self.incarnation.saturating_add(1);
        match fork_server(&self.log) {
            Ok(server) => self.server = server,
            Err(e) => power::fatal(&text::chain(&super::Error::Fork(e))),
        }
        self.hand_over();
    }

    fn last_words(&mut self) {
        while let Some(channel) = &self.server.channel {
            let Ok(Some(message)) = channel.recv() else { break };
            match serde_json::from_slice(&message.bytes) {
                Ok(Request::Create { .. } | Request::Exec { .. } | Request::Start { .. }) => {}
                Ok(request) => self.request(request, message.fds),
                Err(e) => tracing::error!("request of the server: {e}"),
            }
        }
        self.server.channel = None;
    }
}
