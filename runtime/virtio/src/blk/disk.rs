//! What is behind the device: an image file or a block device of the host.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileTypeExt},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl},
};
use vz_sys::{
    block::Topology,
    memory::{MAX_PIECES, readv, writev},
};

use super::SECTOR;
use crate::chain::Slice;

/// Bytes of zeros that are written at once.
const ZEROS: usize = 64 << 10;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be asked.
    #[error("look at disk")]
    Look(#[source] io::Error),
    /// It is a directory, a pipe, and so on.
    #[error("disk is neither a file nor a block device")]
    Kind,
    /// It has not one whole sector.
    #[error("disk of {0} bytes is too small")]
    Small(u64),
    /// It was opened in a way that does not do.
    #[error("disk is not open for {0}")]
    Mode(&'static str),
}

/// The file and its size.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    sectors: u64,
    topology: Topology,
    read_only: bool,
}

impl Disk {
    pub(super) fn new(mut file: File, read_only: bool) -> Result<Self, DiskError> {
        let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|e| DiskError::Look(e.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        // A guest's buffers are aligned as the guest likes.
        if flags.contains(OFlag::O_DIRECT) {
            return Err(DiskError::Mode("buffered access"));
        }
        // Writes would go to the end.
        if flags.contains(OFlag::O_APPEND) {
            return Err(DiskError::Mode("writing anywhere"));
        }
        match flags & OFlag::O_ACCMODE {
            OFlag::O_RDWR => {}
            OFlag::O_RDONLY if read_only => {}
            OFlag::O_RDONLY => return Err(DiskError::Mode("writing")),
            _ => return Err(DiskError::Mode("reading")),
        }
        let metadata = file.metadata().map_err(DiskError::Look)?;
        let topology = if metadata.file_type().is_block_device() {
            vz_sys::block::topology(&file).map_err(DiskError::Look)?
        } else if metadata.is_file() {
            let page = 4096;
            Topology { logical_block: 512, physical_block: page, min_io: page, best_io: 0, alignment: 0 }
        } else {
            return Err(DiskError::Kind);
        };
        // A block device's metadata does not tell its size.
        let bytes = file.seek(SeekFrom::End(0)).map_err(DiskError::Look)?;
        let sectors = bytes / SECTOR;
        if sectors == 0 {
            return Err(DiskError::Small(bytes));
        }
        Ok(Self { file, sectors, topology, read_only })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Where so many bytes from a sector on start, if they are on the disk.
    pub(super) fn locate(&self, sector: u64, bytes: u64) -> Option<u64> {
        let start = sector.checked_mul(SECTOR)?;
        let end = start.checked_add(bytes)?;
        (end <= self.sectors.saturating_mul(SECTOR)).then_some(start)
    }

    pub(super) fn read(&self, pieces: Vec<Slice<'_>>, offset: u64) -> io::Result<()> {
        transfer(pieces, offset, |pieces, offset| readv(&self.file, pieces, Some(offset)))
    }

    pub(super) fn write(&self, pieces: Vec<Slice<'_>>, offset: u64) -> io::Result<()> {
        transfer(pieces, offset, |pieces, offset| writev(&self.file, pieces, Some(offset)))
    }

    /// Waits until everything that was written would survive a loss of power.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the range's room back; it reads as zeros.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, bytes)
    }

    /// Makes the range zeros that keep their room.
    pub(super) fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, bytes) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => self.write_zeros(offset, bytes),
            done => done,
        }
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, bytes: u64) -> io::Result<()> {
        let out_of_range = |_| io::Error::from(Errno::EFBIG);
        let (offset, bytes) =
            (i64::try_from(offset).map_err(out_of_range)?, i64::try_from(bytes).map_err(out_of_range)?);
        loop {
            match fallocate(&self.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, bytes) {
                Err(Errno::EINTR) => {}
                done => return done.map_err(io::Error::from),
            }
        }
    }

    fn write_zeros(&self, mut offset: u64, mut bytes: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let zeros = [0; ZEROS];
        while bytes > 0 {
            let part = usize::try_from(bytes).unwrap_or(ZEROS).min(ZEROS);
            self.file.write_all_at(zeros.get(..part).unwrap_or_default(), offset)?;
            let part = u64::try_from(part).unwrap_or(0);
            offset = offset.saturating_add(part);
            bytes = bytes.saturating_sub(part);
        }
        Ok(())
    }
}

/// Calls until all pieces are through. That no more bytes go is `UnexpectedEof`.
fn transfer<'a>(
    mut pieces: Vec<Slice<'a>>,
    mut offset: u64,
    call: impl Fn(&[Slice<'a>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut first = 0usize;
    while let Some(rest) = pieces.get(first..).filter(|rest| !rest.is_empty()) {
        let mut done = match call(rest.get(..MAX_PIECES).unwrap_or(rest), offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => done,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        offset = offset.saturating_add(u64::try_from(done).unwrap_or(0));
        while let Some(piece) = pieces.get_mut(first) {
            match done.checked_sub(piece.len()) {
                Some(left) => {
                    done = left;
                    first = first.saturating_add(1);
                }
                None => {
                    *piece = piece.offset(done).map_err(io::Error::other)?;
                    break;
                }
            }
        }
    }
    Ok(())
}
