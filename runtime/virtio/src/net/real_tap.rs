//! The device on a tap of the kernel's, in a network namespace of the test's own; needs root.

use std::{
    fs::File,
    net::UdpSocket,
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use vm_memory::{Bytes, GuestAddress};
use vz_sys::tap;

use super::*;
use crate::testing::{Buffer, Ring, memory, readable_within};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const HOST: &str = "10.9.8.1";
const HOST_IP: [u8; 4] = [10, 9, 8, 1];
const GUEST: &str = "10.9.8.2";
const GUEST_IP: [u8; 4] = [10, 9, 8, 2];
const TX_DATA: u64 = 0x200_0000;
const NEEDS_CSUM: u8 = 1;

/// Runs in a thread that has a tap of that many queues, unless it cannot.
fn with_tap(queues: usize, test: impl FnOnce(Vec<OwnedFd>) + Send + 'static) {
    let name = vz_tally::running();
    let body = move || match make_tap(queues) {
        Ok(queues) => test(queues),
        Err(e) => vz_tally::skip!(test: &name, "cannot make a tap in a network namespace: {e}"),
    };
    thread::spawn(body).join().unwrap();
}

fn make_tap(queues: usize) -> io::Result<Vec<OwnedFd>> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let flags = tap::TAP | tap::NO_PI | tap::VNET_HDR | if queues > 1 { tap::MULTI_QUEUE } else { 0 };
    let open = |_| {
        let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
        tap::attach(&tun, "tap0", flags)?;
        Ok(OwnedFd::from(tun))
    };
    let taps = (0..queues).map(open).collect::<io::Result<_>>()?;
    let host = format!("{HOST}/24");
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    for command in [
        &["link", "set", "tap0", "up"][..],
        &["address", "add", &host, "dev", "tap0"],
        &["neighbour", "add", GUEST, "lladdr", &mac, "dev", "tap0"],
    ] {
        let done = Command::new("ip").args(command).status()?;
        assert!(done.success(), "ip {command:?}");
    }
    Ok(taps)
}

/// One pair with its driver.
struct Driver {
    device: NetPair,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
}

impl Driver {
    fn new(mut device: NetPair, memory: &Memory, index: u64) -> Self {
        device.activate(device.features());
        let base = 0x10_0000 * (index + 1);
        let mut rings: Vec<_> = (0..3).map(|i| Ring::new(base + 0x8000 * i, 256)).collect();
        let queues = rings.iter().map(Ring::queue).collect();
        for i in 0..200 {
            rings[RX].add(memory, &[Buffer { address: base + 0x2_0000 + i * 2048, len: 1536, writable: true }]);
        }
        Self { device, rings, queues }
    }

    fn run(&mut self, memory: &Memory) {
        let count = self.device.queue_sizes().len();
        let mut queues: Vec<_> = self.queues.iter_mut().take(count).map(Some).collect();
        self.device.source(0, &mut queues, memory).unwrap();
    }

    /// Frames that arrive within a moment, without their headers' last two bytes being looked at.
    fn frames(&mut self, memory: &Memory, accept: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(2);
        self.run(memory);
        loop {
            while let Some((buffers, len)) = self.rings[RX].take_used(memory) {
                let mut frame = vec![0; len as usize];
                memory.read_slice(&mut frame, GuestAddress(buffers[0].address)).unwrap();
                if accept(&frame) {
                    frames.push(frame);
                }
            }
            let wait = if frames.is_empty() { 200 } else { 20 };
            if Instant::now() > deadline || !readable_within(&self.device.epoll.0, wait) {
                return frames;
            }
            self.run(memory);
        }
    }

    fn send(&mut self, memory: &Memory, frame: &[u8]) {
        memory.write_slice(frame, GuestAddress(TX_DATA)).unwrap();
        let len = u32::try_from(frame.len()).unwrap();
        self.rings[TX].add(memory, &[Buffer { address: TX_DATA, len, writable: false }]);
        self.run(memory);
        assert!(self.rings[TX].take_used(memory).is_some());
    }
}

fn is_udp(frame: &[u8]) -> bool {
    frame.len() > 46 && frame[24..26] == [8, 0] && frame[35] == 17
}

