use std::{
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use arbitrary::Arbitrary;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vz_virtio::blk::{Blk, Config};

use crate::{
    guest::{Ask, Device, Worker},
    values::{Bytes, Number},
};

/// The disk's sectors; what the file has behind them is not the guest's.
const DISK: u64 = 64 * 512;

pub(crate) struct Guest {
    workers: Vec<Worker>,
    file: File,
    len: u64,
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Data {
    Request { kind: u8, sector: Number, data: Bytes },
    Read { sector: u8, sectors: u8 },
    Flush,
    Write { sector: u8, sectors: u8, fill: u8 },
    Range { zero: bool, sector: u8, sectors: u8, unmap: bool },
    Ranges { zero: bool, ranges: Vec<(Number, Number, u8)> },
    Raw(Bytes),
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Host {
    /// Somebody changes the file's size.
    Resize(u16),
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

impl Device for Guest {
    type Data = Data;
    type Host = Host;

    fn new() -> Result<Self, String> {
        let fd: OwnedFd = memfd_create("disk", MFdFlags::MFD_CLOEXEC).map_err(|e| e.to_string())?;
        let file = File::from(fd);
        file.set_len(DISK).map_err(|e| e.to_string())?;
        let config = Config {
            file: file.try_clone().map_err(|e| e.to_string())?,
            read_only: false,
            id: "fuzz".into(),
            queues: 2,
        };
        let workers = Blk::new(config).map_err(|e| e.to_string())?.split().into_iter().map(Worker::new).collect();
        // Beyond the size that the device knows.
        file.write_all_at(&[0x5a; 4096], DISK).map_err(|e| e.to_string())?;
        Ok(Self { workers, file, len: DISK + 4096 })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(data: Data) -> Ask {
        let range = |(sector, count, flags): (u64, u32, u32)| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        let ranges = |zero: bool| header(if zero { 13 } else { 11 }, 0);
        let mut room = vec![1];
        let bytes = match data {
            Data::Read { sector, sectors } => {
                room.insert(0, u32::from(sectors % 8) * 512);
                header(0, (sector % 70).into())
            }
            Data::Flush => header(4, 0),
            Data::Range { zero, sector, sectors, unmap } => {
                [ranges(zero), range(((sector % 70).into(), (sectors % 40).into(), unmap.into()))].concat()
            }
            Data::Request { kind, sector, data } => {
                room.insert(0, 512);
                [header((kind % 16).into(), sector.0), data.0].concat()
            }
            Data::Write { sector, sectors, fill } => {
                [header(1, (sector % 70).into()), vec![fill; usize::from(sectors % 8) * 512]].concat()
            }
            Data::Ranges { zero, ranges: list } => {
                let list =
                    list.into_iter().flat_map(|(sector, count, flags)| range((sector.0, count.u32(), flags.into())));
                [ranges(zero), list.collect()].concat()
            }
            Data::Raw(bytes) => bytes.0,
        };
        // Both queues.
        Ask { queue: bytes.len() / 512 % 2, bytes, room }
    }

    fn host(&mut self, action: Host) {
        let Host::Resize(len) = action;
        self.file.set_len(len.into()).unwrap();
        self.len = self.len.min(len.into());
    }

    fn check(&mut self) {
        let mut bytes = vec![0; usize::try_from(self.len.saturating_sub(DISK)).unwrap()];
        self.file.read_exact_at(&mut bytes, DISK).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0x5a), "wrote behind the end of the disk");
        assert!(self.file.metadata().unwrap().len() <= 1 << 16, "the disk grew");
    }
}
