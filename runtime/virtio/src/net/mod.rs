//! virtio-net (virtio 1.3, section 5.1) on the queues of a tap.
//!
//! A queue pair is a backend of its own, with one queue of the tap, so that each can have a thread. Frames go between
//! the tap and the guest's buffers without a copy in between; checksums and the cutting of long frames are left to
//! whoever gets them in the end.
//!
//! The tap belongs to the device: its header size and offloads are set when the guest's driver has accepted features,
//! and queues that the guest does not use are detached from it.
//!
//! Threat: see the crate. The header before each frame is the guest's, and is the kernel's to check; what it does not
//! take is dropped and counted, as are frames for which a guest has no room. Bounds: [`BATCH`] frames of a direction
//! before the other has its turn, [`TURNS`] turns in one call, one frame held for each pair, and a few changes of the
//! number of pairs in a second.
//!
//! The device's state is the accepted features and the number of pairs in use. Frames are not part of it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use virtio_queue::Queue;
use vz_sys::memory::writev;

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

mod control;
mod port;
mod receive;

use control::{Control, Peer};
pub use port::{Port, Tap, TapError};
use receive::Receiver;

/// Bytes of the header before each frame, which counts buffers (`struct virtio_net_hdr_v1`).
pub const HEADER: usize = 12;
/// Most queue pairs: with the control queue, no more than [`Kicks`] can name.
pub const MAX_PAIRS: usize = 31;
/// Longest frame, with its header: an IP packet of any size, and Ethernet's own.
const MAX_FRAME: usize = HEADER + 14 + 65536;
/// Shortest: Ethernet's own bytes.
const MIN_FRAME: usize = HEADER + 14;
/// Pieces of guest memory in one chain; Linux uses up to 20.
const MAX_CHAIN_PIECES: usize = 64;
/// Frames of one direction before the other has its turn.
const BATCH: usize = 64;
/// Turns in one call; then the device calls itself again, so that its other events get their turn.
const TURNS: usize = 4;
/// Receive, transmit and, for who has it, control queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;

/// Epoll data.
const WAKE: u64 = 0;
const PORT: u64 = 1;

/// Feature bits.
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const HOST_USO: u64 = 1 << 56;
}

