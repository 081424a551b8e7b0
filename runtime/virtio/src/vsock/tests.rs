use std::{
    io::{Read, Write},
    net::Shutdown,
};

use vm_memory::{Bytes, GuestAddress};

use super::{
    connection::BUFFER,
    packet::{SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND},
    *,
};
use crate::testing::{Buffer, Ring, SIZE, memory};

const CID: u32 = 3;
const LISTENED: u32 = 1024;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER: u32 = 4096;
const TX_BUFFERS: u64 = 0x80_0000;

/// A guest with the device, driven packet by packet.
struct Guest {
    memory: Memory,
    device: Vsock,
    handle: Handle,
    rx: Ring,
    tx: Ring,
    rx_queue: Queue,
    tx_queue: Queue,
    next_tx: u64,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        for i in 0..64 {
            guest.post(RX_BUFFERS + i * u64::from(RX_BUFFER), RX_BUFFER);
        }
        guest
    }

    fn without_buffers() -> Self {
        let memory = memory();
        let (device, handle) = Vsock::new(CID, [LISTENED]).unwrap();
        let (rx, tx) = (Ring::new(0x1_0000, 256), Ring::new(0x2_0000, 1024));
        let (rx_queue, tx_queue) = (rx.queue(), tx.queue());
        Self { memory, device, handle, rx, tx, rx_queue, tx_queue, next_tx: 0 }
    }

    fn post(&mut self, address: u64, len: u32) {
        self.rx.add(&self.memory, &[Buffer { address, len, writable: true }]);
    }

    /// Lets the device see everything, as often as it takes.
    fn run(&mut self) -> Kicks {
        let mut queues = [Some(&mut self.rx_queue), Some(&mut self.tx_queue)];
        let mut kicks = self.device.source(0, &mut queues, &self.memory).unwrap();
        for _ in 0..3 {
            let more = self.device.source(0, &mut queues, &self.memory).unwrap();
            for queue in [RX, TX] {
                if more.contains(queue) {
                    kicks.insert(queue);
                }
            }
        }
        kicks
    }

    /// Puts a packet into the transmit queue, its bytes cut into buffers of these sizes; the last one takes the rest.
    fn queue_bytes(&mut self, bytes: &[u8], cuts: &[usize]) {
        let mut rest = bytes;
        let mut buffers = Vec::new();
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            // Gaps in between, so that nothing passes by being contiguous.
            let address = TX_BUFFERS + self.next_tx % 0x100_0000;
            self.next_tx += now.len() as u64 + 64;
            self.memory.write_slice(now, GuestAddress(address)).unwrap();
            buffers.push(Buffer { address, len: u32::try_from(now.len()).unwrap(), writable: false });
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.tx.add(&self.memory, &buffers);
    }

    fn queue(&mut self, header: Header, data: &[u8]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(data);
        self.queue_bytes(&bytes, &[HEADER]);
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.queue(header, data);
        self.run();
        while let Some((_, len)) = self.tx.take_used(&self.memory) {
            assert_eq!(len, 0);
        }
    }

    /// What the device sent, each buffer posted again.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            self.run();
            let Some((buffers, len)) = self.rx.take_used(&self.memory) else { return packets };
            let buffer = buffers[0];
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(buffer.address)).unwrap();
            self.post(buffer.address, buffer.len);
            let (head, data) = bytes.split_first_chunk().unwrap();
            let header = Header::parse(*head);
            assert_eq!(header.len as usize, data.len());
            packets.push((header, data.to_vec()));
        }
    }

    fn ops(&mut self) -> Vec<(u16, u32)> {
        self.received().iter().map(|(header, _)| (header.op, header.flags)).collect()
    }

    /// Everything that arrives as data, and the operations in between.
    fn data_and_ops(&mut self) -> (Vec<u8>, Vec<(u16, u32)>) {
        let (mut data, mut ops) = (Vec::new(), Vec::new());
        for (header, bytes) in self.received() {
            if header.op == op::RW {
                data.extend(bytes);
            } else {
                ops.push((header.op, header.flags));
            }
        }
        (data, ops)
    }

    fn accepted(&mut self) -> UnixStream {
        match self.handle.next() {
            Some(Event::Accepted { port: LISTENED, stream }) => stream,
            other => panic!("{other:?}"),
        }
    }

    /// The guest connects from its port.
    fn connect(&mut self, port: u32) -> UnixStream {
        self.send(to_host(port, op::REQUEST), &[]);
        let packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        let header = packets[0].0;
        assert_eq!((header.op, header.src_port, header.dst_port), (op::RESPONSE, LISTENED, port));
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST, CID.into(), STREAM));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER, 0));
        self.accepted()
    }
}

