//! The registers of a virtio-mmio device: any access, in any order.

use arbitrary::{Arbitrary, Unstructured};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vz_kvm::fuzzing::{NOTIFY, Transport};
use vz_virtio::{Memory, balloon::Balloon};

use crate::values::Number;

/// Queues of the device that is behind the registers.
const QUEUES: u64 = 0b11111;

/// Registers, by what they are for.
const STATUS: u64 = 0x70;
const QUEUE_SELECT: u64 = 0x30;
const CONFIG: u64 = 0x100;

#[derive(Debug, Arbitrary)]
enum Access {
    Read(Place, u8),
    Write(Place, Number),
    /// Of any width.
    Bytes(Place, [u8; 16], u8),
    /// What a driver does to become ready.
    Status(Step),
    /// Sets up a queue.
    Queue {
        index: u8,
        size: Number,
        rings: [Number; 3],
        ready: bool,
    },
}

#[derive(Debug, Arbitrary)]
enum Place {
    Register(u8),
    Config(u8),
    Anywhere(Number),
}

#[derive(Debug, Arbitrary)]
enum Step {
    Reset,
    Driver,
    Features,
    Ready,
}

impl Place {
    fn offset(&self) -> u64 {
        match self {
            Self::Register(number) => u64::from(number % 64) * 4,
            Self::Config(offset) => CONFIG + u64::from(*offset),
            Self::Anywhere(offset) => offset.0,
        }
    }
}

fn write(transport: &Transport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

fn read(transport: &Transport, offset: u64) -> u32 {
    let mut bytes = [0xff; 4];
    transport.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

pub(crate) fn run(bytes: &[u8]) -> Result<(), String> {
    let regions = [(GuestAddress(0), 0x4_0000), (GuestAddress(0x5_0000), 0x1_0000)];
    let memory: Memory = GuestMemoryMmap::from_ranges(&regions).map_err(|e| e.to_string())?;
    let (balloon, _handle) = Balloon::new().map_err(|e| e.to_string())?;
    let transport = Transport::new(Box::new(balloon), QUEUES, &memory).map_err(|e| e.to_string())?;
    let mut u = Unstructured::new(bytes);
    while !u.is_empty() {
        let Ok(access) = Access::arbitrary(&mut u) else { break };
        one(&transport, access);
        // What never changes.
        assert_eq!((read(&transport, 0), read(&transport, 4), read(&transport, 8)), (0x7472_6976, 2, 5));
        // A queue can only be ready where there is one, and not before the features are agreed on.
        let ready = read(&transport, 0x44);
        assert!(ready <= 1 && (ready == 0 || read(&transport, 0x34) > 0 && read(&transport, STATUS) & 8 != 0));
        // A driver that is ready has agreed on features.
        let status = read(&transport, STATUS);
        assert!(status & 4 == 0 || status & 8 != 0, "status {status:#x}");
    }
    Ok(())
}

fn one(transport: &Transport, access: Access) {
    match access {
        Access::Read(place, len) => transport.read(place.offset(), &mut vec![0; (len % 17).into()]),
        Access::Write(place, value) => write(transport, place.offset(), value.u32()),
        Access::Bytes(place, bytes, len) => {
            if place.offset() != NOTIFY {
                transport.write(place.offset(), bytes.get(..usize::from(len % 17)).unwrap_or(&bytes));
            }
        }
        Access::Status(step) => {
            let status = match step {
                Step::Reset => 0,
                Step::Driver => 3,
                Step::Features => {
                    for (select, features) in [(0, 0x34), (1, 1)] {
                        write(transport, 0x24, select);
                        write(transport, 0x20, features);
                    }
                    11
                }
                Step::Ready => 15,
            };
            write(transport, STATUS, status);
        }
        Access::Queue { index, size, rings, ready } => {
            write(transport, QUEUE_SELECT, (index % 6).into());
            write(transport, 0x38, size.u32());
            for (register, ring) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
                let address = ring.0 << 4;
                write(transport, register, u32::try_from(address & 0xffff_ffff).unwrap_or(0));
                write(transport, register + 4, u32::try_from(address >> 32).unwrap_or(0));
            }
            write(transport, 0x44, ready.into());
        }
    }
}
