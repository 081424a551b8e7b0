use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
    sync::Mutex,
};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Buffer, Ring, SIZE, memory, readable_within};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX_BUFFERS: u64 = 0x10_0000;
const TX_DATA: u64 = 0x200_0000;
/// Everything that a Linux driver accepts.
const ALL: u64 = u64::MAX;

/// What the device did to its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Configure(u64),
    Enable(usize, bool),
}

#[derive(Debug)]
struct Wire {
    index: usize,
    socket: UnixDatagram,
    calls: Arc<Mutex<Vec<Call>>>,
    broken: bool,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Port for Wire {
    fn takes_long_udp(&self) -> bool {
        true
    }

    fn configure(&self, acked: u64) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Configure(acked));
        if self.broken { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }

    fn enable(&self, enabled: bool) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Enable(self.index, enabled));
        Ok(())
    }
}

/// A guest with one of a card's queue pairs; the others are there too.
struct Guest {
    memory: Memory,
    pairs: Vec<NetPair<Wire>>,
    pair: usize,
    network: Vec<UnixDatagram>,
    calls: Arc<Mutex<Vec<Call>>>,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
    next_rx: u64,
}

/// A card's pairs, the other ends of its wires, and what it did to them.
type Card = (Vec<NetPair<Wire>>, Vec<UnixDatagram>, Arc<Mutex<Vec<Call>>>);

fn card(count: usize, broken: bool) -> Card {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let (mut wires, mut network) = (Vec::new(), Vec::new());
    for index in 0..count {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        wires.push(Wire { index, socket: ours, calls: Arc::clone(&calls), broken });
        network.push(theirs);
    }
    (Net::with_ports(wires, MAC, None).unwrap().split(), network, calls)
}

impl Guest {
    fn new(acked: u64) -> Self {
        Self::with_pairs(1, acked)
    }

    fn with_pairs(count: usize, acked: u64) -> Self {
        let (mut pairs, network, calls) = card(count, false);
        for pair in &mut pairs {
            pair.activate(acked & pair.features());
        }
        let rings: Vec<_> = (0..3).map(|i| Ring::new(0x1_0000 * (i + 1), 256)).collect();
        let queues = rings.iter().map(Ring::queue).collect();
        Self { memory: memory(), pairs, pair: 0, network, calls, rings, queues, next_rx: RX_BUFFERS }
    }

    fn run(&mut self) -> Kicks {
        let pair = &mut self.pairs[self.pair];
        let mut queues: Vec<_> = self.queues.iter_mut().take(pair.queue_sizes().len()).map(Some).collect();
        pair.source(0, &mut queues, &self.memory).unwrap()
    }

    /// As often as the device asks for it; the queues to be signalled.
    fn run_on(&mut self) -> Kicks {
        let mut kicks = Kicks::NONE;
        while readable_within(&self.pairs[self.pair].epoll.0, 0) {
            let more = self.run();
            (0..3).filter(|queue| more.contains(*queue)).for_each(|queue| kicks.insert(queue));
        }
        kicks
    }

