//! Frames from the port to the guest.
//!
//! A frame goes straight into the guest's buffers. Its length is known only when it has been read, so buffers for the
//! longest possible frame are gathered before, and those that it did not need are kept for the next. Where the guest
//! has fewer, the frame is read into a buffer of the device's, and waits there for room.

use std::{collections::VecDeque, io};

use nix::errno::Errno;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vz_sys::memory::{MAX_PIECES, readv};

use super::{BATCH, BadFrame, HEADER, MAX_CHAIN_PIECES, MAX_FRAME, port::Port};
use crate::{
    Error, Memory,
    chain::{Buffers, Malformed, Slice, add_used_together, silence},
    mistakes::Mistakes,
};

/// Where the header counts the buffers of a frame.
const NUM_BUFFERS: usize = 10;

/// What happened to the queue.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    /// Buffers were returned.
    pub(super) used: bool,
    /// There is more to do.
    pub(super) more: bool,
}

/// The receiving half of a queue pair.
#[derive(Debug)]
pub(super) struct Receiver {
    /// The port may have frames; it says so once, when some arrive.
    pub(super) readable: bool,
    /// A frame may take several buffers.
    mergeable: bool,
    /// Bytes of the frame in `waiting`; 0 is none.
    pub(super) held: usize,
    /// Made when the first frame has to wait.
    waiting: Vec<u8>,
    /// Frames for which the guest had too little room, with a whole queue of buffers.
    pub(super) dropped: u64,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { readable: true, mergeable: false, held: 0, waiting: Vec::new(), dropped: 0 }
    }

    /// Starts over, for a driver that accepted these buffers.
    pub(super) fn restart(&mut self, mergeable: bool) {
        *self = Self { mergeable, dropped: self.dropped, ..Self::new() };
    }

    /// Gives the guest frames until there are no more, it has no room, or a batch is through.
    pub(super) fn run(
        &mut self,
        port: &impl Port,
        queue: &mut Queue,
        memory: &Memory,
        mistakes: &mut Mistakes,
    ) -> Result<Progress, Error> {
        let mut window = Window::new(memory, queue.size(), self.mergeable);
        let mut progress = Progress::default();
        silence(queue, memory)?;
        for turn in 0.. {
            if !self.readable && self.held == 0 {
                break;
            }
            if turn >= BATCH {
                progress.more = true;
                break;
            }
            window.fill(queue)?;
            progress.used |= window.retire(queue, mistakes)?;
            match self.frame(port, &mut window, queue, mistakes)? {
                Step::Delivered => progress.used = true,
                Step::Again => {}
                Step::Dropped => {
                    self.dropped = self.dropped.saturating_add(1);
                    mistakes.note(&BadFrame::NoRoom);
                }
                // The guest is asked to tell when it has more, unless it has already.
                Step::Room => {
                    if !queue.enable_notification(memory).map_err(Error::Ring)? {
                        break;
                    }
                    silence(queue, memory)?;
                }
            }
        }
        window.give_back(queue);
        Ok(progress)
    }

    fn frame(
        &mut self,
        port: &impl Port,
        window: &mut Window<'_>,
        queue: &mut Queue,
        mistakes: &mut Mistakes,
    ) -> Result<Step, Error> {
        if self.held > 0 {
            if window.room >= self.held {
                let frame = self.waiting.get_mut(..self.held).unwrap_or_default();
                self.held = 0;
                window.deliver_copy(queue, frame, mistakes)?;
                return Ok(Step::Delivered);
            }
            if window.is_full() {
                self.held = 0;
                return Ok(Step::Dropped);
            }
            return Ok(Step::Room);
        }
        if window.room >= MAX_FRAME {
            return match self.received(readv(port.as_fd(), window.pieces.make_contiguous(), None)) {
                Some(len) => window.deliver(queue, len, mistakes).map(|()| Step::Delivered),
                None => Ok(Step::Again),
            };
        }
        if window.chains.is_empty() {
            return Ok(Step::Room);
        }
        self.waiting.resize(MAX_FRAME, 0);
        let read = nix::unistd::read(port.as_fd(), &mut self.waiting);
        self.held = self.received(read.map_err(io::Error::from)).unwrap_or(0);
        Ok(Step::Again)
    }

    /// The length of a frame that was read, if one was.
    fn received(&mut self, read: io::Result<usize>) -> Option<usize> {
        match read {
            Ok(len) if len >= HEADER => return Some(len),
            // Not a frame, and then there is another.
            Ok(len) if len > 0 => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A queue that is detached (EBADFD) or whose device is gone has no frames. It says when that changes.
            Ok(_) => self.readable = false,
            Err(e) => {
                if e.kind() != io::ErrorKind::WouldBlock && e.raw_os_error() != Some(Errno::EBADFD as i32) {
                    tracing::warn!("read frame: {e}");
                }
                self.readable = false;
            }
        }
        None
    }
}

