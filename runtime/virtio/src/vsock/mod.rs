//! virtio-vsock (virtio 1.3, section 5.10): stream connections between the guest and sockets of the host.
//!
//! No host path or address is reachable: the host [dials](Handle::dial) a port of the guest, or the guest connects to a
//! port on the list that the device was made with. Either way the host's end is one end of a socketpair, handed out by
//! [`Handle::next`]. Everything else that the guest addresses is reset.
//!
//! Bounds, whatever the guest does: [`DIALS`] and [`GUEST_MADE`] connections, [`connection::BUFFER`] bytes for each,
//! and [`RESETS`] packets that answer nonsense; the guest's queue is not read while there are more.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queue, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
};

mod connection;
mod handle;
pub mod packet;

use connection::{Connection, Origin, Verdict, Violation};
use handle::{Command, signal};
pub use handle::{DialError, Event, Handle};
use packet::{HEADER, Header, STREAM, op};

/// Most connections that the host dialled.
pub const DIALS: usize = 1024;
/// Most connections that the guest made; and most of those that nobody has taken yet, closed ones among them.
pub const GUEST_MADE: usize = 64;
/// Most resets that wait for room in the guest's queue.
const RESETS: usize = 256;
/// Chains of one queue that are served before the other gets its turn.
const BATCH: usize = 256;
/// Turns in one call; then the device calls itself again, so that its other events get their turn.
const TURNS: usize = 16;
/// Context of the host.
const HOST: u64 = 2;
/// Ports that dials come from; those below are for listeners.
const FIRST_PORT: u32 = 1 << 30;
/// Receive, transmit and event queue. A driver keeps a buffer of 4 KiB in every place of the first.
const QUEUE_SIZES: [u16; 3] = [128, 128, 64];
const RX: usize = 0;
const TX: usize = 1;
/// Epoll data of the wake-up; connections count from 1.
const WAKE: u64 = 0;

/// Why the guest's packet was not taken.
#[derive(Debug, thiserror::Error)]
enum BadPacket {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("packet of {0} bytes")]
    Short(usize),
    #[error("buffer of {0} bytes for a packet")]
    NoRoom(usize),
    #[error("packet from cid {0}")]
    Source(u64),
    #[error("packet to cid {0}")]
    Destination(u64),
    #[error("socket type {0}")]
    Type(u16),
    #[error("ports {host} and {guest}: {violation}")]
    Violation { host: u32, guest: u32, violation: Violation },
    #[error("connection to port {0}, which exists already")]
    Duplicate(u32),
    #[error("connection to port {0}, which is closed")]
    Closed(u32),
    #[error("more than {GUEST_MADE} connections")]
    TooMany,
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    guest: u64,
    space: [u8; 8],
    listening: HashSet<u32>,
    epoll: Epoll,
    wake: Arc<EventFd>,
    news: Arc<EventFd>,
    commands: Receiver<Command>,
    events: Sender<Event>,
    untaken: Arc<AtomicUsize>,

    connections: HashMap<u64, Connection>,
    /// By host port and guest port; those that the guest has forgotten are not in here.
    by_ports: HashMap<(u32, u32), u64>,
    next_id: u64,
    next_port: u32,
    dialled: usize,
    guest_made: usize,
    /// Connections that may have something for the guest.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    mistakes: Mistakes,
}

impl Vsock {
    /// A device with this context id for the guest, which can connect to these ports of the host.
    pub fn new(cid: u32, ports: impl IntoIterator<Item = u32>) -> io::Result<(Self, Handle)> {
        let eventfd = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map(Arc::new);
        let (wake, news) = (eventfd()?, eventfd()?);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        let (commands, from_owner) = channel();
        let (to_owner, events) = channel();
        let untaken = Arc::new(AtomicUsize::new(0));
        let device = Self {
            guest: cid.into(),
            space: u64::from(cid).to_le_bytes(),
            listening: ports.into_iter().collect(),
            epoll,
            wake: Arc::clone(&wake),
            news: Arc::clone(&news),
            commands: from_owner,
            events: to_owner,
            untaken: Arc::clone(&untaken),
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            next_id: WAKE,
            next_port: FIRST_PORT,
            dialled: 0,
            guest_made: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            mistakes: Mistakes::new("vsock"),
        };
        Ok((device, Handle { commands, wake, events, news, untaken }))
    }

    fn tell(&self, event: Event) {
        // An owner that is gone has ended the machine.
        if self.events.send(event).is_ok() {
            signal(&self.news);
        }
    }

    // --- The host's side ---------------------------------------------------------------------------------------------