    /// Gives the device buffers for frames.
    fn post(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            self.rings[RX].add(&self.memory, &[Buffer { address: self.next_rx, len, writable: true }]);
            self.next_rx += u64::from(len) + 64;
        }
    }

    /// What the device wrote to the next chain.
    fn chain(&mut self) -> Option<Vec<u8>> {
        let (buffers, len) = self.rings[RX].take_used(&self.memory)?;
        let mut bytes = Vec::new();
        for buffer in buffers {
            let mut part = vec![0; (len as usize - bytes.len()).min(buffer.len as usize)];
            self.memory.read_slice(&mut part, GuestAddress(buffer.address)).unwrap();
            bytes.extend(part);
        }
        Some(bytes)
    }

    /// The next frame that the guest got, its header first.
    fn received(&mut self) -> Option<Vec<u8>> {
        let mut frame = self.chain()?;
        for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
            frame.extend(self.chain().expect("all buffers of a frame at once"));
        }
        Some(frame)
    }

    fn send(&mut self, buffers: &[Buffer]) -> Kicks {
        self.rings[TX].add(&self.memory, buffers);
        self.run()
    }

    /// Sends a command; the device's answer.
    fn command(&mut self, queue: usize, bytes: &[u8]) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(TX_DATA)).unwrap();
        self.memory.write_slice(&[0xff], GuestAddress(TX_DATA + 100)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        let answer = Buffer { address: TX_DATA + 100, len: 1, writable: true };
        self.rings[queue].add(&self.memory, &[out(TX_DATA, len), answer]);
        assert!(self.run().contains(queue));
        assert_eq!(self.rings[queue].take_used(&self.memory).unwrap().1, 1);
        self.memory.read_obj(GuestAddress(TX_DATA + 100)).unwrap()
    }

    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn mistakes(&self) -> u64 {
        self.pairs[self.pair].mistakes.total()
    }

    /// What arrived at the other end.
    fn on_the_wire(&self) -> Vec<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let next = || self.network[self.pair].recv(&mut bytes).ok().map(|len| bytes[..len].to_vec());
        std::iter::from_fn(next).collect()
    }
}

fn out(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: false }
}

/// A frame with a header, told from others by its number. The counter's bytes are what a tap leaves there: anything.
fn numbered(number: u8, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| number.wrapping_add(u8::try_from(i % 251).unwrap())).collect();
    bytes[..10].fill(0);
    bytes[10..12].fill(0xee);
    bytes
}

/// As the guest gets it.
fn counted(mut frame: Vec<u8>, buffers: u16) -> Vec<u8> {
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame
}

#[test]
fn frames_of_the_guest_arrive_in_one_piece() {
    let mut guest = Guest::new(ALL);
    let frame = numbered(1, 3000);
    guest.memory.write_slice(&frame, GuestAddress(TX_DATA)).unwrap();
    let cuts = [vec![3000], vec![12, 2988], vec![1, 10, 2, 0, 2000, 987]];
    for cut in cuts {
        let mut at = TX_DATA;
        let buffers: Vec<_> = cut
            .iter()
            .map(|len| {
                at += u64::from(*len);
                out(at - u64::from(*len), *len)
            })
            .collect();
        assert!(guest.send(&buffers).contains(TX));
        assert_eq!(guest.rings[TX].take_used(&guest.memory).unwrap().1, 0);
        assert_eq!(guest.on_the_wire(), std::slice::from_ref(&frame));
    }
    let buffers = [out(TX_DATA, 20), out(TX_DATA + 20, 2980)];
    guest.rings[TX].add_indirect(&guest.memory, 0x300_0000, &buffers);
    guest.run();
    assert_eq!(guest.on_the_wire(), [frame]);
    assert_eq!(guest.mistakes(), 0);
}

#[test]
fn a_frame_arrives_in_one_buffer() {
    for acked in [ALL, ALL & !feature::MRG_RXBUF] {
        let mut guest = Guest::new(acked);
        guest.post(4, 70_000);
        for number in [1, 2] {
            let frame = numbered(number, 1000 * usize::from(number));
            guest.network[0].send(&frame).unwrap();
            assert!(guest.run().contains(RX));
            assert_eq!(guest.received(), Some(counted(frame, 1)));
        }
        assert_eq!(guest.received(), None);
        assert_eq!(guest.mistakes(), 0);
    }
}

#[test]
fn long_frames_take_several_buffers() {
    let mut guest = Guest::new(ALL);
    guest.post(200, 1536);
    for (number, len, buffers) in [(1, 60_000, 40), (2, 100, 1), (3, 1536, 1), (4, 1537, 2), (5, MAX_FRAME, 43)] {
        let frame = numbered(number, len);
        guest.network[0].send(&frame).unwrap();
        assert!(guest.run().contains(RX));
        assert!(guest.received() == Some(counted(frame, buffers)), "frame {number}");
    }
    // Several at once, which share what was gathered.
    let frames: Vec<_> = (6..15).map(|number| numbered(number, 4000)).collect();
    frames.iter().for_each(|frame| assert_eq!(guest.network[0].send(frame).unwrap(), 4000));
    guest.run();
    for frame in frames {
        assert!(guest.received() == Some(counted(frame, 3)));
    }
    assert_eq!(guest.mistakes(), 0);
}

