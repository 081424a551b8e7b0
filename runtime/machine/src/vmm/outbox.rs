//! Events on their way to the shim, which may be slow to take them.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vz_sys::channel::Channel;

use crate::control::{self, Event};

/// More events than this are not taken from the devices; see [`Outbox::is_full`].
const MOST: usize = 64;

/// The control channel, non-blocking, and what is to be sent over it.
#[derive(Debug)]
pub(super) struct Outbox {
    channel: Channel,
    events: VecDeque<(Event, Option<UnixStream>)>,
}

impl Outbox {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel, events: VecDeque::new() }
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Adds an event, with its descriptor.
    pub(super) fn push(&mut self, event: Event, stream: Option<UnixStream>) {
        self.events.push_back((event, stream));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Whether those who make events should wait.
    pub(super) fn is_full(&self) -> bool {
        self.events.len() >= MOST
    }

    /// Sends what the shim takes without waiting.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some((event, stream)) = self.events.front() {
            let fds: Vec<BorrowedFd<'_>> = stream.iter().map(AsFd::as_fd).collect();
            match control::send(&self.channel, event, &fds) {
                Ok(()) => drop(self.events.pop_front()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Sends everything, however long the shim takes; a shim that is gone is an error.
    pub(super) fn flush_blocking(&mut self) -> io::Result<()> {
        loop {
            self.flush()?;
            if self.is_empty() {
                return Ok(());
            }
            match poll(&mut [PollFd::new(self.channel.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_wait_for_a_slow_shim_and_keep_their_order() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut outbox = Outbox::new(ours);
        for id in 0..10_000 {
            let (_near, far) = UnixStream::pair().unwrap();
            outbox.push(Event::Dialed { id, error: None }, (id % 1000 == 0).then_some(far));
        }
        outbox.flush().unwrap();
        assert!(outbox.is_full());
        for wanted in 0..10_000 {
            let message = theirs.recv().unwrap().unwrap();
            assert_eq!(message.fds.len(), usize::from(wanted % 1000 == 0));
            let event: Event = control::decode(&message.bytes).unwrap();
            assert_eq!(event, Event::Dialed { id: wanted, error: None });
            outbox.flush().unwrap();
        }
        assert!(outbox.is_empty());
        drop(theirs);
        outbox.push(Event::Dialed { id: 0, error: None }, None);
        assert!(outbox.flush_blocking().is_err());
    }
}