/// A UDP packet of the guest's whose checksum is left to the host, and the header that says so.
fn udp_to_host(port: u16, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame[0] = NEEDS_CSUM;
    frame[6..8].copy_from_slice(&34u16.to_le_bytes());
    frame[8..10].copy_from_slice(&6u16.to_le_bytes());
    // The tap's address is not known here; everybody takes a broadcast.
    frame.extend([0xff; 6]);
    frame.extend(MAC);
    frame.extend([8, 0]);
    let udp_len = u16::try_from(8 + data.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(GUEST_IP);
    ip.extend(HOST_IP);
    let checksum = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    frame.extend(ip);
    // What is summed up by the sender: addresses, protocol, length.
    let pseudo = sum(&[GUEST_IP, HOST_IP].concat(), 17 + u32::from(udp_len));
    for word in [5000, port, udp_len, pseudo] {
        frame.extend(word.to_be_bytes());
    }
    frame.extend(data);
    frame
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let total = bytes.chunks(2).fold(start, |all, pair| all + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    u16::try_from((total & 0xffff) + (total >> 16)).unwrap()
}

#[test]
fn packets_go_both_ways() {
    with_tap(1, |taps| {
        let memory = memory();
        let mut pairs = Net::new(taps, MAC, None).unwrap().split();
        let mut driver = Driver::new(pairs.remove(0), &memory, 0);
        let socket = UdpSocket::bind((HOST, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();

        driver.send(&memory, &udp_to_host(socket.local_addr().unwrap().port(), b"from the guest"));
        let mut bytes = [0; 100];
        let (len, from) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..len], from.to_string().as_str()), (&b"from the guest"[..], "10.9.8.2:5000"));

        socket.send_to(b"to the guest", (GUEST, 5000)).unwrap();
        let frames = driver.frames(&memory, is_udp);
        assert_eq!(frames.len(), 1);
        assert!(frames[0].ends_with(b"to the guest"));
        assert_eq!(frames[0][HEADER..HEADER + 6], MAC);
        // The guest sums it up, or does not at all; one buffer.
        assert_eq!((frames[0][0], &frames[0][10..12]), (NEEDS_CSUM, &[1, 0][..]));
        assert_eq!(driver.device.mistakes.total(), 0);

        // Nonsense in a header is refused by the kernel, and counted here.
        let mut bad = udp_to_host(1, b"x");
        bad[6..8].copy_from_slice(&60_000u16.to_le_bytes());
        driver.send(&memory, &bad);
        assert_eq!(driver.device.mistakes.total(), 1);
    });
}

#[test]
fn queues_get_packets_when_the_guest_wants_them() {
    with_tap(2, |taps| {
        let memory = memory();
        let mut drivers: Vec<_> = Net::new(taps, MAC, None)
            .unwrap()
            .split()
            .into_iter()
            .zip(0..)
            .map(|(pair, index)| Driver::new(pair, &memory, index))
            .collect();
        // Each flow stays in one queue, so some are needed to see both.
        let sockets: Vec<_> = (0..32).map(|_| UdpSocket::bind((HOST, 0)).unwrap()).collect();
        let mut received = || {
            for socket in &sockets {
                socket.send_to(b"x", (GUEST, 5000)).unwrap();
            }
            drivers.iter_mut().map(|driver| driver.frames(&memory, is_udp).len()).collect::<Vec<_>>()
        };
        assert_eq!(received(), [32, 0]);

        let mut set_pairs = |pairs: u8| {
            memory.write_slice(&[4, 0, pairs, 0], GuestAddress(TX_DATA)).unwrap();
            let command = Buffer { address: TX_DATA, len: 4, writable: false };
            let answer = Buffer { address: TX_DATA + 4, len: 1, writable: true };
            memory.write_slice(&[0xff], GuestAddress(TX_DATA + 4)).unwrap();
            drivers[0].rings[CONTROL].add(&memory, &[command, answer]);
            drivers[0].run(&memory);
            assert_eq!(memory.read_obj::<u8>(GuestAddress(TX_DATA + 4)).unwrap(), 0);
        };
        set_pairs(2);
        let mut received = || {
            for socket in &sockets {
                socket.send_to(b"x", (GUEST, 5000)).unwrap();
            }
            drivers.iter_mut().map(|driver| driver.frames(&memory, is_udp).len()).collect::<Vec<_>>()
        };
        let both = received();
        assert!(both[0] > 0 && both[1] > 0 && both[0] + both[1] == 32, "{both:?}");
    });
}

#[test]
fn taps_of_the_wrong_kind_are_refused() {
    with_tap(1, |taps| {
        let tap = &taps[0];
        assert!(tap::flags(tap.as_fd()).unwrap() & tap::VNET_HDR != 0);
        let again = || tap.try_clone().unwrap();
        assert!(matches!(Tap::new(again(), true), Err(TapError::Lacks("IFF_MULTI_QUEUE"))));
        Tap::new(again(), false).unwrap();
        let tun = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        tap::attach(&tun, "tap1", tap::TAP | tap::NO_PI).unwrap();
        assert!(matches!(Tap::new(tun.into(), false), Err(TapError::Lacks("IFF_VNET_HDR"))));
    });
}