#[test]
fn buffers_may_be_cut_anywhere() {
    let mut guest = Guest::new(ALL);
    let mut at = RX_BUFFERS;
    for _ in 0..100 {
        // The counter lies in two pieces.
        let buffers = [11, 0, 1, 700].map(|len| {
            at += 1000;
            Buffer { address: at, len, writable: true }
        });
        guest.rings[RX].add(&guest.memory, &buffers[..]);
        guest.run();
    }
    let frame = numbered(1, 2000);
    guest.network[0].send(&frame).unwrap();
    guest.run_on();
    assert_eq!(guest.received(), Some(counted(frame, 3)));
}

#[test]
fn without_room_frames_stay_where_they_are_and_nobody_spins() {
    let mut guest = Guest::new(ALL);
    for number in 0..5 {
        guest.network[0].send(&numbered(number, 5000)).unwrap();
    }
    guest.run();
    assert!(readable_within(&guest.pairs[0].peers[0].port, 0), "frames were read that have no room");
    assert!(!readable_within(&guest.pairs[0].epoll.0, 0), "the thread would spin");
    // Room for one and a half: the second has to wait for more.
    guest.post(5, 1536);
    guest.run();
    assert!(guest.received() == Some(counted(numbered(0, 5000), 4)));
    assert_eq!(guest.received(), None);
    assert!(!readable_within(&guest.pairs[0].epoll.0, 0));
    guest.post(3, 1536);
    let mut queues: Vec<_> = guest.queues.iter_mut().take(2).map(Some).collect();
    guest.pairs[0].queue(0, &mut queues, &guest.memory).unwrap();
    assert!(guest.received() == Some(counted(numbered(1, 5000), 4)));
    guest.post(100, 1536);
    guest.run();
    for number in 2..5 {
        assert!(guest.received() == Some(counted(numbered(number, 5000), 4)));
    }
    assert_eq!(guest.mistakes(), 0);
}

#[test]
fn a_frame_that_never_has_room_is_dropped() {
    // A whole queue of buffers that hold nothing but a header.
    let mut guest = Guest::new(ALL);
    guest.post(256, 12);
    guest.network[0].send(&numbered(1, 60_000)).unwrap();
    guest.network[0].send(&numbered(2, 3072)).unwrap();
    guest.run_on();
    assert!(guest.received() == Some(counted(numbered(2, 3072), 256)));
    assert_eq!((guest.mistakes(), guest.pairs[0].receiver.dropped), (1, 1));

    let mut guest = Guest::new(ALL & !feature::MRG_RXBUF);
    guest.post(2, 1526);
    guest.network[0].send(&numbered(1, 1527)).unwrap();
    guest.network[0].send(&numbered(2, 1526)).unwrap();
    guest.run_on();
    assert_eq!(guest.received(), Some(counted(numbered(2, 1526), 1)));
    assert_eq!((guest.mistakes(), guest.pairs[0].receiver.dropped), (1, 1));
}

#[test]
fn what_is_shorter_than_a_header_is_no_frame() {
    let mut guest = Guest::new(ALL);
    guest.post(100, 1536);
    guest.network[0].send(&[1; 11]).unwrap();
    guest.network[0].send(&numbered(1, 12)).unwrap();
    guest.run_on();
    assert_eq!(guest.received(), Some(counted(numbered(1, 12), 1)));
}

