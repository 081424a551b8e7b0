use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use arbitrary::Arbitrary;
use vz_virtio::vsock::{
    Event, Handle, Vsock,
    packet::{Header, STREAM},
};

use crate::{
    guest::{Ask, Device, Worker},
    values::{Bytes, Number},
};

const CID: u32 = 3;
const HOST: u64 = 2;
const LISTENED: u32 = 1024;
/// Where the device counts the ports of dials from.
const FIRST_PORT: u32 = 1 << 30;

pub(crate) struct Guest {
    workers: [Worker; 1],
    handle: Handle,
    streams: Vec<UnixStream>,
    dials: u64,
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Data {
    /// A packet of a connection that the guest made, or makes.
    Own {
        port: u8,
        op: u8,
        flags: u8,
        credit: Number,
        taken: Number,
        data: Bytes,
        lie: Option<Number>,
    },
    /// A packet of one that the host dialled.
    Dialled {
        dial: u8,
        port: u8,
        op: u8,
        flags: u8,
        credit: Number,
        taken: Number,
        data: Bytes,
        lie: Option<Number>,
    },
    Any {
        source: Number,
        target: Number,
        ports: (Number, Number),
        kind: Number,
        op: Number,
        data: Bytes,
    },
    /// Room for packets.
    Buffer(u16),
    Raw(Bytes),
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Host {
    Dial(u8),
    Cancel(u8),
    Write(u8, u16),
    Read(u8, u16),
    Half(u8),
    Close(u8),
}

impl Device for Guest {
    type Data = Data;
    type Host = Host;

    fn new() -> Result<Self, String> {
        let (vsock, handle) = Vsock::new(CID, [LISTENED]).map_err(|e| e.to_string())?;
        Ok(Self { workers: [Worker::new(vsock)], handle, streams: Vec::new(), dials: 0 })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(data: Data) -> Ask {
        let packet = |header: Header, data: Bytes, lie: Option<Number>| {
            let len = lie.map_or_else(|| u32::try_from(data.0.len()).unwrap(), Number::u32);
            [&Header { len, ..header }.encode()[..], &data.0].concat()
        };
        let base = Header { src_cid: CID.into(), dst_cid: HOST, kind: STREAM, ..Header::default() };
        let bytes = match data {
            Data::Buffer(len) => return Ask { room: vec![len.into()], ..Ask::default() },
            Data::Own { port, op, flags, credit, taken, data, lie } => {
                let header = Header {
                    src_port: (port % 8).into(),
                    dst_port: LISTENED,
                    op: (op % 9).into(),
                    flags: flags.into(),
                    buf_alloc: credit.u32(),
                    fwd_cnt: taken.u32(),
                    ..base
                };
                packet(header, data, lie)
            }
            Data::Dialled { dial, port, op, flags, credit, taken, data, lie } => {
                let header = Header {
                    src_port: (port % 4).into(),
                    dst_port: FIRST_PORT + u32::from(dial % 8),
                    op: (op % 9).into(),
                    flags: flags.into(),
                    buf_alloc: credit.u32(),
                    fwd_cnt: taken.u32(),
                    ..base
                };
                packet(header, data, lie)
            }
            Data::Any { source, target, ports, kind, op, data } => {
                let header = Header {
                    src_cid: source.0,
                    dst_cid: target.0,
                    src_port: ports.0.u32(),
                    dst_port: ports.1.u32(),
                    kind: kind.u16(),
                    op: op.u16(),
                    ..base
                };
                packet(header, data, None)
            }
            Data::Raw(bytes) => bytes.0,
        };
        Ask { queue: 1, bytes, room: Vec::new() }
    }

    fn host(&mut self, action: Host) {
        while let Some(event) = self.handle.next() {
            let stream = match event {
                Event::Dialed { id, result } => {
                    assert!(id < self.dials, "answer to dial {id}, of {}", self.dials);
                    result.ok()
                }
                Event::Accepted { port, stream } => {
                    assert_eq!(port, LISTENED);
                    Some(stream)
                }
            };
            if let Some(stream) = stream {
                stream.set_nonblocking(true).unwrap();
                self.streams.push(stream);
            }
        }
        let count = self.streams.len().max(1);
        let index = |number: u8| usize::from(number) % count;
        match action {
            Host::Dial(port) => {
                self.handle.dial(self.dials, (port % 4).into());
                self.dials += 1;
            }
            Host::Cancel(id) => self.handle.cancel(id.into()),
            // They fail where there is no room or nothing there.
            Host::Write(which, len) => {
                if let Some(stream) = self.streams.get_mut(index(which)) {
                    let _ = stream.write(&vec![0xa5; len.into()]);
                }
            }
            Host::Read(which, len) => {
                if let Some(stream) = self.streams.get_mut(index(which)) {
                    let _ = stream.read(&mut vec![0; len.into()]);
                }
            }
            Host::Half(which) => {
                if let Some(stream) = self.streams.get(index(which)) {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            }
            Host::Close(which) => {
                if !self.streams.is_empty() {
                    self.streams.swap_remove(index(which));
                }
            }
        }
    }
}