/// Why a device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There are none, or more than [`MAX_PAIRS`].
    #[error("network card with {0} queue pairs, not 1 to {MAX_PAIRS}")]
    Pairs(usize),
    /// A descriptor is not a usable tap.
    #[error("tap for queue pair {0}")]
    Tap(usize, #[source] TapError),
    /// A descriptor of the device's own cannot be made.
    #[error("set up network card")]
    System(#[source] io::Error),
}

/// Why a frame did not go on.
#[derive(Debug, thiserror::Error)]
enum BadFrame {
    #[error(transparent)]
    Chain(Malformed),
    #[error("frame of {0} bytes")]
    Length(usize),
    #[error("frame in {0} pieces")]
    Pieces(usize),
    #[error("receive buffer of {0} bytes")]
    ShortBuffer(usize),
    #[error("no room for a frame in a whole queue of receive buffers")]
    NoRoom,
    #[error("frame refused by tap: {0}")]
    Refused(io::Error),
}

/// The device, before its queue pairs are handed to threads.
#[derive(Debug)]
pub struct Net<P = Tap> {
    pairs: Vec<NetPair<P>>,
}

impl Net {
    /// A card on the queues of one tap, each of which is a queue pair; [`Tap::new`] says how it is made.
    ///
    /// `mtu` is what the guest is told; without, it takes Ethernet's 1500.
    pub fn new(queues: Vec<OwnedFd>, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        let several = queues.len() > 1;
        let tap = |(i, queue)| Tap::new(queue, several).map_err(|e| NetError::Tap(i, e));
        let taps = queues.into_iter().enumerate().map(tap).collect::<Result<_, _>>()?;
        Self::with_ports(taps, mac, mtu)
    }
}

impl<P: Port> Net<P> {
    /// A card on ports that are not taps.
    pub fn with_ports(ports: Vec<P>, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        let count = ports.len();
        if count == 0 || count > MAX_PAIRS {
            return Err(NetError::Pairs(count));
        }
        let mut features = feature::CSUM
            | feature::GUEST_CSUM
            | feature::MAC
            | feature::GUEST_TSO4
            | feature::GUEST_TSO6
            | feature::GUEST_ECN
            | feature::HOST_TSO4
            | feature::HOST_TSO6
            | feature::HOST_ECN
            | feature::MRG_RXBUF;
        if count > 1 {
            features |= feature::CTRL_VQ | feature::MQ;
        }
        if mtu.is_some() {
            features |= feature::MTU;
        }
        if ports.iter().all(Port::takes_long_udp) {
            features |= feature::HOST_USO;
        }
        // `status`, which says nothing without its feature, is between the address and the number of pairs.
        let mut space = mac.to_vec();
        space.extend([0; 2]);
        space.extend(u16::try_from(count).unwrap_or(1).to_le_bytes());
        space.extend(mtu.unwrap_or(0).to_le_bytes());
        let space: Arc<[u8]> = space.into();

        let peer = |port| Ok(Peer { port, wake: Wake::new()? });
        let peers: io::Result<Arc<[Peer<P>]>> = ports.into_iter().map(peer).collect();
        let peers = peers.map_err(NetError::System)?;
        let pair = |index| NetPair::new(index, &peers, features, &space).map_err(NetError::System);
        Ok(Self { pairs: (0..count).map(pair).collect::<Result<_, _>>()? })
    }

    /// Its queue pairs, each a backend that sees the queues of [`NetPair::queues`] as 0, 1 and, where it has three, 2.
    pub fn split(self) -> Vec<NetPair<P>> {
        self.pairs
    }
}

/// One queue pair of the device.
#[derive(Debug)]
pub struct NetPair<P = Tap> {
    index: usize,
    features: u64,
    acked: u64,
    space: Arc<[u8]>,
    peers: Arc<[Peer<P>]>,
    epoll: Epoll,
    /// The first pair decides who gets frames.
    control: Option<Control<P>>,
    /// What went wrong where there was nobody to tell.
    failed: Option<Error>,
    receiver: Receiver,
    /// The port may take frames; it says so once, when it does again.
    writable: bool,
    mistakes: Mistakes,
}

impl<P: Port> NetPair<P> {
    fn new(index: usize, peers: &Arc<[Peer<P>]>, features: u64, space: &Arc<[u8]>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        if let Some(peer) = peers.get(index) {
            epoll.add(&peer.port, changes())?;
            epoll.add(&peer.wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        }
        Ok(Self {
            index,
            features,
            acked: 0,
            space: Arc::clone(space),
            peers: Arc::clone(peers),
            epoll,
            control: (index == 0).then(|| Control::new(Arc::clone(peers))),
            failed: None,
            receiver: Receiver::new(),
            writable: true,
            mistakes: Mistakes::new("net"),
        })
    }

    /// Which of the device's queues it serves, as a bit set.
    ///
    /// The first pair serves the control queue too, behind all others.
    pub fn queues(&self) -> u64 {
        let bit = |queue: usize| u32::try_from(queue).ok().and_then(|queue| 1u64.checked_shl(queue)).unwrap_or(0);
        let rx = self.index.saturating_mul(2);
        let control = if self.serves_control() { bit(self.peers.len().saturating_mul(2)) } else { 0 };
        bit(rx) | bit(rx.saturating_add(1)) | control
    }

    fn serves_control(&self) -> bool {
        self.index == 0 && self.features & feature::CTRL_VQ != 0
    }

    /// Which of its queues is the control queue.
    ///
    /// A driver that does not take several pairs has it where the second pair's first queue would be; all that it can
    /// get there is a refusal.
    fn control_queue(&self) -> Option<usize> {
        match (self.acked & feature::CTRL_VQ != 0, self.acked & feature::MQ != 0, self.index) {
            (true, true, 0) => Some(CONTROL),
            (true, false, 1) => Some(RX),
            _ => None,
        }
    }

    fn poll(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::empty(); 2];
        let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(e) => return Err(Error::System("wait for tap", e.into())),
        };
        for event in events.iter().take(count) {
            if event.data() == WAKE {
                if let Some(peer) = self.peers.get(self.index) {
                    peer.wake.clear();
                }
                // The port may have been enabled.
                self.receiver.readable = true;
            } else {
                self.receiver.readable |= event.events().intersects(EpollFlags::EPOLLIN);
                self.writable |= event.events().intersects(EpollFlags::EPOLLOUT);
            }
        }
        Ok(())
    }

    fn call_again(&self) {
        if let Some(peer) = self.peers.get(self.index) {
            peer.wake.signal();
        }
    }

    fn control(&mut self, queue: &mut Queue, memory: &Memory) -> Result<(bool, bool), Error> {
        match &mut self.control {
            Some(control) => control.run(queue, memory, &mut self.mistakes),
            // Without several pairs there is no command that could be carried out.
            None => Control::<P>::new(Arc::from([])).run(queue, memory, &mut self.mistakes),
        }
    }

    fn send(&mut self, port: &P, queue: &mut Queue, memory: &Memory) -> Result<(bool, bool), Error> {
        let Self { writable, mistakes, .. } = self;
        let served = serve(queue, memory, BATCH, |chain| match frame(port, memory, chain) {
            Ok(true) => Served::Used(0),
            Ok(false) => {
                *writable = false;
                Served::NotNow
            }
            Err(e) => {
                mistakes.note(&e);
                Served::Used(0)
            }
        })?;
        if !self.writable {
            // Looks again, so that room which there is by now is an event.
            self.epoll.modify(port, &mut changes()).map_err(|e| Error::System("wait for room in tap", e.into()))?;
        }
        Ok(served)
    }
}