    fn poll(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => 0,
            Err(e) => return Err(Error::System("wait for sockets", e.into())),
        };
        // What does not fit into the array is reported next time: the epoll descriptor stays readable.
        for event in events.iter().take(count) {
            if event.data() == WAKE {
                let _ = self.wake.read();
                self.take_commands();
            } else if let Some(connection) = self.connections.get_mut(&event.data()) {
                connection.host_ready(event.events().intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR));
                self.settle(event.data());
            }
        }
        Ok(())
    }

    fn take_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Dial { id, port }) => self.dial(id, port),
                Ok(Command::Cancel { id }) => self.cancel(id),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn dial(&mut self, id: u64, guest_port: u32) {
        if self.dialled >= DIALS {
            self.tell(Event::Dialed { id, result: Err(DialError::TooMany) });
            return;
        }
        // Fewer connections than ports, so a free one is found.
        let host_port = loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.listening.contains(&port) && !self.by_ports.contains_key(&(port, guest_port)) {
                break port;
            }
        };
        let connection = self.insert(Connection::dial(id, host_port, guest_port));
        self.settle(connection);
    }

    fn cancel(&mut self, dial: u64) {
        let waiting = |c: &Connection| c.origin == Origin::Host(dial) && !c.is_established();
        let found = self.connections.iter().find(|(_, connection)| waiting(connection));
        match found.map(|(id, connection)| (*id, connection.is_requested())) {
            Some((id, true)) => self.reset_connection(id),
            // The guest knows nothing of it.
            Some((id, false)) => self.forget(id, DialError::Reset),
            None => {}
        }
    }

    // --- Connections -------------------------------------------------------------------------------------------------

    fn insert(&mut self, connection: Connection) -> u64 {
        let id = self.next_id.wrapping_add(1);
        self.next_id = id;
        match connection.origin {
            Origin::Host(_) => self.dialled = self.dialled.saturating_add(1),
            Origin::Guest => self.guest_made = self.guest_made.saturating_add(1),
        }
        self.by_ports.insert((connection.host_port, connection.guest_port), id);
        self.connections.insert(id, connection);
        id
    }

    fn remove(&mut self, id: u64) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        match connection.origin {
            Origin::Host(_) => self.dialled = self.dialled.saturating_sub(1),
            Origin::Guest => self.guest_made = self.guest_made.saturating_sub(1),
        }
        if !connection.detached {
            self.by_ports.remove(&(connection.host_port, connection.guest_port));
        }
        // Dropping its socket takes it out of the epoll set.
        Some(connection)
    }

    /// After anything happened to a connection: ends it where it is over, queues it where it has something to send.
    fn settle(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_over() {
            if !connection.detached {
                let reset = self.addressed(connection_reset(&self.connections, id));
                self.resets.extend(reset);
            }
            self.remove(id);
        } else if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Makes the host's end and polls ours.
    fn pair(&self, id: u64) -> io::Result<(UnixStream, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        self.epoll.add(&ours, EpollEvent::new(events, id))?;
        Ok((ours, theirs))
    }

    /// Forgets a connection and tells the guest.
    fn reset_connection(&mut self, id: u64) {
        let reset = self.addressed(connection_reset(&self.connections, id));
        self.resets.extend(reset);
        self.forget(id, DialError::Reset);
    }

    /// The guest no longer knows this connection: what it sent is still delivered.
    fn forget(&mut self, id: u64, why: DialError) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.is_established() {
            let origin = connection.origin;
            self.remove(id);
            if let Origin::Host(id) = origin {
                self.tell(Event::Dialed { id, result: Err(why) });
            }
            return;
        }
        self.by_ports.remove(&(connection.host_port, connection.guest_port));
        connection.detach();
        self.settle(id);
    }

    fn addressed(&self, header: Option<Header>) -> Option<Header> {
        header.map(|header| Header { src_cid: HOST, dst_cid: self.guest, kind: STREAM, ..header })
    }

    // --- The guest's side --------------------------------------------------------------------------------------------

    fn receive(&mut self, tx: &mut Queue, memory: &Memory) -> Result<(bool, bool), Error> {
        serve(tx, memory, BATCH, |chain| {
            if self.resets.len() >= RESETS {
                return Served::NotNow;
            }
            if let Err(e) = self.packet(memory, chain) {
                self.mistakes.note(&e);
            }
            Served::Used(0)
        })
    }

    /// One packet from the guest.
    fn packet(&mut self, memory: &Memory, chain: Chain<'_>) -> Result<(), BadPacket> {
        let mut data = Buffers::readable(memory, chain)?;
        let mut header = [0; HEADER];
        let present = data.copy_to(&mut header);
        if present < HEADER {
            return Err(BadPacket::Short(present));
        }
        let header = Header::parse(header);
        if header.src_cid != self.guest {
            // No answer would reach whoever this pretends to be.
            return Err(BadPacket::Source(header.src_cid));
        }
        if header.dst_cid != HOST {
            self.refuse(&header);
            return Err(BadPacket::Destination(header.dst_cid));
        }
        if header.kind != STREAM {
            self.refuse(&header);
            return Err(BadPacket::Type(header.kind));
        }
        let Some(&id) = self.by_ports.get(&(header.dst_port, header.src_port)) else {
            return self.unknown(&header);
        };
        if header.op == op::REQUEST {
            self.reset_connection(id);
            return Err(BadPacket::Duplicate(header.dst_port));
        }
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        match connection.guest_packet(&header, &mut data) {
            Ok(Verdict::Keep) => self.settle(id),
            Ok(Verdict::Accepted) => self.establish(id),
            Ok(Verdict::Reset) => self.forget(id, DialError::Refused(header.src_port)),
            Err(violation) => {
                self.reset_connection(id);
                return Err(BadPacket::Violation { host: header.dst_port, guest: header.src_port, violation });
            }
        }
        Ok(())
    }

    /// Answers a packet that belongs to no connection; a reset is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    /// A packet of a connection that is not known here.
    fn unknown(&mut self, header: &Header) -> Result<(), BadPacket> {
        if header.op != op::REQUEST {
            // What was on its way when the connection ended: nothing wrong with it.
            self.refuse(header);
            return Ok(());
        }
        if !self.listening.contains(&header.dst_port) {
            self.refuse(header);
            return Err(BadPacket::Closed(header.dst_port));
        }
        if self.guest_made >= GUEST_MADE || self.untaken.load(Ordering::Relaxed) >= GUEST_MADE {
            self.refuse(header);
            return Err(BadPacket::TooMany);
        }
        match self.pair(self.next_id.wrapping_add(1)) {
            Ok((ours, stream)) => {
                let id = self.insert(Connection::accept(header, ours));
                self.untaken.fetch_add(1, Ordering::Relaxed);
                self.tell(Event::Accepted { port: header.dst_port, stream });
                self.settle(id);
            }
            Err(e) => {
                tracing::error!(port = header.dst_port, "make socketpair for a guest's connection: {e}");
                self.refuse(header);
            }
        }
        Ok(())
    }

    /// The guest accepted a dial.
    fn establish(&mut self, id: u64) {
        let pair = self.pair(id);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match pair {
            Ok((ours, stream)) => {
                connection.establish(ours);
                if let Origin::Host(dial) = connection.origin {
                    self.tell(Event::Dialed { id: dial, result: Ok(stream) });
                }
                self.settle(id);
            }
            Err(e) => {
                let reset = self.addressed(connection_reset(&self.connections, id));
                self.resets.extend(reset);
                self.forget(id, DialError::Socket(e.kind()));
            }
        }
    }

    fn send(&mut self, rx: &mut Queue, memory: &Memory) -> Result<(bool, bool), Error> {
        if self.resets.is_empty() && self.ready.is_empty() {
            return Ok((false, false));
        }
        serve(rx, memory, BATCH, |chain| self.fill(memory, chain))
    }

    /// Writes the next packet into a buffer of the guest.
    fn fill(&mut self, memory: &Memory, chain: Chain<'_>) -> Served {
        if self.resets.is_empty() && self.ready.is_empty() {
            return Served::NotNow;
        }
        let mut room = match Buffers::writable(memory, chain) {
            Ok(room) if room.len() > HEADER => room,
            Ok(room) => {
                self.mistakes.note(&BadPacket::NoRoom(room.len()));
                return Served::Used(0);
            }
            Err(e) => {
                self.mistakes.note(&e);
                return Served::Used(0);
            }
        };
        let mut head = room.split_to(HEADER);
        let Some(header) = self.next_packet(&mut room) else { return Served::NotNow };
        head.copy_from(&header.encode());
        // A header's size more than a packet's data fits.
        Served::Used(header.len.saturating_add(u32::try_from(HEADER).unwrap_or(0)))
    }

    fn next_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            let header = if connection.wants_to_send() { connection.next_packet(room) } else { None };
            self.settle(id);
            if header.is_some() {
                return self.addressed(header);
            }
        }
        None
    }
}

fn connection_reset(connections: &HashMap<u64, Connection>, id: u64) -> Option<Header> {
    connections.get(&id).map(Connection::reset)
}

impl Backend for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.epoll.0.as_raw_fd(), token: 0 }]
    }

    /// Serves both queues until neither has anything left.
    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let [Some(rx), Some(tx), ..] = queues else { return Ok(kicks) };
        for _ in 0..TURNS {
            let (received, more_to_receive) = self.receive(tx, memory)?;
            let (sent, more_to_send) = self.send(rx, memory)?;
            if received {
                kicks.insert(TX);
            }
            if sent {
                kicks.insert(RX);
            }
            // A send makes room for resets, for which the other queue may wait.
            if !(more_to_receive || more_to_send || sent && self.resets.len() < RESETS) {
                return Ok(kicks);
            }
        }
        signal(&self.wake);
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.poll()
    }

    fn reset(&mut self) {
        self.resets.clear();
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            self.forget(id, DialError::Reset);
        }
    }
}

#[cfg(test)]
mod tests;