#[test]
fn malformed_frames_are_counted_and_returned() {
    let mut guest = Guest::new(ALL);
    let size = u64::try_from(SIZE).unwrap();
    let bad = [
        vec![out(TX_DATA, 0)],
        vec![out(TX_DATA, 25)],
        vec![out(TX_DATA, 65_563)],
        vec![out(0, 60 << 20)],
        vec![Buffer { writable: true, ..out(TX_DATA, 100) }],
        vec![out(size - 50, 100)],
        vec![out(u64::MAX - 50, 100)],
        vec![out(TX_DATA, 50), out(size, 50)],
        vec![out(TX_DATA, 1); 65],
    ];
    for (i, chain) in bad.iter().enumerate() {
        assert!(guest.send(chain).contains(TX));
        assert_eq!(guest.rings[TX].take_used(&guest.memory).unwrap().1, 0);
        assert_eq!(guest.mistakes(), u64::try_from(i + 1).unwrap(), "{chain:?}");
    }
    guest.rings[TX].add_endless(&guest.memory, &[out(TX_DATA, 100)]);
    guest.run();
    assert!(guest.rings[TX].take_used(&guest.memory).is_some());
    assert!(guest.on_the_wire().is_empty());
    guest.send(&[out(TX_DATA, 26)]);
    assert_eq!(guest.on_the_wire().len(), 1);
}

#[test]
fn malformed_receive_buffers_are_counted_and_returned() {
    let mut guest = Guest::new(ALL);
    let size = u64::try_from(SIZE).unwrap();
    let room = |address, len| Buffer { address, len, writable: true };
    let bad = [
        vec![room(RX_BUFFERS, 11)],
        vec![room(RX_BUFFERS, 0)],
        vec![out(RX_BUFFERS, 2000)],
        vec![room(size - 10, 2000)],
        vec![room(RX_BUFFERS, 100), room(u64::MAX, 2000)],
        vec![room(RX_BUFFERS, 30); 65],
    ];
    for chain in &bad {
        guest.rings[RX].add(&guest.memory, chain);
    }
    guest.post(50, 1536);
    guest.network[0].send(&numbered(1, 1000)).unwrap();
    guest.run_on();
    for _ in &bad {
        assert_eq!(guest.rings[RX].take_used(&guest.memory).unwrap().1, 0);
    }
    assert_eq!(guest.mistakes(), u64::try_from(bad.len()).unwrap());
    assert_eq!(guest.received(), Some(counted(numbered(1, 1000), 1)));
}

#[test]
fn a_malformed_receive_buffer_behind_a_good_one_is_returned_once_and_in_order() {
    let mut guest = Guest::new(ALL);
    let bad = |guest: &mut Guest| guest.rings[RX].add(&guest.memory, &[out(RX_BUFFERS, 2000)]);
    guest.post(1, 1536);
    bad(&mut guest);
    guest.post(2, 1536);
    // Nothing to receive: all stays where it is.
    guest.run();
    guest.run();
    assert_eq!(guest.rings[RX].take_used(&guest.memory).map(|(_, len)| len), None);
    guest.network[0].send(&numbered(1, 1000)).unwrap();
    guest.run_on();
    assert_eq!(guest.received(), Some(counted(numbered(1, 1000), 1)));
    assert_eq!((guest.chain(), guest.mistakes()), (Some(vec![]), 1));
    // One in the middle of a frame's buffers is counted among them.
    bad(&mut guest);
    guest.post(100, 1536);
    guest.network[0].send(&numbered(2, 4000)).unwrap();
    guest.run_on();
    assert!(guest.received() == Some(counted(numbered(2, 4000), 4)));
    assert_eq!(guest.mistakes(), 2);
    guest.network[0].send(&numbered(3, 4000)).unwrap();
    guest.run_on();
    assert!(guest.received() == Some(counted(numbered(3, 4000), 3)));
    assert_eq!(guest.rings[RX].take_used(&guest.memory).map(|(_, len)| len), None);
}

#[test]
fn a_network_without_room_makes_the_guest_wait() {
    let mut guest = Guest::new(ALL);
    for _ in 0..100 {
        guest.rings[TX].add(&guest.memory, &[out(TX_DATA, 1000)]);
    }
    guest.run_on();
    let mut arrived = guest.on_the_wire().len();
    assert!(arrived < 100, "{arrived}");
    assert_eq!(guest.mistakes(), 0);
    while arrived < 100 {
        assert!(readable_within(&guest.pairs[0].epoll.0, 1000), "nobody told of the room");
        guest.run();
        arrived += guest.on_the_wire().len();
    }
    assert_eq!(std::iter::from_fn(|| guest.rings[TX].take_used(&guest.memory)).count(), 100);
}