/// What became of a frame, or of looking for one.
enum Step {
    Delivered,
    Dropped,
    /// Look again.
    Again,
    /// It takes more buffers.
    Room,
}

/// One chain of a window.
struct Room {
    head: u16,
    len: usize,
    pieces: usize,
    /// Why nothing can be put there: then it has no bytes. It is returned when its turn comes, since what is left of a
    /// window is put back into the queue by stepping back.
    bad: Option<BadFrame>,
}

/// The buffers that the next frames go to.
struct Window<'a> {
    memory: &'a Memory,
    chains: VecDeque<Room>,
    pieces: VecDeque<Slice<'a>>,
    room: usize,
    /// Most chains.
    limit: usize,
}

impl<'a> Window<'a> {
    fn new(memory: &'a Memory, queue_size: u16, mergeable: bool) -> Self {
        let limit = if mergeable { queue_size.into() } else { 1 };
        Self { memory, chains: VecDeque::new(), pieces: VecDeque::new(), room: 0, limit }
    }

    /// More buffers cannot join.
    fn is_full(&self) -> bool {
        self.chains.len() >= self.limit || self.pieces.len() > MAX_PIECES.saturating_sub(MAX_CHAIN_PIECES)
    }

    /// Takes buffers off the queue until there is room for any frame, or none are left.
    fn fill(&mut self, queue: &mut Queue) -> Result<(), Error> {
        while self.room < MAX_FRAME && !self.is_full() {
            let Some(chain) = queue.iter(self.memory).map_err(Error::Ring)?.next() else { break };
            let head = chain.head_index();
            let bad = match Buffers::writable(self.memory, chain) {
                Ok(room) if room.len() < HEADER => BadFrame::ShortBuffer(room.len()),
                Ok(room) => {
                    let len = room.len();
                    let pieces = room.into_pieces();
                    if pieces.len() <= MAX_CHAIN_PIECES {
                        self.chains.push_back(Room { head, len, pieces: pieces.len(), bad: None });
                        self.pieces.extend(pieces);
                        self.room = self.room.saturating_add(len);
                        continue;
                    }
                    BadFrame::Pieces(pieces.len())
                }
                Err(e) => BadFrame::Chain(e),
            };
            self.chains.push_back(Room { head, len: 0, pieces: 0, bad: Some(bad) });
        }
        Ok(())
    }

    /// Returns the buffers at the front that nothing can be put into; whether there were any.
    fn retire(&mut self, queue: &mut Queue, mistakes: &mut Mistakes) -> Result<bool, Error> {
        let mut any = false;
        while let Some(Room { head, bad: Some(bad), .. }) = self.chains.front() {
            mistakes.note(bad);
            queue.add_used(self.memory, *head, 0).map_err(Error::Ring)?;
            self.chains.pop_front();
            any = true;
        }
        Ok(any)
    }

    /// Hands a frame to the guest that is in the first bytes already.
    ///
    /// A bad buffer between others is counted as one of the frame's: the guest looks for as many as it is told.
    fn deliver(&mut self, queue: &mut Queue, len: usize, mistakes: &mut Mistakes) -> Result<(), Error> {
        let mut left = len;
        let mut used = Vec::with_capacity(1);
        let mut pieces = 0usize;
        while left > 0 {
            let Some(room) = self.chains.pop_front() else { break };
            if let Some(bad) = &room.bad {
                mistakes.note(bad);
            }
            let part = room.len.min(left);
            left = left.saturating_sub(part);
            pieces = pieces.saturating_add(room.pieces);
            self.room = self.room.saturating_sub(room.len);
            used.push((room.head, u32::try_from(part).unwrap_or(0)));
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        self.write_at(NUM_BUFFERS, &count.to_le_bytes());
        self.pieces.drain(..pieces.min(self.pieces.len()));
        add_used_together(queue, self.memory, &used)
    }

    /// As [`Window::deliver`], for a frame that has room and was read elsewhere.
    fn deliver_copy(&mut self, queue: &mut Queue, frame: &[u8], mistakes: &mut Mistakes) -> Result<(), Error> {
        self.write_at(0, frame);
        self.deliver(queue, frame.len(), mistakes)
    }

    /// Writes at an offset from the first buffer's start.
    fn write_at(&self, mut offset: usize, mut bytes: &[u8]) {
        for piece in &self.pieces {
            if bytes.is_empty() {
                return;
            }
            let Ok(target) = piece.offset(offset.min(piece.len())) else { return };
            offset = offset.saturating_sub(piece.len());
            let (now, later) = bytes.split_at_checked(target.len()).unwrap_or((bytes, &[]));
            target.copy_from(now);
            bytes = later;
        }
    }

    /// Leaves the rest in the queue.
    fn give_back(self, queue: &mut Queue) {
        for _ in self.chains {
            queue.go_to_previous_position();
        }
    }
}

impl From<Malformed> for BadFrame {
    fn from(e: Malformed) -> Self {
        Self::Chain(e)
    }
}
