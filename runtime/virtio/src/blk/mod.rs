//! virtio-blk (virtio 1.3, section 5.2): a disk that is an image file or a block device of the host.
//!
//! Each queue is a backend of its own, so that each has a thread; all share the file. Requests of a queue are done one
//! by one, by the thread that serves it, through the host's page cache. Nothing is opened here.
//!
//! A guest that has accepted flushes decides when its writes are made to last; for one that has not, each write is.
//! Discarded ranges become holes, which read as zeros.
//!
//! Threat: see the crate. Ranges are checked against the size that the disk had when the device was made. Bounds: one
//! request moves [`MAX_BYTES`] at most, discards [`MAX_SEGMENTS`] ranges of [`MAX_DISCARD`] sectors or makes
//! [`MAX_ZEROES`] sectors zeros; [`BATCH`] requests are served in one call.
//!
//! The device's state is the accepted features.

use std::{fs::File, io, sync::Arc};

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

mod disk;

use disk::Disk;
pub use disk::DiskError;

/// Bytes of a sector: the unit of everything that the guest says, whatever the disk's blocks are.
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Buffers of a request beside header and status; a chain must not be longer than the queue.
const SEG_MAX: u32 = 254;
/// Requests that are served in one call.
const BATCH: usize = 16;
/// Bytes of one request; Linux does not ask for more than 4 MiB by itself.
const MAX_BYTES: usize = 64 << 20;
/// Ranges of one request to discard.
const MAX_SEGMENTS: u32 = 16;
/// Sectors of one range to discard, and to make zeros: where the file system cannot do it, zeros are written.
const MAX_DISCARD: u32 = 1 << 21;
const MAX_ZEROES: u32 = 8192;
/// Bytes of the disk's name.
const ID: usize = 20;
/// Most queues: [`Kicks`] names no more.
const MAX_QUEUES: u16 = 64;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Flag of a range: its room can be given back.
const UNMAP: u32 = 1;

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;

/// Feature bits.
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// What is to be a disk.
#[derive(Debug)]
pub struct Config {
    /// The image file or block device, open for reading and, unless read-only, writing, and not with `O_DIRECT`.
    pub file: File,
    /// The guest cannot write.
    pub read_only: bool,
    /// Its name in the guest (`/sys/block/*/serial`), at most 20 bytes.
    pub id: String,
    /// Number of queues.
    pub queues: u16,
}