/// Of a port, changes only: one with frames for which the guest has no room must not keep the thread awake.
fn changes() -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, PORT)
}

/// Sends one frame of the guest's; whether the port had room for it.
fn frame(port: &impl Port, memory: &Memory, chain: Chain<'_>) -> Result<bool, BadFrame> {
    let data = Buffers::readable(memory, chain)?;
    if !(MIN_FRAME..=MAX_FRAME).contains(&data.len()) {
        return Err(BadFrame::Length(data.len()));
    }
    let pieces = data.into_pieces();
    if pieces.len() > MAX_CHAIN_PIECES {
        return Err(BadFrame::Pieces(pieces.len()));
    }
    loop {
        match writev(port.as_fd(), &pieces, None) {
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // A header that makes no sense, a link that is down, no memory: a network loses frames.
            Err(e) => return Err(BadFrame::Refused(e)),
        }
    }
}

impl<P: Port> Backend for NetPair<P> {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        if self.serves_control() { &QUEUE_SIZES } else { QUEUE_SIZES.split_at(CONTROL).0 }
    }

    fn config(&self) -> &[u8] {
        &self.space
    }

    fn activate(&mut self, acked: u64) {
        self.acked = acked;
        self.receiver.restart(acked & feature::MRG_RXBUF != 0);
        self.writable = true;
        let (Some(control), Some(peer)) = (&mut self.control, self.peers.get(self.index)) else { return };
        let configured = peer.port.configure(acked).map_err(|e| Error::System("set offloads of tap", e));
        // Until the driver asks for more, it is one pair. A driver that starts over all the time gets that when it may
        // change again; until then frames go to queues that it does not look at.
        let enabled = control.enable(1).map(drop);
        self.failed = configured.and(enabled).err();
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { fd: self.epoll.0.as_raw_fd(), token: 0 }]
    }

    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        let mut kicks = Kicks::NONE;
        let control = self.control_queue();
        if let Some(index) = control
            && let Some(Some(queue)) = queues.get_mut(index)
        {
            let (used, more) = self.control(queue, memory)?;
            if used {
                kicks.insert(index);
            }
            if more {
                self.call_again();
            }
        }
        if control == Some(RX) {
            return Ok(kicks);
        }
        let [rx, tx, ..] = queues else { return Ok(kicks) };
        let peers = Arc::clone(&self.peers);
        let Some(Peer { port, .. }) = peers.get(self.index) else { return Ok(kicks) };
        for _ in 0..TURNS {
            let mut more = false;
            if let Some(queue) = rx {
                let progress = self.receiver.run(port, queue, memory, &mut self.mistakes)?;
                if progress.used {
                    kicks.insert(RX);
                }
                more |= progress.more;
            }
            if let Some(queue) = tx
                && self.writable
            {
                let (used, more_to_send) = self.send(port, queue, memory)?;
                if used {
                    kicks.insert(TX);
                }
                more |= more_to_send;
            }
            if !more {
                return Ok(kicks);
            }
        }
        self.call_again();
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.poll()
    }

    fn reset(&mut self) {
        self.acked = 0;
        self.failed = None;
        self.receiver.restart(false);
        self.writable = true;
    }
}

#[cfg(test)]
mod real_tap;
#[cfg(test)]
mod tests;