/// A packet from the guest's port to the port that is listened to, with a lot of credit.
fn to_host(port: u32, op: u16) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST,
        src_port: port,
        dst_port: LISTENED,
        kind: STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

fn data_packet(port: u32, data: &[u8]) -> Header {
    Header { len: u32::try_from(data.len()).unwrap(), ..to_host(port, op::RW) }
}

fn shutdown(port: u32, flags: u32) -> Header {
    Header { flags, ..to_host(port, op::SHUTDOWN) }
}

/// Bytes that tell where they are.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

/// Reads what is there, without waiting; the flag tells of an end of file.
fn read_now(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    let mut bytes = vec![0; 1 << 16];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&bytes[..count]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return (all, false),
            Err(e) => panic!("{e}"),
        }
    }
}

/// Writes until the socket takes no more; how much.
fn write_now(stream: &mut UnixStream, mut data: &[u8]) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut count = 0;
    while !data.is_empty() {
        match stream.write(data) {
            Ok(n) => {
                count += n;
                data = &data[n..];
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    count
}

#[test]
fn a_guest_connects_and_both_talk() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    guest.send(data_packet(5000, b"from the guest"), b"from the guest");
    assert_eq!(read_now(&mut stream), (b"from the guest".to_vec(), false));
    stream.write_all(b"from the host").unwrap();
    assert_eq!(guest.data_and_ops(), (b"from the host".to_vec(), vec![]));
    assert_eq!(guest.device.mistakes.total(), 0);
}

#[test]
fn packets_may_lie_in_any_number_of_buffers() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let data = pattern(10_000);
    let mut bytes = data_packet(5000, &data).encode().to_vec();
    bytes.extend_from_slice(&data);
    for cuts in [&[][..], &[1, 2, 3, 0, 40, 1000, 1], &[44, 1], &[50, 5000], &[43], &[45]] {
        guest.queue_bytes(&bytes, cuts);
        guest.run();
        assert_eq!(read_now(&mut stream), (data.clone(), false), "{cuts:?}");
    }
    // The other way: a buffer of two pieces, the cut within the header.
    while guest.rx.take_used(&guest.memory).is_some() {}
    let mut guest = Guest::without_buffers();
    guest.send(to_host(5000, op::REQUEST), &[]);
    let pieces = [(0x10_0000, 10), (0x20_0000, 40), (0x30_0000, 0), (0x40_0000, 1000)];
    let buffers = pieces.map(|(address, len)| Buffer { address, len, writable: true });
    let mut stream = guest.accepted();
    stream.write_all(b"abcdefghij").unwrap();
    guest.rx.add(&guest.memory, &buffers);
    guest.rx.add(&guest.memory, &buffers);
    guest.run();
    assert_eq!(guest.rx.take_used(&guest.memory).unwrap().1, 44);
    assert_eq!(guest.rx.take_used(&guest.memory).unwrap().1, 54);
    let mut bytes = vec![0; 10];
    guest.memory.read_slice(&mut bytes[..6], GuestAddress(0x20_0000 + 34)).unwrap();
    guest.memory.read_slice(&mut bytes[6..], GuestAddress(0x40_0000)).unwrap();
    assert_eq!(bytes, b"abcdefghij");
}

