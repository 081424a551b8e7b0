//! The part of the machine that parses what a guest writes to it, for the fuzzer.

use std::sync::Arc;

use vz_jail::Role;
use vz_virtio::{Backend, Memory, Worker};

use crate::{
    Error,
    device::{Device, Unheard},
    mmio::Registers,
    register,
    register_page::RegisterPages,
};

/// Offset of the notification register, of which writes do not come here.
pub const NOTIFY: u64 = register::QUEUE_NOTIFY;

/// The registers of a device whose thread never runs: what it is told goes nowhere.
#[derive(Debug)]
pub struct Transport(Registers);

impl Transport {
    /// Registers for a backend with its queues.
    pub fn new(backend: Box<dyn Backend>, queues: u64, memory: &Memory) -> Result<Self, Error> {
        let worker = Worker { backend, queues, thread: "fuzz".into(), role: Role::Device };
        let (device, _serving) =
            Device::new(vec![worker], memory, RegisterPages::reserve(1)?.of(0), Box::new(Unheard))?;
        Ok(Self(Registers::new(Arc::new(device), memory.clone())))
    }

    /// As a vCPU's read.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.0.read(offset, bytes);
    }

    /// As a vCPU's write.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.0.write(offset, bytes);
    }
}
