//! The owner's side of the device: dials, and what became of connections.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender},
    },
};

use nix::sys::eventfd::EventFd;

use super::DIALS;

/// Why a dial failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The guest answered with a reset.
    #[error("guest port {0} refused")]
    Refused(u32),
    /// The guest reset its vsock device, or the device failed.
    #[error("guest's vsock device was reset")]
    Reset,
    /// There are [`DIALS`] connections.
    #[error("more than {DIALS} connections")]
    TooMany,
    /// No socket could be made.
    #[error("make socketpair: {0}")]
    Socket(io::ErrorKind),
}

/// What the device tells its owner.
#[derive(Debug)]
pub enum Event {
    /// A dial has its answer.
    Dialed {
        /// The id that [`Handle::dial`] got.
        id: u64,
        /// The host's end.
        result: Result<UnixStream, DialError>,
    },
    /// The guest connected to a port on the list.
    Accepted {
        /// The host's port.
        port: u32,
        /// The host's end.
        stream: UnixStream,
    },
}

#[derive(Debug)]
pub(super) enum Command {
    Dial { id: u64, port: u32 },
    Cancel { id: u64 },
}

/// The owner's side of the device, in another thread.
#[derive(Debug)]
pub struct Handle {
    pub(super) commands: Sender<Command>,
    pub(super) wake: Arc<EventFd>,
    pub(super) events: Receiver<Event>,
    pub(super) news: Arc<EventFd>,
    pub(super) untaken: Arc<AtomicUsize>,
}

impl Handle {
    /// Connects to a port of the guest; the answer is an [`Event::Dialed`] with the same id.
    ///
    /// Before the guest's driver is ready the dial waits for it.
    pub fn dial(&self, id: u64, port: u32) {
        self.command(Command::Dial { id, port });
    }

    /// Gives up a dial. Where it was answered already, the answer stands.
    pub fn cancel(&self, id: u64) {
        self.command(Command::Cancel { id });
    }

    fn command(&self, command: Command) {
        // Fails only where the device is gone, which ends the machine.
        if self.commands.send(command).is_ok() {
            signal(&self.wake);
        }
    }

    /// Readable while there may be events.
    pub fn readiness(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    /// The next event.
    pub fn next(&self) -> Option<Event> {
        // Cleared before looking, so that what comes after the look is signalled again.
        let _ = self.news.read();
        let event = self.events.try_recv().ok()?;
        if matches!(event, Event::Accepted { .. }) {
            self.untaken.fetch_sub(1, Ordering::Relaxed);
        }
        signal(&self.news);
        Some(event)
    }
}

/// Makes an eventfd readable. It cannot be full, and it cannot be closed.
pub(super) fn signal(fd: &EventFd) {
    let _ = fd.write(1);
}
