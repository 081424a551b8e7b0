//! virtio-balloon (virtio 1.3, section 5.5): memory that the guest does not need goes back to the host.
//!
//! Two ways lead there. Free page reporting: the guest tells on its own which ranges are free, and the host backs them
//! again when they are touched. The balloon: the host sets a [target](Handle::set_target), the guest gives up pages
//! until as much is in the balloon, and takes pages out when it runs out of memory (DEFLATE_ON_OOM).
//!
//! Threat: see the crate. The guest names the pages. Each must be a whole page of its memory, or it is refused and
//! counted; to give back its own page is the worst that it can do to itself. Bounds: [`RANGES`] ranges of one chain and
//! [`BATCH`] chains of one queue in one call.
//!
//! Memory is anonymous or shared; a private mapping of a file cannot be given back, which stops the device.
//!
//! The device's state is its configuration space and the accepted features.

use std::{
    io,
    mem::offset_of,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};
use vz_sys::memory::Mapping;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Backend, Error, Kicks, Kind, Memory, Queues, Source,
    chain::{Buffers, Chain, Malformed, Served, serve},
    mistakes::Mistakes,
    wake::Wake,
};

/// Bytes of a page, as the device counts them.
const PAGE: u64 = 4096;
/// Ranges, or pages, of one chain that are looked at; Linux sends up to 256 pages or 32 ranges.
const RANGES: usize = 1024;
/// Chains of one queue that are served in one call.
const BATCH: usize = 16;

/// Inflate queue, deflate queue, and those that may be the one for free page reporting: it is number 4 by the
/// specification, while Linux counts only the queues that exist, which makes it number 2.
const QUEUE_SIZES: [u16; 5] = [128; 5];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

/// The configuration space: `struct virtio_balloon_config`.
#[derive(Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Space {
    num_pages: u32,
    actual: u32,
    free_page_hint_cmd_id: u32,
    poison: u32,
}

/// Where it has the fields that the guest writes.
const ACTUAL: Range<usize> = offset_of!(Space, actual)..offset_of!(Space, free_page_hint_cmd_id);
const POISON: Range<usize> = offset_of!(Space, poison)..size_of::<Space>();

/// What was wrong with a chain.
#[derive(Debug, thiserror::Error)]
enum BadPages {
    #[error(transparent)]
    Chain(#[from] Malformed),
    #[error("chain without pages")]
    Empty,
    #[error("{0} ranges that are no whole pages of guest memory")]
    Ranges(u64),
    #[error("more than {RANGES} ranges in a chain")]
    TooMany,
}

#[derive(Debug)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    returned: AtomicU64,
    refused: AtomicU64,
    wake: Wake,
}

/// What the balloon has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Bytes that the guest says are in the balloon.
    pub actual: u64,
    /// Bytes that were given back to the host, those among them that the guest has touched again since.
    pub returned: u64,
    /// Ranges that the guest named and that were no pages of its memory.
    pub refused: u64,
}

/// The host's end of the device.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Asks the guest to have this many bytes, rounded down to pages, in its balloon.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.0.target.store(pages, Ordering::Relaxed);
        self.0.wake.signal();
    }

    /// What has become of it.
    pub fn stats(&self) -> Stats {
        Stats {
            actual: u64::from(self.0.actual.load(Ordering::Relaxed)).saturating_mul(PAGE),
            returned: self.0.returned.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    space: Space,
    acked: u64,
    /// The target that the guest's driver was interrupted for.
    told: u32,
    shared: Arc<Shared>,
    mistakes: Mistakes,
}

impl Balloon {
    /// An empty balloon.
    pub fn new() -> io::Result<(Self, Handle)> {
        let shared = Arc::new(Shared {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            returned: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            wake: Wake::new()?,
        });
        let handle = Handle(Arc::clone(&shared));
        Ok((Self { space: Space::default(), acked: 0, told: 0, shared, mistakes: Mistakes::new("balloon") }, handle))
    }

    /// Tells the guest of a target that it has not heard of.
    fn retarget(&mut self, kicks: &mut Kicks) {
        let target = self.shared.target.load(Ordering::Relaxed);
        if target != self.told {
            self.told = target;
            self.space.num_pages = target;
            kicks.insert_config();
        }
    }

    fn chain(&mut self, index: usize, memory: &Memory, chain: Chain<'_>) -> Result<(), Error> {
        let mut pages = Pages::new(memory);
        let read = match index {
            INFLATE => pages.listed(chain),
            // The guest uses them again, and they come back when it touches them.
            DEFLATE => return Ok(()),
            // They must keep what is in them, which is not zeros.
            _ if self.acked & PAGE_POISON != 0 && self.space.poison != 0 => return Ok(()),
            _ => pages.described(chain),
        };
        if let Err(e) = read {
            self.mistakes.note(&e);
        }
        if pages.refused > 0 {
            self.shared.refused.fetch_add(pages.refused, Ordering::Relaxed);
            self.mistakes.note(&BadPages::Ranges(pages.refused));
        }
        let returned = pages.discard().map_err(|e| Error::System("give guest memory back to the host", e))?;
        self.shared.returned.fetch_add(returned, Ordering::Relaxed);
        Ok(())
    }
}

/// The pages of one chain.
struct Pages<'a> {
    memory: &'a Memory,
    /// Addresses of the first byte and behind the last; whole pages that lie in memory.
    ranges: Vec<Range<u64>>,
    refused: u64,
}

