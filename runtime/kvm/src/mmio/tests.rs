use std::{
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use vz_jail::Role;
use vz_virtio::{Backend, Error, Kicks, Kind, Queues, Worker};

use super::*;
use crate::{device::Unheard, register_page::RegisterPages};

const RESET: &str = "reset";

/// Tells what it is called for.
struct Probe {
    say: Sender<String>,
    space: Vec<u8>,
}

impl Backend for Probe {
    fn kind(&self) -> Kind {
        Kind::Net
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn config(&self) -> &[u8] {
        &self.space
    }
    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        let start = usize::try_from(offset).unwrap();
        self.space[start..start + bytes.len()].copy_from_slice(bytes);
        self.say.send(format!("config {offset}")).unwrap();
    }
    fn activate(&mut self, acked: u64) {
        self.say.send(format!("activate {acked:#x}")).unwrap();
    }
    fn run(&mut self, _: Queues<'_, '_>, _: &Memory) -> Result<Kicks, Error> {
        unreachable!("it has no sources")
    }
    fn queue(&mut self, index: u16, queues: Queues<'_, '_>, _: &Memory) -> Result<Kicks, Error> {
        let there: Vec<u16> = queues.iter().flatten().map(|queue| queue.size()).collect();
        self.say.send(format!("queue {index} of {there:?}")).unwrap();
        Ok(Kicks::NONE)
    }
    fn reset(&mut self) {
        self.say.send(RESET.into()).unwrap();
    }
}

struct Guest {
    registers: Registers,
    said: Receiver<String>,
}

fn guest() -> Guest {
    let (say, said) = channel();
    let memory = crate::memory::reserve(16 << 20).unwrap();
    let worker = Worker {
        backend: Box::new(Probe { say, space: vec![1, 2, 3, 4, 5, 6] }),
        queues: 0b11,
        thread: "probe".into(),
        role: Role::Device,
    };
    let (device, serving) =
        Device::new(vec![worker], &memory, RegisterPages::reserve(1).unwrap().of(0), Box::new(Unheard)).unwrap();
    for serving in serving {
        // Unconfined: a filter would be the test process's for good.
        std::thread::spawn(move || serving.run().unwrap());
    }
    Guest { registers: Registers::new(Arc::new(device), memory), said }
}

impl Guest {
    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    fn said(&self) -> String {
        self.said.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    fn features(&self, features: u64) {
        for (select, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x24, select);
            self.write(0x20, u32::try_from(value).unwrap());
        }
    }

    fn set_up_queue(&self, index: u32, size: u32, at: u32) {
        self.write(0x30, index);
        self.write(0x38, size);
        self.write(0x80, at);
        self.write(0x90, at + 0x2000);
        self.write(0xa0, at + 0x4000);
        self.write(0x44, 1);
    }

    /// As a driver that is well behaved does.
    fn start(&self) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.features(1 << 32 | 1 << 29 | 1 << 5);
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11);
        self.set_up_queue(0, 128, 0x10_0000);
        self.set_up_queue(1, 64, 0x20_0000);
        self.write(0x70, 15);
    }
}

#[test]
fn a_driver_finds_the_device_and_its_features() {
    let guest = guest();
    assert_eq!((guest.read(0), guest.read(4), guest.read(8)), (0x7472_6976, 2, 1));
    assert_eq!(guest.read(0x10), 1 << 5 | 1 << 28 | 1 << 29);
    guest.write(0x14, 1);
    assert_eq!(guest.read(0x10), 1);
    guest.write(0x14, 2);
    assert_eq!(guest.read(0x10), 0);
    let sizes: Vec<u32> = (0..3)
        .map(|queue| {
            guest.write(0x30, queue);
            guest.read(0x34)
        })
        .collect();
    assert_eq!(sizes, [256, 64, 0]);
    let mut config = [0; 8];
    guest.registers.read(0x102, &mut config);
    assert_eq!(config, [3, 4, 5, 6, 0, 0, 0, 0]);
}

