//! A descriptor chain as a list of pieces of guest memory, and the loop over a queue.

use std::io;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile};

use crate::{Error, Memory};

pub(crate) type Slice<'a> = VolatileSlice<'a, BitmapMmapRegion>;
pub(crate) type Chain<'a> = DescriptorChain<&'a Memory>;

/// Why a chain cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("buffer outside of guest memory")]
    Address,
    #[error("buffers larger than the address space")]
    Length,
}

/// Consecutive bytes that lie in pieces in guest memory, consumed from the front.
#[derive(Debug)]
pub(crate) struct Buffers<'a> {
    pieces: std::vec::IntoIter<Slice<'a>>,
    current: Option<Slice<'a>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// What the guest lets the device read.
    pub(crate) fn readable(memory: &'a Memory, chain: Chain<'a>) -> Result<Self, Malformed> {
        Self::collect(memory, chain.readable().map(|d| (d.addr(), d.len())))
    }

    /// What the guest lets the device write.
    pub(crate) fn writable(memory: &'a Memory, chain: Chain<'a>) -> Result<Self, Malformed> {
        Self::collect(memory, chain.writable().map(|d| (d.addr(), d.len())))
    }

    fn collect(memory: &'a Memory, descriptors: impl Iterator<Item = (GuestAddress, u32)>) -> Result<Self, Malformed> {
        let mut pieces = Vec::with_capacity(2);
        let mut len = 0usize;
        for (address, length) in descriptors {
            let length = usize::try_from(length).map_err(|_| Malformed::Length)?;
            len = len.checked_add(length).ok_or(Malformed::Length)?;
            for piece in memory.get_slices(address, length) {
                pieces.push(piece.map_err(|_| Malformed::Address)?);
            }
        }
        Ok(Self { pieces: pieces.into_iter(), current: None, len })
    }

    /// Bytes that are left.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Cuts off everything beyond the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Takes off the first `count` bytes, or all there are.
    pub(crate) fn split_to(&mut self, count: usize) -> Self {
        let len = count.min(self.len);
        let mut pieces = Vec::with_capacity(1);
        let mut left = len;
        while left > 0 {
            let Some(piece) = self.front() else { break };
            let part = piece.len().min(left);
            pieces.extend(piece.subslice(0, part).ok());
            self.advance(part);
            left = left.saturating_sub(part);
        }
        Self { pieces: pieces.into_iter(), current: None, len }
    }

    /// What is left, for vectored I/O.
    pub(crate) fn into_pieces(mut self) -> Vec<Slice<'a>> {
        let mut pieces = Vec::with_capacity(2);
        while let Some(piece) = self.front() {
            self.advance(piece.len());
            pieces.push(piece);
        }
        pieces
    }

    /// The next piece, at most as long as what is left.
    fn front(&mut self) -> Option<Slice<'a>> {
        loop {
            if self.len == 0 {
                return None;
            }
            let piece = match self.current.take() {
                Some(piece) => piece,
                None => self.pieces.next()?,
            };
            if piece.is_empty() {
                continue;
            }
            let part = piece.subslice(0, piece.len().min(self.len)).ok();
            self.current = Some(piece);
            return part;
        }
    }

    fn advance(&mut self, count: usize) {
        self.len = self.len.saturating_sub(count);
        self.current = self.current.take().and_then(|piece| piece.offset(count).ok());
    }

    /// Copies from the front into `target`; how many bytes there were, at most its length.
    pub(crate) fn copy_to(&mut self, mut target: &mut [u8]) -> usize {
        let mut done = 0usize;
        while !target.is_empty() {
            let Some(piece) = self.front() else { break };
            let count = piece.copy_to(target);
            target = target.get_mut(count..).unwrap_or_default();
            self.advance(count);
            done = done.saturating_add(count);
        }
        done
    }

    /// Copies from `source` to the front; how many bytes had room.
    pub(crate) fn copy_from(&mut self, mut source: &[u8]) -> usize {
        let mut done = 0usize;
        while !source.is_empty() {
            let Some(piece) = self.front() else { break };
            let count = piece.len().min(source.len());
            let (now, later) = source.split_at_checked(count).unwrap_or((source, &[]));
            piece.copy_from(now);
            source = later;
            self.advance(count);
            done = done.saturating_add(count);
        }
        done
    }

    /// Writes from the front to `target` until it takes no more; how much it took, and why it stopped.
    pub(crate) fn drain_to(&mut self, target: &mut impl WriteVolatile) -> (usize, io::Result<()>) {
        let mut done = 0usize;
        while let Some(piece) = self.front() {
            match target.write_volatile(&piece).map_err(plain) {
                Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.advance(count);
                    done = done.saturating_add(count);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return (done, Err(e)),
            }
        }
        (done, Ok(()))
    }

    /// Reads up to `limit` bytes from `source` to the front until that is full or `source` has no more; how much, and
    /// why it stopped.
    ///
    /// End of file is `UnexpectedEof`.
    pub(crate) fn fill_from(&mut self, source: &mut impl ReadVolatile, limit: usize) -> (usize, io::Result<()>) {
        let mut done = 0usize;
        while done < limit
            && let Some(mut piece) = self.front()
        {
            if let Ok(part) = piece.subslice(0, piece.len().min(limit.saturating_sub(done))) {
                piece = part;
            }
            match source.read_volatile(&mut piece).map_err(plain) {
                Ok(0) => return (done, Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    self.advance(count);
                    done = done.saturating_add(count);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return (done, Err(e)),
            }
        }
        (done, Ok(()))
    }
}