#[test]
fn the_host_dials() {
    let mut guest = Guest::new();
    guest.handle.dial(7, 1026);
    let packets = guest.received();
    let request = packets[0].0;
    assert_eq!((packets.len(), request.op, request.dst_port), (1, op::REQUEST, 1026));
    assert!(request.src_port >= FIRST_PORT);
    guest.send(Header { op: op::RESPONSE, buf_alloc: 1 << 20, ..request.reset() }, &[]);
    let Some(Event::Dialed { id: 7, result: Ok(mut stream) }) = guest.handle.next() else { panic!() };
    stream.write_all(b"token").unwrap();
    assert_eq!(guest.data_and_ops(), (b"token".to_vec(), vec![]));
    // A second dial to the same port is another connection.
    guest.handle.dial(8, 1026);
    assert_ne!(guest.received()[0].0.src_port, request.src_port);
}

#[test]
fn a_dial_that_nobody_takes_is_refused() {
    let mut guest = Guest::new();
    guest.handle.dial(1, 1026);
    let request = guest.received()[0].0;
    guest.send(request.reset(), &[]);
    let Some(Event::Dialed { id: 1, result: Err(e) }) = guest.handle.next() else { panic!() };
    assert_eq!(e.to_string(), "guest port 1026 refused");
    assert_eq!((guest.device.connections.len(), guest.device.by_ports.len()), (0, 0));
}

#[test]
fn a_dial_waits_for_the_driver_and_can_be_given_up() {
    let mut guest = Guest::new();
    guest.handle.dial(1, 1026);
    guest.handle.dial(2, 1027);
    // The driver has no queues yet.
    let kicks = guest.device.source(0, &mut [None, None], &guest.memory).unwrap();
    assert!(kicks.is_empty());
    guest.handle.cancel(1);
    guest.device.source(0, &mut [None, None], &guest.memory).unwrap();
    assert!(matches!(guest.handle.next(), Some(Event::Dialed { id: 1, result: Err(DialError::Reset) })));
    let packets = guest.received();
    let ports: Vec<_> = packets.iter().map(|(h, _)| (h.op, h.dst_port)).collect();
    // Of what was never asked for, the guest is told nothing.
    assert_eq!(ports, [(op::REQUEST, 1027)]);
    guest.handle.cancel(2);
    let told: Vec<_> = guest.received().iter().map(|(h, _)| (h.op, h.dst_port)).collect();
    assert_eq!(told, [(op::RST, 1027)]);
    assert!(matches!(guest.handle.next(), Some(Event::Dialed { id: 2, result: Err(DialError::Reset) })));
    assert_eq!((guest.device.connections.len(), guest.device.by_ports.len()), (0, 0));
}

#[test]
fn what_is_not_listened_to_is_reset() {
    let mut guest = Guest::new();
    for port in [0, 22, LISTENED - 1, LISTENED + 1, FIRST_PORT, u32::MAX] {
        guest.send(Header { dst_port: port, ..to_host(9, op::REQUEST) }, &[]);
        let packets = guest.received();
        assert_eq!((packets.len(), packets[0].0.op, packets[0].0.src_port), (1, op::RST, port));
    }
    for cid in [0, 1, 3, 4, u64::MAX] {
        guest.send(Header { dst_cid: cid, ..to_host(9, op::REQUEST) }, &[]);
        let packets = guest.received();
        assert_eq!((packets.len(), packets[0].0.op, packets[0].0.src_cid), (1, op::RST, cid));
    }
    guest.send(Header { kind: 2, ..to_host(9, op::REQUEST) }, &[]);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    // Pretending to be somebody else, and resets of nothing, get no answer.
    for header in [Header { src_cid: 2, ..to_host(9, op::REQUEST) }, to_host(9, op::RST)] {
        guest.send(header, &[]);
        assert_eq!(guest.ops(), []);
    }
    assert!(guest.handle.next().is_none());
}

#[test]
fn packets_of_no_connection_are_reset_and_of_no_operation_reset_the_connection() {
    let mut guest = Guest::new();
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(to_host(9, op), &[]);
        assert_eq!(guest.ops(), [(op::RST, 0)], "{op}");
    }
    for op in [0, op::RESPONSE, op::REQUEST, 8, u16::MAX] {
        let mut stream = guest.connect(10);
        guest.send(to_host(10, op), &[]);
        assert_eq!(guest.ops(), [(op::RST, 0)], "{op}");
        assert_eq!(read_now(&mut stream), (vec![], true));
    }
    assert!(guest.device.connections.is_empty());
}