#[test]
fn a_flood_does_not_keep_the_other_direction_waiting() {
    let mut guest = Guest::new(ALL);
    // None of them needs the network.
    for _ in 0..256 {
        guest.rings[TX].add(&guest.memory, &[out(TX_DATA, 1)]);
    }
    guest.post(100, 1536);
    guest.network[0].send(&numbered(1, 1000)).unwrap();
    guest.run();
    assert!(guest.received().is_some());
    let used = std::iter::from_fn(|| guest.rings[TX].take_used(&guest.memory)).count();
    assert_eq!(used, BATCH * TURNS);
    assert!(readable_within(&guest.pairs[0].epoll.0, 0), "the rest would be left");
    // The same with receive buffers that are no good.
    let mut guest = Guest::new(ALL);
    guest.network[0].send(&numbered(1, 1000)).unwrap();
    for _ in 0..256 {
        guest.rings[RX].add(&guest.memory, &[out(TX_DATA, 1)]);
    }
    guest.send(&[out(TX_DATA, 100)]);
    assert_eq!(guest.on_the_wire().len(), 1);
    guest.run_on();
    assert_eq!(guest.mistakes(), 256);
}

#[test]
fn a_reset_forgets_frames_that_wait() {
    let mut guest = Guest::new(ALL);
    guest.post(1, 100);
    guest.network[0].send(&numbered(1, 1000)).unwrap();
    guest.run();
    assert_eq!(guest.pairs[0].receiver.held, 1000);
    guest.pairs[0].reset();
    guest.pairs[0].activate(ALL);
    guest.post(100, 1536);
    guest.run_on();
    assert_eq!(guest.received(), None);
}

#[test]
fn a_card_says_what_it_is() {
    let (pairs, ..) = card(1, false);
    assert_eq!((pairs.len(), pairs[0].queues(), pairs[0].queue_sizes().len()), (1, 0b11, 2));
    assert_eq!(pairs[0].features() & (feature::MQ | feature::CTRL_VQ | feature::MTU), 0);
    assert_ne!(pairs[0].features() & feature::HOST_USO, 0);
    assert_eq!(pairs[0].config(), [2, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0]);

    let (pairs, ..) = card(3, false);
    let queues: Vec<_> = pairs.iter().map(NetPair::queues).collect();
    assert_eq!(queues, [0b100_0011, 0b1100, 0b11_0000]);
    let sizes: Vec<_> = pairs.iter().map(|pair| pair.queue_sizes().len()).collect();
    assert_eq!(sizes, [3, 2, 2]);
    assert!(pairs.iter().all(|pair| pair.features() & feature::MQ != 0 && pair.config()[8..10] == [3, 0]));

    let (ours, _theirs) = UnixDatagram::pair().unwrap();
    let wire = Wire { index: 0, socket: ours, calls: Arc::default(), broken: false };
    let pair = Net::with_ports(vec![wire], MAC, Some(1400)).unwrap().split().remove(0);
    assert_eq!((pair.features() & feature::MTU, &pair.config()[10..]), (feature::MTU, &1400u16.to_le_bytes()[..]));
    assert!(matches!(Net::<Wire>::with_ports(vec![], MAC, None), Err(NetError::Pairs(0))));
    let (null, _) = UnixDatagram::pair().unwrap();
    assert!(matches!(Net::new(vec![null.into()], MAC, None), Err(NetError::Tap(0, TapError::Flags(_)))));
}