fn plain(e: VolatileMemoryError) -> io::Error {
    match e {
        VolatileMemoryError::IOError(e) => e,
        e => io::Error::other(e),
    }
}

/// Takes up to `most` chains off a queue and returns each with the used length that `f` gives.
///
/// Tells whether any were taken and whether more may be there: then the guest will not notify, so the caller comes
/// back by itself.
pub(crate) fn serve(
    queue: &mut Queue,
    memory: &Memory,
    most: usize,
    mut f: impl FnMut(Chain<'_>) -> Served,
) -> Result<(bool, bool), Error> {
    let mut taken = 0usize;
    loop {
        silence(queue, memory)?;
        // An index that is further ahead than the queue is long is an error here; ignoring it would be an endless loop.
        while let Some(chain) = queue.iter(memory).map_err(Error::Ring)?.next() {
            let head = chain.head_index();
            match f(chain) {
                Served::Used(len) => queue.add_used(memory, head, len).map_err(Error::Ring)?,
                Served::Later => {}
                Served::NotNow => {
                    queue.go_to_previous_position();
                    return Ok((taken > 0, false));
                }
            }
            taken = taken.saturating_add(1);
            if taken >= most {
                return Ok((true, true));
            }
        }
        if !queue.enable_notification(memory).map_err(Error::Ring)? {
            return Ok((taken > 0, false));
        }
    }
}

/// Tells the guest not to notify while the queue is looked at, if they have agreed on EVENT_IDX.
///
/// Without it, the guest may be one whose memory barriers are not to be relied on, see `vz_vhost`'s adapter. A flag
/// that it sees too late would keep it from notifying when it must.
pub(crate) fn silence(queue: &mut Queue, memory: &Memory) -> Result<(), Error> {
    if queue.event_idx_enabled() {
        queue.disable_notification(memory).map_err(Error::Ring)?;
    }
    Ok(())
}

/// Returns several chains, of which the guest sees all or none: together they hold one thing.
pub(crate) fn add_used_together(queue: &mut Queue, memory: &Memory, chains: &[(u16, u32)]) -> Result<(), Error> {
    let Some(((head, len), before)) = chains.split_last() else { return Ok(()) };
    let mut next = queue.next_used();
    for (head, len) in before {
        // The guest looks at entries below the index only, which moves on with the last one.
        let slot = u64::from(next.checked_rem(queue.size()).unwrap_or(0));
        let entry = u64::from(*head) | u64::from(*len) << 32;
        let address = queue.used_ring().checked_add(slot.saturating_mul(8).saturating_add(4));
        let address = address.ok_or(Error::Ring(virtio_queue::Error::AddressOverflow))?;
        memory
            .write_slice(&entry.to_le_bytes(), GuestAddress(address))
            .map_err(|e| Error::Ring(virtio_queue::Error::GuestMemory(e)))?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    queue.add_used(memory, *head, *len).map_err(Error::Ring)?;
    // The queue counts what is added, one for each call, to decide whether the guest wants to know. The same entry
    // written again is the same.
    for _ in before {
        queue.set_next_used(next);
        queue.add_used(memory, *head, *len).map_err(Error::Ring)?;
    }
    Ok(())
}

/// What became of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Served {
    /// Done; this many bytes were written to it.
    Used(u32),
    /// Taken, to be returned when it is done.
    Later,
    /// Left in the queue; the caller comes back by itself.
    NotNow,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, Ring, memory};

    #[test]
    fn a_guest_without_event_idx_is_never_told_not_to_notify() {
        let memory = memory();
        for event_idx in [false, true] {
            let mut ring = Ring::new(0x1_0000, 8);
            let mut queue = ring.queue();
            queue.set_event_idx(event_idx);
            let flags = GuestAddress(queue.used_ring());
            ring.add(&memory, &[Buffer { address: 0x10_0000, len: 8, writable: true }]);
            // `most` is reached, so the caller comes back and notifications stay as they are.
            let mut seen = 0;
            let served = serve(&mut queue, &memory, 1, |_| {
                seen = memory.read_obj::<u16>(flags).unwrap();
                Served::Used(0)
            });
            assert_eq!((served.unwrap(), seen), ((true, true), 0));
        }
    }

    #[test]
    fn chains_that_are_returned_together_are_counted_one_by_one() {
        let memory = memory();
        let mut ring = Ring::new(0x1_0000, 8);
        let mut queue = ring.queue();
        queue.set_event_idx(true);
        // Around the ring's end, too.
        for round in 0..5u32 {
            let mut heads = Vec::new();
            for i in 0..3 {
                let buffer = Buffer { address: 0x10_0000, len: 8, writable: true };
                heads.push((ring.add(&memory, &[buffer]), round * 10 + i));
                queue.iter(&memory).unwrap().next().unwrap();
            }
            // The driver wants to hear of the first of the three: a queue that counted one would not tell.
            ring.set_used_event(&memory, queue.next_used());
            add_used_together(&mut queue, &memory, &heads).unwrap();
            assert!(queue.needs_notification(&memory).unwrap());
            let lens: Vec<_> =
                std::iter::from_fn(|| ring.take_used(&memory)).map(|(chain, len)| (chain.len(), len)).collect();
            assert_eq!(lens, [(1, round * 10), (1, round * 10 + 1), (1, round * 10 + 2)]);
        }
        add_used_together(&mut queue, &memory, &[]).unwrap();
        assert!(ring.take_used(&memory).is_none());
    }
}