#[test]
fn the_hosts_half_close_leaves_the_other_half() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let data = pattern(20_000);
    stream.write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.data_and_ops(), (data, vec![(op::SHUTDOWN, SHUTDOWN_SEND)]));
    guest.send(data_packet(5000, b"answer"), b"answer");
    assert_eq!(read_now(&mut stream), (b"answer".to_vec(), false));
    guest.send(shutdown(5000, SHUTDOWN_BOTH), &[]);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    assert_eq!(read_now(&mut stream), (vec![], true));
    assert!(guest.device.connections.is_empty());
}

#[test]
fn the_guests_half_close_leaves_the_other_half() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    guest.send(data_packet(5000, b"last words"), b"last words");
    guest.send(shutdown(5000, SHUTDOWN_SEND), &[]);
    assert_eq!(guest.ops(), []);
    assert_eq!(read_now(&mut stream), (b"last words".to_vec(), true));
    let data = pattern(20_000);
    stream.write_all(&data).unwrap();
    drop(stream);
    let (got, ops) = guest.data_and_ops();
    assert_eq!(got, data);
    assert_eq!(ops.last().unwrap().1 & SHUTDOWN_SEND, SHUTDOWN_SEND);
    // More data after its end is a lie.
    guest.send(data_packet(5000, b"x"), b"x");
    assert_eq!(guest.ops(), [(op::RST, 0)]);
}

#[test]
fn a_half_closed_connection_rests() {
    for flags in [SHUTDOWN_SEND, SHUTDOWN_RCV] {
        let mut guest = Guest::new();
        let mut stream = guest.connect(5000);
        guest.send(shutdown(5000, flags), &[]);
        guest.run();
        // Nobody has anything to say, and the thread that waits here must not be woken by its own doing.
        let mut events = [EpollEvent::empty()];
        assert_eq!(guest.device.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 0, "{events:?}");
        drop(read_now(&mut stream));
    }
}

#[test]
fn a_host_that_closes_after_writing_gets_all_of_it_through() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let data = pattern(100_000);
    stream.write_all(&data).unwrap();
    drop(stream);
    let (got, ops) = guest.data_and_ops();
    assert_eq!(got, data);
    assert_eq!(ops.last(), Some(&(op::SHUTDOWN, SHUTDOWN_BOTH)));
    // What the guest still sends goes nowhere and does no harm; its reset ends it.
    guest.send(data_packet(5000, &[1; 1000]), &[1; 1000]);
    assert_eq!(guest.ops(), []);
    guest.send(to_host(5000, op::RST), &[]);
    assert!(guest.device.connections.is_empty());
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send(data_packet(5000, b"x"), b"x");
    assert_eq!(guest.ops(), [(op::SHUTDOWN, SHUTDOWN_RCV)]);
    stream.write_all(b"y").unwrap();
    assert_eq!(guest.data_and_ops(), (b"y".to_vec(), vec![]));
}

#[test]
fn a_guest_that_reads_no_more_is_told_to_the_host() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    guest.send(shutdown(5000, SHUTDOWN_RCV), &[]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    guest.send(data_packet(5000, b"still"), b"still");
    assert_eq!(read_now(&mut stream), (b"still".to_vec(), false));
}