#[test]
fn the_guest_chooses_how_many_pairs_get_frames() {
    let mut guest = Guest::with_pairs(3, ALL);
    let acked = guest.pairs[0].features();
    let one = vec![Call::Configure(acked), Call::Enable(1, false), Call::Enable(2, false)];
    assert_eq!(guest.calls(), one);
    assert_eq!(guest.command(CONTROL, &[4, 0, 2, 0]), 0);
    assert_eq!(guest.calls(), [Call::Enable(1, true)]);
    assert!(readable_within(&guest.pairs[1].epoll.0, 0), "its thread does not look");
    assert_eq!(guest.command(CONTROL, &[4, 0, 3, 0]), 0);
    assert_eq!(guest.command(CONTROL, &[4, 0, 3, 0]), 0);
    assert_eq!(guest.calls(), [Call::Enable(2, true)]);
    for bad in [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[4, 0, 0xff, 0xff], &[4, 0, 1], &[4, 1, 1, 0], &[0, 0, 1], &[4], &[]]
    {
        assert_eq!(guest.command(CONTROL, bad), 1, "{bad:?}");
    }
    assert_eq!(guest.calls(), []);
    // A driver that starts over has one pair.
    for pair in &mut guest.pairs {
        pair.reset();
        pair.activate(acked);
    }
    assert_eq!(guest.calls(), one);
}

#[test]
fn pairs_are_not_changed_all_the_time() {
    let mut guest = Guest::with_pairs(2, ALL);
    guest.calls();
    let accepted = (0..200).filter(|i| guest.command(CONTROL, &[4, 0, 1 + i % 2, 0]) == 0).count();
    assert!(guest.calls().len() <= 10, "{accepted}");
    assert!(guest.mistakes() > 0);
}

#[test]
fn commands_without_an_answer_are_counted_and_returned() {
    let mut guest = Guest::with_pairs(2, ALL);
    guest.memory.write_slice(&[4, 0, 2, 0], GuestAddress(TX_DATA)).unwrap();
    guest.calls();
    let answer = Buffer { address: u64::MAX, len: 1, writable: true };
    for chain in [vec![out(TX_DATA, 4)], vec![out(TX_DATA, 4), answer], vec![Buffer { len: 0, ..answer }]] {
        let before = guest.mistakes();
        guest.rings[CONTROL].add(&guest.memory, &chain);
        guest.run();
        assert_eq!(guest.rings[CONTROL].take_used(&guest.memory).unwrap().1, 0);
        assert_eq!((guest.mistakes(), guest.calls()), (before + 1, vec![]));
    }
}

#[test]
fn a_driver_for_one_pair_finds_its_control_queue() {
    let mut guest = Guest::with_pairs(2, ALL & !feature::MQ);
    guest.calls();
    guest.pair = 1;
    assert_eq!(guest.command(0, &[4, 0, 1, 0]), 1);
    assert_eq!(guest.command(0, &[0, 0, 1]), 1);
    assert_eq!(guest.calls(), []);
    // And its frames.
    guest.pair = 0;
    guest.rings = (0..3).map(|i| Ring::new(0x1_0000 * (i + 1), 256)).collect();
    guest.queues = guest.rings.iter().map(Ring::queue).collect();
    guest.send(&[out(TX_DATA, 100)]);
    assert_eq!(guest.on_the_wire().len(), 1);
}

#[test]
fn a_tap_that_cannot_be_set_up_stops_the_device() {
    let (mut pairs, ..) = card(1, true);
    let features = pairs[0].features();
    pairs[0].activate(features);
    let run = pairs[0].queue(0, &mut [None, None], &memory());
    assert!(matches!(run, Err(Error::System("set offloads of tap", _))));
    pairs[0].reset();
    assert!(pairs[0].queue(0, &mut [None, None], &memory()).is_ok());
}

#[test]
fn a_ring_that_cannot_be_is_an_error() {
    for ring in [RX, TX] {
        let mut guest = Guest::new(ALL);
        guest.network[0].send(&numbered(1, 1000)).unwrap();
        guest.rings[ring].set_index(&guest.memory, 2000);
        let mut queues: Vec<_> = guest.queues.iter_mut().take(2).map(Some).collect();
        assert!(matches!(guest.pairs[0].source(0, &mut queues, &guest.memory), Err(Error::Ring(_))));
        assert!(guest.pairs[0].source(0, &mut [None, None], &guest.memory).is_ok());
        assert!(guest.pairs[0].source(0, &mut [], &guest.memory).is_ok());
    }
}