#[test]
fn a_driver_that_is_ready_gets_its_queues_served_until_it_resets() {
    let guest = guest();
    guest.start();
    assert_eq!(guest.said(), format!("activate {:#x}", 1u64 << 32 | 1 << 29 | 1 << 5));
    assert_eq!(guest.said(), "queue 0 of [128, 64]");
    assert_eq!(guest.said(), "queue 1 of [128, 64]");
    guest.registers.device.notifications[1].write(1).unwrap();
    assert_eq!(guest.said(), "queue 1 of [128, 64]");
    guest.write(0x70, 0);
    // The write returns when the worker has let go.
    assert_eq!(guest.said.try_recv().unwrap(), RESET);
    assert_eq!((guest.read(0x70), guest.read(0x44)), (0, 0));
    guest.registers.device.notifications[1].write(1).unwrap();
    guest.start();
    assert!(guest.said().starts_with("activate"));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let guest = guest();
    guest.write(0x70, 3);
    guest.features(1 << 32 | 1 << 6);
    guest.write(0x70, 11);
    assert_eq!(guest.read(0x70), 3);
    // Nor is a driver of before virtio 1.0.
    guest.features(1 << 5);
    guest.write(0x70, 11);
    assert_eq!(guest.read(0x70), 3);
    guest.write(0x70, 7);
    assert_eq!(guest.read(0x70), 3);
    assert!(guest.said.try_recv().is_err());
}

#[test]
fn rings_cannot_be_moved_while_they_are_served() {
    let guest = guest();
    guest.start();
    assert!(guest.said().starts_with("activate"));
    guest.write(0x30, 0);
    guest.write(0x80, 0xdead_0000);
    guest.write(0x38, 4);
    guest.write(0x44, 0);
    assert_eq!(guest.read(0x44), 1);
    let state = guest.registers.state();
    assert_eq!((state.queues[0].descriptors, state.queues[0].size), (0x10_0000, 128));
}

#[test]
fn a_queue_outside_of_memory_is_not_served() {
    let guest = guest();
    guest.write(0x70, 3);
    guest.features(1 << 32);
    guest.write(0x70, 11);
    guest.set_up_queue(0, 128, 0xf000_0000);
    guest.set_up_queue(1, 64, 0x20_0000);
    guest.set_up_queue(7, 64, 0x20_0000);
    guest.write(0x70, 15);
    assert!(guest.said().starts_with("activate"));
    assert_eq!(guest.said(), "queue 0 of [64]");
}

#[test]
fn the_configuration_space_is_written_within_its_bounds() {
    let guest = guest();
    guest.registers.write(0x100, &[9]);
    guest.write(0x70, 3);
    let generation = guest.read(0xfc);
    guest.registers.write(0x105, &[7, 7, 7, 7]);
    guest.registers.write(0x106, &[7]);
    guest.registers.write(u64::MAX, &[7]);
    assert_eq!(guest.said(), "config 5");
    // The worker shows it after it has said so.
    guest.registers.device.reset();
    assert_eq!(guest.said(), RESET);
    let mut config = [0; 6];
    guest.registers.read(0x100, &mut config);
    assert_eq!(config, [1, 2, 3, 4, 5, 7]);
    assert_ne!(guest.read(0xfc), generation);
}

#[test]
fn a_flood_of_configuration_writes_is_taken_one_by_one() {
    let guest = guest();
    guest.write(0x70, 3);
    for n in 0..1000u32 {
        guest.registers.write(0x100, &n.to_le_bytes()[..1]);
    }
    guest.registers.device.reset();
    let said: Vec<String> = guest.said.try_iter().collect();
    assert_eq!(said.len(), 1001);
    assert_eq!(said.last().unwrap(), RESET);
}

#[test]
fn accesses_of_other_widths_and_places_do_nothing() {
    let guest = guest();
    let page = || {
        let mut bytes = [0xaa; 0x100];
        guest.registers.read(0, &mut bytes);
        bytes
    };
    let before = page();
    for offset in 0..0x100 {
        for width in [1, 2, 8] {
            guest.registers.write(offset, &[0xff; 8][..width]);
        }
    }
    assert_eq!(page(), before);
    for offset in (0..0x100).filter(|offset| *offset != 0x70) {
        guest.write(offset, u32::MAX);
    }
    assert_eq!(guest.read(0x70), 0);
    assert!(guest.said.try_recv().is_err());
}
