//! Requests to the kernel's routing socket and their answers.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Times that a list is asked for again because it changed while it was read; each time somebody else made progress.
const DUMP_TRIES: usize = 20;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// How something is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Add {
    /// Fails where there is one.
    New,
    /// In place of one that there is.
    Replace,
}

/// A connection to the routing tables of the network namespace in which it was opened, whatever thread uses it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl std::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netlink").finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens one in the network namespace of the calling thread.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Changes something.
    pub fn change(&mut self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.talk(message, NLM_F_ACK).map(drop)
    }

    /// Adds something.
    pub fn add(&mut self, message: RouteNetlinkMessage, how: Add) -> io::Result<()> {
        let how = match how {
            Add::New => NLM_F_EXCL,
            Add::Replace => NLM_F_REPLACE,
        };
        self.talk(message, NLM_F_ACK | NLM_F_CREATE | how).map(drop)
    }

    /// Lists what there is of the request's kind.
    pub fn list(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut tries = 0;
        loop {
            match self.talk(message.clone(), NLM_F_DUMP) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted && tries < DUMP_TRIES => tries += 1,
                other => return other,
            }
        }
    }

    fn talk(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        self.answers(flags & NLM_F_DUMP == NLM_F_DUMP)
    }

    fn answers(&mut self, dump: bool) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut found = Vec::new();
        let mut changed = false;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            for message in split(&bytes) {
                let message = message?;
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                // NLM_F_DUMP_INTR: the list is a mixture of before and after.
                changed |= message.header.flags & netlink_packet_core::NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) if changed => return Err(io::ErrorKind::Interrupted.into()),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) if error.code.is_none() && !dump => return Ok(found),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The messages of a datagram.
fn split(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<NetlinkMessage<RouteNetlinkMessage>>> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    std::iter::from_fn(move || {
        let length = bytes.get(..4)?.try_into().ok().map(u32::from_ne_bytes)?;
        let length = usize::try_from(length).ok()?;
        let message = match bytes.get(..length) {
            Some(message) if length >= HEADER => message,
            _ => {
                bytes = &[];
                return Some(Err(invalid(format!("netlink message of {length} bytes"))));
            }
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(NetlinkMessage::deserialize(message).map_err(|e| invalid(format!("netlink message: {e}"))))
    })
}