/// The guest sends as much as it has credit for while the host does not read.
fn stall(guest: &mut Guest, port: u32) -> Vec<u8> {
    let mut sent = Vec::new();
    let chunk = pattern(16 * 1024);
    let mut forwarded = 0usize;
    loop {
        let free = BUFFER as usize - (sent.len() - forwarded);
        if free < chunk.len() {
            return sent;
        }
        guest.send(data_packet(port, &chunk), &chunk);
        sent.extend_from_slice(&chunk);
        for (header, _) in guest.received() {
            assert!(matches!(header.op, op::CREDIT_UPDATE | op::RW));
            forwarded = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let sent = stall(&mut guest, 5000);
    // The socket's buffer and ours.
    assert!(sent.len() > BUFFER as usize && sent.len() < 4 * BUFFER as usize, "{}", sent.len());
    let mut got = Vec::new();
    for _ in 0..100 {
        let (data, end) = read_now(&mut stream);
        got.extend(data);
        assert!(!end);
        assert_eq!(got, sent[..got.len()]);
        guest.run();
        if got.len() == sent.len() {
            break;
        }
    }
    assert_eq!(got.len(), sent.len());
    // It got its credit back, and a request for it is always answered.
    guest.received();
    guest.send(to_host(5000, op::CREDIT_REQUEST), &[]);
    let packets = guest.received();
    let update = packets.last().unwrap().0;
    assert_eq!((update.op, update.fwd_cnt as usize), (op::CREDIT_UPDATE, sent.len()));
}

#[test]
fn a_guest_beyond_its_credit_is_reset_and_what_it_had_credit_for_is_delivered() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let sent = stall(&mut guest, 5000);
    let more = pattern(2 * 16 * 1024);
    guest.send(data_packet(5000, &more), &more);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    assert_eq!(guest.device.mistakes.total(), 1);
    let mut got = Vec::new();
    loop {
        let (data, end) = read_now(&mut stream);
        got.extend(data);
        if end {
            break;
        }
        guest.run();
    }
    assert_eq!(got, sent);
    assert!(guest.device.connections.is_empty());
}

#[test]
fn a_guest_that_closes_has_everything_delivered() {
    for last in [shutdown(5000, SHUTDOWN_BOTH), to_host(5000, op::RST)] {
        let mut guest = Guest::new();
        let mut stream = guest.connect(5000);
        // Data for the guest that it never reads must not turn the end of file into an error.
        write_now(&mut stream, &pattern(300_000));
        let sent = stall(&mut guest, 5000);
        guest.send(last, &[]);
        // The ports are free again for a guest that reset, and the old data stays apart from the new.
        let mut second = (last.op == op::RST).then(|| {
            guest.received();
            guest.connect(5000)
        });
        if let Some(second) = &mut second {
            guest.send(data_packet(5000, b"new"), b"new");
            assert_eq!(read_now(second), (b"new".to_vec(), false));
        }
        let mut got = Vec::new();
        loop {
            let (data, end) = read_now(&mut stream);
            got.extend(data);
            if end {
                break;
            }
            guest.run();
        }
        assert_eq!(got, sent);
        let ops = guest.ops();
        assert_eq!(ops.contains(&(op::RST, 0)), last.op != op::RST, "{ops:?}");
        assert_eq!(guest.device.connections.len(), usize::from(second.is_some()));
    }
}

#[test]
fn the_guest_gets_no_more_than_it_gave_credit_for() {
    let mut guest = Guest::new();
    guest.send(Header { buf_alloc: 1000, ..to_host(5000, op::REQUEST) }, &[]);
    let mut stream = guest.accepted();
    let data = pattern(5000);
    stream.write_all(&data).unwrap();
    let (mut got, ops) = guest.data_and_ops();
    assert_eq!((got.len(), ops), (1000, vec![(op::RESPONSE, 0), (op::CREDIT_REQUEST, 0)]));
    // Less than nothing is nothing: nonsense in either field gives no credit, and no end of it does harm.
    for (buf_alloc, fwd_cnt) in [(999, 0), (1000, 1001), (0, 1000), (1000, u32::MAX), (u32::MAX / 2, 1001)] {
        guest.send(Header { buf_alloc, fwd_cnt, ..to_host(5000, op::CREDIT_UPDATE) }, &[]);
        let (data, _) = guest.data_and_ops();
        assert_eq!(data.len(), 0, "{buf_alloc} {fwd_cnt}");
    }
    guest.send(Header { buf_alloc: 1500, fwd_cnt: 500, ..to_host(5000, op::CREDIT_UPDATE) }, &[]);
    got.extend(guest.data_and_ops().0);
    assert_eq!(got.len(), 2000);
    guest.send(Header { buf_alloc: u32::MAX, fwd_cnt: 2000, ..to_host(5000, op::CREDIT_UPDATE) }, &[]);
    got.extend(guest.data_and_ops().0);
    assert_eq!(got, data);
}

#[test]
fn malformed_chains_are_counted_and_returned() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    let forged = Header { len: 100, ..to_host(5000, op::RW) };
    guest.queue_bytes(&to_host(5000, op::RW).encode()[..43], &[]);
    guest.tx.add(&guest.memory, &[Buffer { address: 0, len: 0, writable: false }]);
    guest.tx.add(&guest.memory, &[Buffer { address: 0x10_0000, len: 100, writable: true }]);
    guest.tx.add(&guest.memory, &[Buffer { address: SIZE as u64 - 10, len: 100, writable: false }]);
    guest.tx.add(&guest.memory, &[Buffer { address: u64::MAX - 10, len: 100, writable: false }]);
    guest.tx.add(&guest.memory, &[Buffer { address: 0, len: u32::MAX, writable: false }]);
    guest.run();
    let mut returned = 0;
    while let Some((_, len)) = guest.tx.take_used(&guest.memory) {
        assert_eq!(len, 0);
        returned += 1;
    }
    assert_eq!((returned, guest.device.mistakes.total()), (6, 6));
    guest.send(data_packet(5000, b"alive"), b"alive");
    assert_eq!(read_now(&mut stream), (b"alive".to_vec(), false));
    // Data that is claimed and not there.
    guest.send(forged, &[0; 99]);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    assert_eq!(read_now(&mut stream), (vec![], true));
}

