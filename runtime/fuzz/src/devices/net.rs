use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixDatagram,
    },
};

use arbitrary::Arbitrary;
use vz_virtio::net::{Net, Port};

use crate::{
    guest::{Ask, Device, Worker},
    values::{Bytes, Number},
};

/// A socket for a tap.
#[derive(Debug)]
struct Wire(UnixDatagram);

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Port for Wire {
    fn takes_long_udp(&self) -> bool {
        true
    }

    fn configure(&self, _acked: u64) -> io::Result<()> {
        Ok(())
    }

    fn enable(&self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }
}

pub(crate) struct Guest {
    workers: Vec<Worker>,
    network: Vec<UnixDatagram>,
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Data {
    Frame {
        header: [u8; 12],
        data: Bytes,
    },
    Pairs(Number),
    /// Room for frames.
    Buffer(u16),
    Buffers([u8; 4]),
    Raw(Bytes),
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Host {
    Frame(bool, u16),
    Drain(bool),
}

impl Device for Guest {
    type Data = Data;
    type Host = Host;

    fn new() -> Result<Self, String> {
        let (mut wires, mut network) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let (ours, theirs) = UnixDatagram::pair().map_err(|e| e.to_string())?;
            for end in [&ours, &theirs] {
                end.set_nonblocking(true).map_err(|e| e.to_string())?;
            }
            wires.push(Wire(ours));
            network.push(theirs);
        }
        let net = Net::with_ports(wires, [2, 0, 0, 0, 0, 1], Some(1500)).map_err(|e| e.to_string())?;
        Ok(Self { workers: net.split().into_iter().map(Worker::new).collect(), network })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(data: Data) -> Ask {
        match data {
            Data::Frame { header, data } => Ask { queue: 1, bytes: [&header[..], &data.0].concat(), room: Vec::new() },
            Data::Pairs(pairs) => {
                Ask { queue: 2, bytes: [&[4, 0][..], &pairs.u16().to_le_bytes()].concat(), room: vec![1] }
            }
            Data::Buffer(len) => Ask { room: vec![len.into()], ..Ask::default() },
            Data::Buffers(pieces) => Ask { room: pieces.map(u32::from).to_vec(), ..Ask::default() },
            Data::Raw(bytes) => Ask { queue: 1, bytes: bytes.0, room: Vec::new() },
        }
    }

    fn host(&mut self, action: Host) {
        match action {
            // Fails where the other end does not read.
            Host::Frame(which, len) => drop(self.network[usize::from(which)].send(&vec![0xa5; len.into()])),
            Host::Drain(which) => {
                let mut frame = vec![0; 1 << 17];
                while let Ok(len) = self.network[usize::from(which)].recv(&mut frame) {
                    assert!((26..=65562).contains(&len), "frame of {len} bytes");
                }
            }
        }
    }
}
