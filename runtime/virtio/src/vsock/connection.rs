//! One connection: a stream socket on the host's side, packets on the guest's.
//!
//! Both directions end on their own. What the guest sent is written to the socket in order, and buffered up to
//! [`BUFFER`] where the socket is full; the guest never gets credit for more, so nothing is dropped and nothing grows.
//! What the host wrote is read straight into the guest's buffers, as far as the guest gave credit.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::Shutdown,
    num::Wrapping,
    os::unix::net::UnixStream,
};

use super::packet::{HEADER, Header, SHUTDOWN_RCV, SHUTDOWN_SEND, op};
use crate::chain::Buffers;

/// Bytes from the guest that are buffered when the host does not read: the credit that the guest gets.
pub(super) const BUFFER: u32 = 128 * 1024;
/// The guest is told of new credit when it has this much more.
const CREDIT_STEP: u32 = BUFFER / 4;
/// Most data in one packet.
const PAYLOAD: usize = 64 * 1024;

/// Who asked for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The host, in the dial of this id.
    Host(u64),
    /// The guest.
    Guest,
}

/// What the guest did that no correct guest does. The connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("packet claims {claimed} bytes of data and has {present}")]
    Length { claimed: u32, present: usize },
    #[error("{0} bytes of data beyond the credit")]
    Credit(u32),
    #[error("data after the end of data")]
    AfterEnd,
    #[error("operation {0} in this state")]
    Operation(u16),
}

/// What a packet of the guest asks of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Keep,
    /// The guest accepted the dial.
    Accepted,
    /// The guest forgot the connection.
    Reset,
}

#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit: bool,
    credit_request: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) origin: Origin,
    /// In the device's list of those that have something for the guest.
    pub(super) queued: bool,
    /// The guest has forgotten it; what is buffered still goes to the host.
    pub(super) detached: bool,
    /// `None` until the guest accepted.
    stream: Option<UnixStream>,
    owed: Owed,

    // Guest to host.
    pending: VecDeque<u8>,
    received: Wrapping<u32>,
    advertised: Wrapping<u32>,
    writable: bool,
    guest_done: bool,
    /// The host has been told that the guest is done.
    ended: bool,
    host_deaf: bool,

    // Host to guest.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    asked_credit: bool,
    readable: bool,
    host_done: bool,
    guest_deaf: bool,

    /// Shutdown flags that the guest has been told.
    told: u32,
}

impl Connection {
    /// A connection that the guest has yet to accept.
    pub(super) fn dial(id: u64, host_port: u32, guest_port: u32) -> Self {
        let owed = Owed { request: true, ..Owed::default() };
        Self::new(Origin::Host(id), host_port, guest_port, owed, None)
    }

    /// A connection that the guest asked for in `request`.
    pub(super) fn accept(request: &Header, stream: UnixStream) -> Self {
        let owed = Owed { response: true, ..Owed::default() };
        let mut connection = Self::new(Origin::Guest, request.dst_port, request.src_port, owed, Some(stream));
        connection.credit_from(request);
        connection
    }

    fn new(origin: Origin, host_port: u32, guest_port: u32, owed: Owed, stream: Option<UnixStream>) -> Self {
        Self {
            host_port,
            guest_port,
            origin,
            queued: false,
            detached: false,
            stream,
            owed,
            pending: VecDeque::new(),
            received: Wrapping(0),
            advertised: Wrapping(0),
            writable: true,
            guest_done: false,
            ended: false,
            host_deaf: false,
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            asked_credit: false,
            readable: true,
            host_done: false,
            guest_deaf: false,
            told: 0,
        }
    }

    /// The guest accepted: this is the host's end.
    pub(super) fn establish(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
    }

    /// Whether the guest has been asked for it, or has asked itself.
    pub(super) fn is_requested(&self) -> bool {
        !self.owed.request
    }

    pub(super) fn is_established(&self) -> bool {
        self.stream.is_some()
    }

    /// Bytes that were handed to the host, or dropped because it takes none.
    fn forwarded(&self) -> Wrapping<u32> {
        // The buffer never holds more than BUFFER.
        self.received - Wrapping(u32::try_from(self.pending.len()).unwrap_or(u32::MAX))
    }