#[test]
fn buffers_that_hold_no_packet_are_returned_and_the_packet_goes_into_the_next() {
    let mut guest = Guest::without_buffers();
    guest.send(to_host(5000, op::REQUEST), &[]);
    let _stream = guest.accepted();
    guest.post(0x10_0000, 10);
    guest.post(0x10_0000, 44);
    guest.post(SIZE as u64, 4096);
    guest.rx.add(&guest.memory, &[Buffer { address: 0x10_0000, len: 4096, writable: false }]);
    guest.post(0x10_0000, 45);
    guest.run();
    let lens: Vec<u32> = std::iter::from_fn(|| guest.rx.take_used(&guest.memory)).map(|(_, len)| len).collect();
    assert_eq!(lens, [0, 0, 0, 0, 44]);
    assert_eq!(guest.device.mistakes.total(), 4);
}

#[test]
fn a_ring_that_cannot_be_is_an_error_and_no_endless_loop() {
    let mut guest = Guest::new();
    guest.tx.set_index(&guest.memory, 2000);
    let mut queues = [Some(&mut guest.rx_queue), Some(&mut guest.tx_queue)];
    assert!(matches!(guest.device.queue(1, &mut queues, &guest.memory), Err(Error::Ring(_))));
    let mut guest = Guest::new();
    guest.tx.publish(&guest.memory, 5000);
    let mut queues = [Some(&mut guest.rx_queue), Some(&mut guest.tx_queue)];
    assert!(guest.device.queue(1, &mut queues, &guest.memory).is_err());
}

#[test]
fn the_guest_gets_no_more_connections_than_there_may_be() {
    let mut guest = Guest::new();
    let count = u32::try_from(GUEST_MADE).unwrap();
    for port in 0..count {
        guest.send(to_host(port, op::REQUEST), &[]);
    }
    assert!(guest.ops().iter().all(|(o, _)| *o == op::RESPONSE));
    guest.send(to_host(count, op::REQUEST), &[]);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    // Closing does not help while nobody has taken them.
    guest.send(to_host(0, op::RST), &[]);
    guest.send(to_host(count, op::REQUEST), &[]);
    assert_eq!(guest.ops(), [(op::RST, 0)]);
    let first = guest.accepted();
    drop(first);
    // The host can still dial.
    guest.handle.dial(1, 1026);
    assert_eq!(guest.ops(), [(op::REQUEST, 0)]);
}

