use arbitrary::Arbitrary;
use vz_virtio::balloon::{Balloon, Handle};

use crate::{
    guest::{Ask, Device, Worker},
    values::{Bytes, Number},
};

pub(crate) struct Guest {
    workers: [Worker; 1],
    handle: Handle,
}

#[derive(Debug, Arbitrary)]
pub(crate) enum Data {
    Pages(Vec<Number>),
    /// A run of pages in no order.
    Run(u8, u8),
    /// Free ranges, by their pages.
    Report([u8; 3]),
    Raw(Bytes),
}

impl Device for Guest {
    type Data = Data;
    type Host = Number;
    // It gives away pages, which are zeros then.
    const WRITES_ELSEWHERE: bool = true;

    fn new() -> Result<Self, String> {
        let (balloon, handle) = Balloon::new().map_err(|e| e.to_string())?;
        Ok(Self { workers: [Worker::new(balloon)], handle })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(data: Data) -> Ask {
        // The pages below 24 have the rings and what the device reads: the fuzzer would lose what it steers with.
        let page = |number: u32| if number < 24 { number + 24 } else { number };
        let bytes = match data {
            Data::Report(pages) => {
                let room = pages.iter().map(|pages| u32::from(pages % 8) * 4096).collect();
                return Ask { queue: 2, bytes: Vec::new(), room };
            }
            Data::Pages(pages) => pages.iter().flat_map(|number| page(number.u32()).to_le_bytes()).collect(),
            Data::Run(first, count) => {
                (0..count).rev().flat_map(|i| page(u32::from(first) + u32::from(i)).to_le_bytes()).collect()
            }
            Data::Raw(bytes) => bytes.0,
        };
        Ask { queue: 0, bytes, room: Vec::new() }
    }

    fn host(&mut self, target: Number) {
        self.handle.set_target(target.0);
    }

    fn check(&mut self) {
        let stats = self.handle.stats();
        assert!(stats.returned.is_multiple_of(4096));
        let config = self.workers[0].backend.config();
        assert_eq!(stats.actual / 4096, u64::from(u32::from_le_bytes(config[4..8].try_into().unwrap())));
    }
}