impl<'a> Pages<'a> {
    fn new(memory: &'a Memory) -> Self {
        Self { memory, ranges: Vec::new(), refused: 0 }
    }

    fn add(&mut self, start: u64, len: u64) {
        let whole = start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
        match start.checked_add(len).zip(usize::try_from(len).ok()) {
            Some((end, len)) if whole && self.memory.check_range(GuestAddress(start), len) => {
                self.ranges.push(start..end);
            }
            _ => self.refused = self.refused.saturating_add(1),
        }
    }

    /// The chain's data are page numbers.
    fn listed(&mut self, chain: Chain<'_>) -> Result<(), BadPages> {
        let mut data = Buffers::readable(self.memory, chain)?;
        if data.len() < size_of::<u32>() {
            return Err(BadPages::Empty);
        }
        let mut number = 0u32;
        for _ in 0..RANGES {
            if data.copy_to(number.as_mut_bytes()) < size_of::<u32>() {
                return Ok(());
            }
            self.add(u64::from(number).saturating_mul(PAGE), PAGE);
        }
        if data.len() < size_of::<u32>() { Ok(()) } else { Err(BadPages::TooMany) }
    }

    /// The chain's buffers are the pages.
    fn described(&mut self, chain: Chain<'_>) -> Result<(), BadPages> {
        let mut count = 0usize;
        for descriptor in chain.writable() {
            if count >= RANGES {
                return Err(BadPages::TooMany);
            }
            count = count.saturating_add(1);
            self.add(descriptor.addr().raw_value(), descriptor.len().into());
        }
        if count == 0 { Err(BadPages::Empty) } else { Ok(()) }
    }

    /// Gives all of them back; how many bytes.
    fn discard(mut self) -> io::Result<u64> {
        self.ranges.sort_unstable_by_key(|range| range.start);
        let mut returned = 0u64;
        let mut ranges = self.ranges.into_iter();
        let mut next = ranges.next();
        while let Some(mut merged) = next.take() {
            for range in ranges.by_ref() {
                if range.start > merged.end {
                    next = Some(range);
                    break;
                }
                merged.end = merged.end.max(range.end);
            }
            returned = returned.saturating_add(merged.end.saturating_sub(merged.start));
            discard(self.memory, merged)?;
        }
        Ok(returned)
    }
}

/// Gives one range back, which may lie in several regions.
fn discard(memory: &Memory, mut range: Range<u64>) -> io::Result<()> {
    while range.start < range.end {
        // All of it was found in memory before.
        let start = GuestAddress(range.start);
        let Some(region) = memory.find_region(start) else { return Ok(()) };
        let offset = range.start.saturating_sub(region.start_addr().raw_value());
        let len = region.len().saturating_sub(offset).min(range.end.saturating_sub(range.start));
        let count = usize::try_from(len).map_err(io::Error::other)?;
        let pages = region.get_slice(MemoryRegionAddress(offset), count).map_err(io::Error::other)?;
        let mapping = match (region.flags() & libc::MAP_SHARED != 0, region.file_offset()) {
            (true, _) => Mapping::Shared,
            (false, None) => Mapping::Private,
            // The pages would not be zeros, but what is in the file.
            (false, Some(_)) => return Err(io::ErrorKind::Unsupported.into()),
        };
        vz_sys::memory::discard(&pages, mapping)?;
        range.start = range.start.saturating_add(len);
    }
    Ok(())
}

impl Backend for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    /// Page poisoning is offered because a Linux that initialises or poisons what it frees does not report free pages
    /// without.
    fn features(&self) -> u64 {
        DEFLATE_ON_OOM | PAGE_POISON | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        self.space.as_bytes()
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        for (place, byte) in (offset..POISON.end).zip(bytes) {
            if (ACTUAL.contains(&place) || POISON.contains(&place))
                && let Some(at) = self.space.as_mut_bytes().get_mut(place)
            {
                *at = *byte;
            }
        }
        self.shared.actual.store(self.space.actual, Ordering::Relaxed);
    }

    fn activate(&mut self, acked: u64) {
        self.acked = acked;
        // Whatever came before, nobody listened.
        self.told = 0;
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.shared.wake.source(0)]
    }

    fn run(&mut self, queues: Queues<'_, '_>, memory: &Memory) -> Result<Kicks, Error> {
        let mut kicks = Kicks::NONE;
        let mut again = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            let mut failed = Ok(());
            let (used, more) = serve(queue, memory, BATCH, |chain| {
                if failed.is_err() {
                    return Served::NotNow;
                }
                failed = self.chain(index, memory, chain);
                Served::Used(0)
            })?;
            failed?;
            if used {
                kicks.insert(index);
            }
            again |= more;
        }
        if again {
            self.shared.wake.signal();
        }
        self.retarget(&mut kicks);
        Ok(kicks)
    }

    fn clear(&mut self, _token: u16) -> Result<(), Error> {
        self.shared.wake.clear();
        Ok(())
    }

    /// The driver starts with an empty balloon; the target stays.
    fn reset(&mut self) {
        self.acked = 0;
        self.space.actual = 0;
        self.space.poison = 0;
        self.shared.actual.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