#[test]
fn the_host_gets_no_more_connections_than_there_may_be() {
    let mut guest = Guest::new();
    for id in 0..=DIALS as u64 {
        guest.handle.dial(id, 1026);
    }
    let requests = guest.received();
    assert_eq!(requests.len(), DIALS);
    let refused = guest.handle.next();
    assert!(matches!(refused, Some(Event::Dialed { result: Err(DialError::TooMany), .. })), "{refused:?}");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut guest = Guest::without_buffers();
    for _ in 0..1000 {
        guest.queue(to_host(9, op::RW), &[]);
    }
    guest.run();
    let mut taken = 0;
    while guest.tx.take_used(&guest.memory).is_some() {
        taken += 1;
    }
    assert_eq!((taken, guest.device.resets.len()), (RESETS, RESETS));
    for i in 0..200 {
        guest.post(RX_BUFFERS + i * u64::from(RX_BUFFER), RX_BUFFER);
    }
    assert_eq!(guest.received().len(), 1000);
}

#[test]
fn a_reset_device_starts_over() {
    let mut guest = Guest::new();
    let mut stream = guest.connect(5000);
    guest.handle.dial(1, 1026);
    guest.received();
    guest.device.reset();
    assert_eq!(read_now(&mut stream), (vec![], true));
    assert!(matches!(guest.handle.next(), Some(Event::Dialed { id: 1, result: Err(DialError::Reset) })));
    assert!(guest.device.connections.is_empty() && guest.device.by_ports.is_empty());
    guest.connect(5000);
}

/// Not random: a fixed sequence, so that a failure is one again.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn nonsense_of_any_kind_keeps_the_bounds() {
    let mut guest = Guest::new();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut streams: Vec<UnixStream> = Vec::new();
    let interesting = [0, 1, 44, 1000, BUFFER, BUFFER + 1, 1 << 31, u32::MAX];
    for round in 0..10_000 {
        let pick = |numbers: &mut Numbers| interesting[usize::try_from(numbers.below(8)).unwrap()];
        let ports = [LISTENED, LISTENED, FIRST_PORT, FIRST_PORT + 1, 7];
        let data = pattern(usize::try_from(numbers.below(3) * numbers.below(3000)).unwrap());
        let honest = numbers.below(4) > 0;
        let header = Header {
            src_cid: if numbers.below(50) == 0 { 9 } else { CID.into() },
            dst_cid: if numbers.below(50) == 0 { 9 } else { HOST },
            src_port: u32::try_from(1020 + numbers.below(10)).unwrap(),
            dst_port: ports[usize::try_from(numbers.below(5)).unwrap()],
            len: if honest { u32::try_from(data.len()).unwrap() } else { pick(&mut numbers) },
            kind: if numbers.below(50) == 0 { 2 } else { STREAM },
            op: u16::try_from(numbers.below(9)).unwrap(),
            flags: u32::try_from(numbers.below(5)).unwrap(),
            buf_alloc: pick(&mut numbers),
            fwd_cnt: pick(&mut numbers),
        };
        guest.send(header, &data);
        match numbers.below(8) {
            0 => guest.handle.dial(round, 1020 + u32::try_from(numbers.below(10)).unwrap()),
            1 if !streams.is_empty() => drop(streams.swap_remove(0)),
            2 => {
                if let Some(stream) = streams.last_mut() {
                    stream.set_nonblocking(true).unwrap();
                    let _ = stream.write(&data);
                }
            }
            3 => streams.iter_mut().for_each(|stream| drop(read_now(stream))),
            4 => guest.handle.cancel(round - numbers.below(50).min(round)),
            _ => {}
        }
        if numbers.below(3) > 0 {
            guest.received();
        }
        while let Some(event) = guest.handle.next() {
            match event {
                Event::Accepted { stream, .. } | Event::Dialed { result: Ok(stream), .. } => streams.push(stream),
                Event::Dialed { .. } => {}
            }
        }
        let device = &guest.device;
        assert!(device.guest_made <= GUEST_MADE && device.dialled <= DIALS);
        assert_eq!(device.guest_made + device.dialled, device.connections.len());
        assert!(device.resets.len() <= RESETS + DIALS && device.ready.len() <= device.connections.len());
    }
}