/// Why a disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// There are none, or too many.
    #[error("disk with {0} queues, not 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// The name is too long.
    #[error("disk id {0:?} is longer than {ID} bytes")]
    Id(String),
    /// The file will not do.
    #[error("use file as disk")]
    Disk(#[source] DiskError),
    /// A descriptor of the device's own cannot be made.
    #[error("set up disk")]
    System(#[source] io::Error),
}

/// Why a request failed, as the guest is told and as it is logged.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("request of {0} bytes")]
    Short(usize),
    #[error("request without room for its status")]
    NoStatus,
    #[error("data of {0} bytes")]
    Length(usize),
    #[error("{1} bytes from sector {0}, which are not on the disk")]
    Range(u64, u64),
    #[error("write to a read-only disk")]
    ReadOnly,
    #[error("range of {0} sectors")]
    Sectors(u32),
    #[error("range with flags {0:#x}")]
    Flags(u32),
    #[error("request of type {0}")]
    Type(u32),
    #[error("{0}: {1}")]
    Host(&'static str, io::Error),
}

impl Failed {
    fn status(&self) -> u8 {
        match self {
            Self::Type(_) | Self::Flags(_) => STATUS_UNSUPP,
            Self::Host(_, e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// The device, before its queues are handed to threads.
#[derive(Debug)]
pub struct Blk {
    queues: Vec<BlkQueue>,
}

impl Blk {
    /// Looks at the file.
    pub fn new(config: Config) -> Result<Self, BlkError> {
        let Config { file, read_only, id, queues } = config;
        if queues == 0 || queues > MAX_QUEUES {
            return Err(BlkError::Queues(queues));
        }
        if id.len() > ID {
            return Err(BlkError::Id(id));
        }
        let mut id = id.into_bytes();
        id.resize(ID, 0);
        let disk = Disk::new(file, read_only).map_err(BlkError::Disk)?;
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        features |= if read_only { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
        if queues > 1 {
            features |= feature::MQ;
        }
        let shared = Arc::new(Shared { space: space(&disk, queues), features, disk, id });
        let queue = |_| {
            let wake = Wake::new().map_err(BlkError::System)?;
            Ok(BlkQueue { shared: Arc::clone(&shared), acked: 0, wake, mistakes: Mistakes::new("blk") })
        };
        Ok(Self { queues: (0..queues).map(queue).collect::<Result<_, _>>()? })
    }

    /// Its queues, each a backend that sees itself as queue 0.
    pub fn split(self) -> Vec<BlkQueue> {
        self.queues
    }
}

/// The configuration space.
fn space(disk: &Disk, queues: u16) -> Vec<u8> {
    let topology = disk.topology();
    let block = topology.logical_block.max(1);
    let blocks = |bytes: u32| bytes.checked_div(block).unwrap_or(0);
    // As a power of two, and as many blocks as a byte can tell.
    let physical = u8::try_from(blocks(topology.physical_block).checked_ilog2().unwrap_or(0)).unwrap_or(0);
    let alignment = u8::try_from(blocks(topology.alignment)).unwrap_or(0);
    let min_io = u16::try_from(blocks(topology.min_io)).unwrap_or(u16::MAX);
    let discard_alignment = topology.physical_block / 512;

    let mut space = disk.sectors().to_le_bytes().to_vec();
    // `size_max` and `geometry`, which belong to features that are not offered.
    space.extend([0; 4]);
    space.extend(SEG_MAX.to_le_bytes());
    space.extend([0; 4]);
    space.extend(block.to_le_bytes());
    space.extend([physical, alignment]);
    space.extend(min_io.to_le_bytes());
    space.extend(blocks(topology.best_io).to_le_bytes());
    // `writeback` cannot be chosen.
    space.extend([0; 2]);
    space.extend(queues.to_le_bytes());
    for field in [MAX_DISCARD, MAX_SEGMENTS, discard_alignment, MAX_ZEROES, 1] {
        space.extend(field.to_le_bytes());
    }
    // `write_zeroes_may_unmap`.
    space.extend([1, 0, 0, 0]);
    space
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    id: Vec<u8>,
    features: u64,
    space: Vec<u8>,
}

/// One queue of the device.
#[derive(Debug)]
pub struct BlkQueue {
    shared: Arc<Shared>,
    acked: u64,
    wake: Wake,
    mistakes: Mistakes,
}

impl BlkQueue {
    /// Serves one request; how many bytes were written to its buffers.
    fn request(&mut self, memory: &Memory, chain: Chain<'_>) -> u32 {
        let mut room = match Buffers::writable(memory, chain.clone()) {
            Ok(room) if room.len() > 0 => room,
            Ok(_) => return self.unanswered(&Failed::NoStatus),
            Err(e) => return self.unanswered(&e.into()),
        };
        // The status is the very last byte.
        let data = room.split_to(room.len().saturating_sub(1));
        let (written, status) = match self.done(memory, chain, data) {
            Ok(written) => (written, STATUS_OK),
            Err(e) => {
                match &e {
                    Failed::Host(..) => self.mistakes.fault(&e),
                    e => self.mistakes.note(e),
                }
                (0, e.status())
            }
        };
        room.copy_from(&[status]);
        u32::try_from(written).unwrap_or(0).saturating_add(1)
    }

    fn unanswered(&mut self, why: &Failed) -> u32 {
        self.mistakes.note(why);
        0
    }

    /// Does what is asked; how many bytes of data the guest got.
    fn done(&self, memory: &Memory, chain: Chain<'_>, mut room: Buffers<'_>) -> Result<usize, Failed> {
        let mut data = Buffers::readable(memory, chain)?;
        let mut header = Header::default();
        let present = data.copy_to(header.as_mut_bytes());
        if present < size_of::<Header>() {
            return Err(Failed::Short(present));
        }
        let Header { kind, sector, .. } = header;
        let Shared { disk, id, .. } = &*self.shared;
        if matches!(kind, OUT | DISCARD | WRITE_ZEROES) && disk.read_only() {
            return Err(Failed::ReadOnly);
        }
        match kind {
            IN => {
                let len = room.len();
                let offset = self.range(sector, len)?;
                disk.read(room.into_pieces(), offset).map_err(|e| Failed::Host("read disk", e))?;
                return Ok(len);
            }
            OUT => {
                let offset = self.range(sector, data.len())?;
                disk.write(data.into_pieces(), offset).map_err(|e| Failed::Host("write disk", e))?;
                self.written()?;
            }
            FLUSH => disk.flush().map_err(|e| Failed::Host("flush disk", e))?,
            GET_ID => return Ok(room.copy_from(id)),
            DISCARD => {
                let segments = Segment::list(&mut data, MAX_SEGMENTS)?;
                // All or none.
                let ranges: Vec<_> =
                    segments.iter().map(|s| self.located(s, MAX_DISCARD, 0)).collect::<Result<_, _>>()?;
                for (offset, bytes) in ranges {
                    disk.discard(offset, bytes).map_err(|e| Failed::Host("discard of disk", e))?;
                }
                self.written()?;
            }
            WRITE_ZEROES => {
                for segment in Segment::list(&mut data, 1)? {
                    let (offset, bytes) = self.located(&segment, MAX_ZEROES, UNMAP)?;
                    let unmapped =
                        if segment.flags & UNMAP == 0 { disk.zero(offset, bytes) } else { disk.discard(offset, bytes) };
                    match unmapped {
                        // That the room goes back is a wish, the zeros are not.
                        Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => disk.zero(offset, bytes),
                        done => done,
                    }
                    .map_err(|e| Failed::Host("zero part of disk", e))?;
                }
                self.written()?;
            }
            other => return Err(Failed::Type(other)),
        }
        Ok(0)
    }

    /// Where the data of a request start.
    fn range(&self, sector: u64, len: usize) -> Result<u64, Failed> {
        let bytes = u64::try_from(len).unwrap_or(u64::MAX);
        if len == 0 || len > MAX_BYTES || !bytes.is_multiple_of(SECTOR) {
            return Err(Failed::Length(len));
        }
        self.shared.disk.locate(sector, bytes).ok_or(Failed::Range(sector, bytes))
    }

    /// The range's offset and length in bytes.
    fn located(&self, segment: &Segment, most: u32, flags: u32) -> Result<(u64, u64), Failed> {
        if segment.flags & !flags != 0 {
            return Err(Failed::Flags(segment.flags));
        }
        if segment.sectors == 0 || segment.sectors > most {
            return Err(Failed::Sectors(segment.sectors));
        }
        let bytes = u64::from(segment.sectors).saturating_mul(SECTOR);
        let offset = self.shared.disk.locate(segment.sector, bytes);
        Ok((offset.ok_or(Failed::Range(segment.sector, bytes))?, bytes))
    }

    /// Something was written: it has to last now if the guest cannot say when.
    fn written(&self) -> Result<(), Failed> {
        if self.acked & feature::FLUSH != 0 {
            return Ok(());
        }
        self.shared.disk.flush().map_err(|e| Failed::Host("flush disk", e))
    }
}

/// A request's header: `struct virtio_blk_req`, without what follows it.
#[derive(Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// A range to discard or zero: `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, Default, Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Segment {
    /// All that the data hold, copied before they are looked at.
    fn list(data: &mut Buffers<'_>, most: u32) -> Result<Vec<Self>, Failed> {
        let (len, size) = (data.len(), size_of::<Self>());
        let count = len.checked_div(size).unwrap_or(0);
        if len == 0 || !len.is_multiple_of(size) || u32::try_from(count).map_or(true, |count| count > most) {
            return Err(Failed::Length(len));
        }
        let mut segments = vec![Self::default(); count];
        data.copy_to(segments.as_mut_bytes());
        Ok(segments)
    }
}

impl Backend for BlkQueue {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        self.shared.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.shared.space
    }

    fn activate(&mut self, acked: u64) {
        self.acked = acked;
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.wake.source(0)]
    }

    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let Some(Some(queue)) = queues.first_mut() else { return Ok(kicks) };
        let (used, more) = serve(queue, memory, BATCH, |chain| Served::Used(self.request(memory, chain)))?;
        if used {
            kicks.insert(0);
        }
        if more {
            self.wake.signal();
        }
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.wake.clear();
        Ok(())
    }

    fn reset(&mut self) {
        self.acked = 0;
    }
}

#[cfg(test)]
mod tests;