    /// Bytes that the guest can still take. Whatever it claims, never more than its buffer.
    fn credit(&self) -> usize {
        let on_the_way = (self.sent - self.guest_forwarded).0;
        usize::try_from(self.guest_buffer.saturating_sub(on_the_way)).unwrap_or(0)
    }

    fn credit_from(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// A packet of this connection from the guest.
    pub(super) fn guest_packet(&mut self, header: &Header, data: &mut Buffers<'_>) -> Result<Verdict, Violation> {
        if header.op == op::RST {
            return Ok(Verdict::Reset);
        }
        self.credit_from(header);
        match (header.op, self.is_established()) {
            (op::RESPONSE, false) if !self.owed.request => return Ok(Verdict::Accepted),
            (op::RW, true) => self.guest_data(header.len, data)?,
            (op::SHUTDOWN, true) => self.guest_shutdown(header.flags),
            (op::CREDIT_UPDATE, true) => {}
            (op::CREDIT_REQUEST, true) => self.owed.credit = true,
            (other, _) => return Err(Violation::Operation(other)),
        }
        Ok(Verdict::Keep)
    }

    fn guest_data(&mut self, len: u32, data: &mut Buffers<'_>) -> Result<(), Violation> {
        if self.guest_done {
            return Err(Violation::AfterEnd);
        }
        let present = data.len();
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        if size > present {
            return Err(Violation::Length { claimed: len, present });
        }
        let room = usize::try_from(BUFFER).unwrap_or(0).saturating_sub(self.pending.len());
        if size > room {
            return Err(Violation::Credit(len));
        }
        data.truncate(size);
        self.received += len;
        if self.host_deaf {
            self.note_credit();
            return Ok(());
        }
        if self.pending.is_empty()
            && self.writable
            && let Some(stream) = &mut self.stream
        {
            let (_, end) = data.drain_to(stream);
            self.written(end);
        }
        if !self.host_deaf && data.len() > 0 {
            let mut rest = vec![0; data.len()];
            data.copy_to(&mut rest);
            self.pending.extend(rest);
        }
        self.note_credit();
        Ok(())
    }

    fn guest_shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RCV != 0 {
            self.deafen_guest();
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_done = true;
            self.finish_writing();
        }
    }

    /// The guest has forgotten the connection: what it sent is still delivered.
    pub(super) fn detach(&mut self) {
        self.detached = true;
        self.guest_shutdown(SHUTDOWN_RCV | SHUTDOWN_SEND);
    }

    /// The socket may be readable or writable; `gone` where its other end is closed.
    pub(super) fn host_ready(&mut self, gone: bool) {
        self.readable = true;
        self.writable = true;
        if gone {
            self.deafen_host();
        }
        self.flush();
    }

    /// Writes what is buffered.
    fn flush(&mut self) {
        while self.writable && !self.pending.is_empty() {
            let Some(stream) = &mut self.stream else { break };
            match stream.write(self.pending.as_slices().0) {
                Ok(0) => self.deafen_host(),
                Ok(count) => drop(self.pending.drain(..count)),
                Err(e) => self.written(Err(e)),
            }
        }
        if self.pending.is_empty() {
            // A stream that was stalled once need not keep its memory.
            self.pending.shrink_to_fit();
        }
        self.note_credit();
        self.finish_writing();
    }

    fn written(&mut self, end: io::Result<()>) {
        match end.map_err(|e| e.kind()) {
            Ok(()) | Err(io::ErrorKind::Interrupted) => {}
            Err(io::ErrorKind::WouldBlock) => self.writable = false,
            Err(_) => self.deafen_host(),
        }
    }

    /// The host takes no more: what the guest sent and sends is dropped, and the guest is told.
    fn deafen_host(&mut self) {
        self.host_deaf = true;
        self.pending = VecDeque::new();
        self.note_credit();
    }

    /// The guest takes no more: the host's writes fail from now on.
    fn deafen_guest(&mut self) {
        if self.guest_deaf {
            return;
        }
        self.guest_deaf = true;
        if let Some(stream) = &mut self.stream {
            // Closing a socket that holds unread data would turn the other end's end of file into an error: read it
            // all. No more can come after the shutdown, which only fails where there is no other end.
            let _ = stream.shutdown(Shutdown::Read);
            let mut waste = [0; 4096];
            while matches!(stream.read(&mut waste), Ok(1..)) {}
        }
    }

