use std::io::{self, Read};

use vz_virtio::console::Console;

use crate::{
    guest::{Ask, Device, Worker},
    values::Bytes,
};

pub(crate) struct Guest {
    workers: [Worker; 1],
    reader: Option<io::PipeReader>,
}

#[derive(Debug, arbitrary::Arbitrary)]
pub(crate) enum Host {
    Read(u16),
    Leave,
}

impl Device for Guest {
    type Data = Bytes;
    type Host = Host;

    fn new() -> Result<Self, String> {
        let (reader, writer) = io::pipe().map_err(|e| e.to_string())?;
        let console = Console::new(writer.into()).map_err(|e| e.to_string())?;
        Ok(Self { workers: [Worker::new(console)], reader: Some(reader) })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(data: Bytes) -> Ask {
        Ask { queue: 1, bytes: data.0, room: Vec::new() }
    }

    fn host(&mut self, action: Host) {
        match (action, &mut self.reader) {
            (Host::Read(len), Some(reader)) => {
                use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
                use std::os::fd::AsFd;
                let mut there = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
                if poll(&mut there, PollTimeout::ZERO).unwrap() > 0 {
                    let _ = reader.read(&mut vec![0; len.into()]).unwrap();
                }
            }
            (Host::Leave, reader) => *reader = None,
            (Host::Read(_), None) => {}
        }
    }
}
