use vz_virtio::rng::Rng;

use crate::guest::{Ask, Device, Worker};

pub(crate) struct Guest {
    workers: [Worker; 1],
}

impl Device for Guest {
    /// Bytes of room.
    type Data = u16;
    type Host = ();

    fn new() -> Result<Self, String> {
        Ok(Self { workers: [Worker::new(Rng::new().map_err(|e| e.to_string())?)] })
    }

    fn workers(&mut self) -> &mut [Worker] {
        &mut self.workers
    }

    fn ask(len: u16) -> Ask {
        Ask { room: vec![len.into()], ..Ask::default() }
    }

    fn host(&mut self, (): ()) {}
}