    /// Passes the guest's end of data on, once all data is with the host.
    fn finish_writing(&mut self) {
        if self.guest_done
            && self.pending.is_empty()
            && !self.ended
            && let Some(stream) = &self.stream
        {
            // Once: each shutdown wakes our own poll.
            self.ended = true;
            // Fails only where there is no other end.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Whether both sides are done with it. The guest gets a reset for it, which tells it so.
    pub(super) fn is_over(&self) -> bool {
        self.is_established() && self.guest_done && self.guest_deaf && self.pending.is_empty()
    }

    fn note_credit(&mut self) {
        if (self.forwarded() - self.advertised).0 >= CREDIT_STEP {
            self.owed.credit = true;
        }
    }

    /// Shutdown flags that are true and that the guest has not been told.
    fn news(&self) -> u32 {
        let mut flags = 0;
        if self.host_done {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_deaf {
            flags |= SHUTDOWN_RCV;
        }
        flags & !self.told
    }

    fn has_data(&self) -> bool {
        self.is_established() && self.readable && !self.host_done && !self.guest_deaf
    }

    /// Whether [`Connection::next_packet`] is worth a buffer of the guest.
    pub(super) fn wants_to_send(&mut self) -> bool {
        if self.detached {
            return false;
        }
        if self.has_data() && self.credit() == 0 && !self.asked_credit {
            self.asked_credit = true;
            self.owed.credit_request = true;
        }
        let Owed { request, response, credit, credit_request } = self.owed;
        request || response || credit || credit_request || self.news() != 0 || (self.has_data() && self.credit() > 0)
    }

    /// The next packet for the guest, its data written to `room`, which has some.
    ///
    /// `None` where the host turned out to have nothing.
    pub(super) fn next_packet(&mut self, room: &mut Buffers<'_>) -> Option<Header> {
        // The order matters twice: an answer comes before all else, and what was read before an end of file is sent
        // before that is told.
        let (op, flags, len) = if std::mem::take(&mut self.owed.request) {
            (op::REQUEST, 0, 0)
        } else if std::mem::take(&mut self.owed.response) {
            (op::RESPONSE, 0, 0)
        } else if std::mem::take(&mut self.owed.credit) {
            (op::CREDIT_UPDATE, 0, 0)
        } else if self.has_data()
            && self.credit() > 0
            && let len = self.read(room)
            && len > 0
        {
            (op::RW, 0, len)
        } else if self.news() != 0 {
            self.told |= self.news();
            (op::SHUTDOWN, self.told, 0)
        } else if std::mem::take(&mut self.owed.credit_request) {
            (op::CREDIT_REQUEST, 0, 0)
        } else {
            return None;
        };
        let len = u32::try_from(len).unwrap_or(0);
        self.sent += len;
        self.advertised = self.forwarded();
        self.owed.credit = false;
        Some(Header { len, op, flags, buf_alloc: BUFFER, fwd_cnt: self.advertised.0, ..self.addresses() })
    }

    /// Reads from the host, as far as there is room and credit.
    fn read(&mut self, room: &mut Buffers<'_>) -> usize {
        let limit = self.credit().min(PAYLOAD);
        let Some(stream) = &mut self.stream else { return 0 };
        let (len, end) = room.fill_from(stream, limit);
        match end.map_err(|e| e.kind()) {
            Ok(()) => {}
            Err(io::ErrorKind::WouldBlock) => self.readable = false,
            // End of file, or an other end that was closed with data of the guest unread.
            Err(_) => self.host_done = true,
        }
        len
    }

    /// The reset of this connection, for the guest.
    pub(super) fn reset(&self) -> Header {
        Header { op: op::RST, ..self.addresses() }
    }

    fn addresses(&self) -> Header {
        Header { src_port: self.host_port, dst_port: self.guest_port, ..Header::default() }
    }
}

// A header and at least one byte of data fit into what PAYLOAD allows for.
const _: () = assert!(PAYLOAD > HEADER);
