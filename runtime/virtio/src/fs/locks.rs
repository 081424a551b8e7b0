//! Locks: those of the guest's processes are locks of this process on the host's files, so that other containers, other
//! VMs and the host see them.
//!
//! - flock(2) belongs to an open file, in the guest and here: it is taken on the guest's handle.
//! - A POSIX lock belongs to a process and a file, however often the process opened the file. Each such pair, an
//!   *owner*, has an open file description of its own here, with OFD locks: two owners exclude each other, one never
//!   itself.
//! - An OFD lock of the guest comes as a POSIX lock whose owner is the open file.
//!
//! POSIX locks end with the first close of the file by their process (FLUSH), OFD locks with the last one of their open
//! file (RELEASE), all of them with the session, and with this process.
//!
//! Who waits for a lock has a thread here that waits in the host's kernel, and an answer later: the queue's own thread
//! goes on. Threads are few; beyond them requests queue up, which a thread that is done takes on, and which are tried
//! again when the guest itself gives up a lock on their file.
//!
//! Threat: the guest chooses owners, ranges and numbers of requests. Owners, ranges, threads and requests that wait
//! have bounds, beyond which it gets ENOLCK; one owner that waits in vain holds up nobody else's.

use std::{
    collections::{HashMap, VecDeque},
    fs::{File, TryLockError},
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};
use vz_sys::{sync::lock, thread::Interruptible};

/// Owners of POSIX and OFD locks: each has a descriptor.
pub(super) const OWNERS: usize = 2048;
/// Ranges of all owners.
const RANGES: usize = 1 << 16;
/// Requests that wait, far fewer than a queue is long: the others must get through.
const WAITS: usize = 512;
/// Threads that wait, and those of them that may wait for one file.
const THREADS: usize = 64;
const THREADS_OF_FILE: usize = 16;
/// Interrupts of requests that have not come, which overtook them on the other queue.
const EARLY: usize = 256;
/// A signal that comes right before the call that it is to interrupt is lost, so it is sent again, so often.
const SIGNAL_EVERY: Duration = Duration::from_millis(1);
const SIGNALS: usize = 1000;

/// What a file's end is in a lock that goes on to it, however long the file gets.
const END: u64 = i64::MAX as u64;

/// Starts a thread that runs this and nothing else, confined to what waiting for locks takes.
#[derive(Clone)]
pub struct Threads(Arc<dyn Fn(Work) -> io::Result<()> + Send + Sync>);

/// What such a thread does.
pub type Work = Box<dyn FnOnce() + Send>;

impl Threads {
    /// By this function.
    pub fn new(start: impl Fn(Work) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(start))
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Threads")
    }
}

/// The guest's open files, by its numbers.
pub(super) trait Files {
    /// Lends an open file.
    fn with<R>(&self, inode: u64, handle: u64, f: impl FnOnce(&File) -> io::Result<R>) -> io::Result<R>;
    /// Opens a file once more, for nobody in the guest.
    fn reopen(&self, inode: u64, flags: OFlag) -> io::Result<File>;
}

/// What is done to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Shared,
    Exclusive,
    Unlock,
}

impl Kind {
    /// By the number that Linux has for it.
    pub(super) fn new(number: u32) -> io::Result<Self> {
        match i32::try_from(number) {
            Ok(libc::F_RDLCK) => Ok(Self::Shared),
            Ok(libc::F_WRLCK) => Ok(Self::Exclusive),
            Ok(libc::F_UNLCK) => Ok(Self::Unlock),
            _ => Err(Errno::EINVAL.into()),
        }
    }

    fn number(self) -> i32 {
        match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
            Self::Unlock => libc::F_UNLCK,
        }
    }
}

/// A lock, or the end of one, that the guest asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    pub(super) inode: u64,
    pub(super) handle: u64,
    pub(super) owner: u64,
    pub(super) flock: bool,
    pub(super) range: Range,
}

/// Bytes from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) kind: Kind,
    /// The guest's process that asked.
    pub(super) pid: u32,
}

impl Range {
    /// As FUSE has it.
    pub(super) fn lock(&self) -> super::FileLock {
        super::FileLock { start: self.start, end: self.end, kind: self.kind.number().cast_unsigned(), pid: self.pid }
    }

    const ALL: Self = Self { start: 0, end: END, kind: Kind::Unlock, pid: 0 };

    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn excludes(&self, other: &Self) -> bool {
        self.overlaps(other) && (self.kind == Kind::Exclusive || other.kind == Kind::Exclusive)
    }

    /// As the host's kernel wants it.
    fn host(&self) -> io::Result<libc::flock> {
        let number = |of| i64::try_from(of).map_err(|_| io::Error::from(Errno::EINVAL));
        let start = number(self.start)?;
        let len = match self.end {
            END => 0,
            end => number(end.checked_sub(self.start).ok_or(Errno::EINVAL)?.saturating_add(1))?,
        };
        if self.start > self.end || self.end > END {
            return Err(Errno::EINVAL.into());
        }
        let narrow = |of: i32| i16::try_from(of).unwrap_or_default();
        Ok(libc::flock {
            l_type: narrow(self.kind.number()),
            l_whence: narrow(libc::SEEK_SET),
            l_start: start,
            l_len: len,
            l_pid: 0,
        })
    }
}

/// What one owner holds, in order, none overlapping another.
#[derive(Debug, Default)]
struct Held(Vec<Range>);

impl Held {
    /// What becomes of it by a lock or unlock of a range.
    fn with(&self, new: Range) -> Self {
        let mut ranges = Vec::with_capacity(self.0.len().saturating_add(2));
        for old in &self.0 {
            if !old.overlaps(&new) {
                ranges.push(*old);
                continue;
            }
            if let Some(end) = new.start.checked_sub(1)
                && old.start <= end
            {
                ranges.push(Range { end, ..*old });
            }
            if let Some(start) = new.end.checked_add(1)
                && start <= old.end
            {
                ranges.push(Range { start, ..*old });
            }
        }
        if new.kind != Kind::Unlock {
            ranges.push(new);
        }
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, range| {
            let joined =
                range.kind == next.kind && range.pid == next.pid && range.end.checked_add(1) == Some(next.start);
            if joined {
                range.end = next.end;
            }
            joined
        });
        Self(ranges)
    }
}

/// An owner's open file description and what it holds.
#[derive(Debug)]
struct Owner {
    file: Arc<File>,
    /// Opened for writing: otherwise it holds shared locks only.
    writable: bool,
    /// Through which the guest asked last: an OFD lock's owner has one only.
    handle: u64,
    held: Held,
    /// Requests of it that wait.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Table {
    owners: HashMap<Key, Owner>,
    ranges: usize,
}

/// Inode and owner.
type Key = (u64, u64);

impl Table {
    /// Notes what an owner holds now.
    fn note(&mut self, key: Key, range: Range) {
        if let Some(owner) = self.owners.get_mut(&key) {
            let held = owner.held.with(range);
            self.ranges = self.ranges.saturating_sub(owner.held.0.len()).saturating_add(held.0.len());
            owner.held = held;
        }
        self.prune(key);
    }

    /// An owner without locks is none.
    fn prune(&mut self, key: Key) {
        if self.owners.get(&key).is_some_and(|owner| owner.waiting == 0 && owner.held.0.is_empty()) {
            self.owners.remove(&key);
        }
    }
}

/// Where the answer to a request that waits goes. Not after the queue was reset: nobody asks then.
pub(super) trait Answer: Send {
    fn answer(self: Box<Self>, error: i32);
}

/// A request that waits.
struct Wait {
    unique: u64,
    queue: usize,
    request: Request,
    file: Arc<File>,
    answer: Box<dyn Answer>,
    state: State,
    cancelled: bool,
}

#[derive(Debug)]
enum State {
    /// For a thread.
    Queued,
    /// Tried again by a thread that does not wait.
    Tried,
    Running(Interruptible),
}

#[derive(Default)]
struct Waits {
    all: HashMap<u64, Wait>,
    /// Tickets of those without a thread, first come first.
    queued: VecDeque<u64>,
    early: VecDeque<u64>,
    next: u64,
    threads: usize,
    /// Threads that wait for each file.
    files: HashMap<u64, usize>,
}

impl Waits {
    /// Takes the first one off that a thread may wait for.
    fn take(&mut self) -> Option<u64> {
        let Self { all, queued, files, .. } = self;
        let free = |ticket: &u64| {
            let inode = all.get(ticket).map(|wait| wait.request.inode);
            inode.is_some_and(|inode| files.get(&inode).is_none_or(|threads| *threads < THREADS_OF_FILE))
        };
        let at = queued.iter().position(free)?;
        let ticket = queued.remove(at)?;
        let wait = all.get_mut(&ticket)?;
        wait.state = State::Running(Interruptible::here());
        let threads = files.entry(wait.request.inode).or_default();
        *threads = threads.saturating_add(1);
        Some(ticket)
    }
}

impl std::fmt::Debug for Waits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waits").field("all", &self.all.len()).field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// The locks of a share. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Locks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    table: Mutex<Table>,
    /// As many as the table has, for those who need not look.
    owners: AtomicUsize,
    waits: Mutex<Waits>,
    /// As many as wait without a thread.
    queued: AtomicUsize,
    ended: Condvar,
    threads: Threads,
}

impl Locks {
    pub(super) fn new(threads: Threads) -> Self {
        Self(Arc::new(Inner {
            table: Mutex::default(),
            owners: AtomicUsize::new(0),
            waits: Mutex::default(),
            queued: AtomicUsize::new(0),
            ended: Condvar::new(),
            threads,
        }))
    }

    /// Which lock would keep the guest from this one: of kind [`Kind::Unlock`] where none does.
    pub(super) fn get(&self, files: &impl Files, request: &Request) -> io::Result<Range> {
        let wanted = request.range;
        let table = self.0.table();
        let own = table.owners.get(&(request.inode, request.owner)).map(|owner| Arc::clone(&owner.file));
        let ask = |file: &File| {
            let mut found = wanted.host()?;
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
            Ok(found)
        };
        let found = match own {
            Some(file) => ask(&file)?,
            // A handle has no such lock itself.
            None => files.with(request.inode, request.handle, ask)?,
        };
        let kind = Kind::new(i32::from(found.l_type).cast_unsigned())?;
        if kind == Kind::Unlock {
            return Ok(Range { kind, ..wanted });
        }
        let start = u64::try_from(found.l_start).unwrap_or_default();
        let end = match u64::try_from(found.l_len).unwrap_or_default().checked_sub(1) {
            Some(more) => start.saturating_add(more),
            None => END,
        };
        let mut range = Range { start, end, kind, pid: 0 };
        // A process of the guest's has a number in the guest.
        let ours = table.owners.iter().filter(|((inode, owner), _)| *inode == request.inode && *owner != request.owner);
        range.pid = ours
            .flat_map(|(_, owner)| &owner.held.0)
            .find(|held| held.excludes(&wanted) && held.overlaps(&range))
            .map_or(0, |held| held.pid);
        Ok(range)
    }

    /// Locks or unlocks without waiting: EAGAIN where another's lock is in the way.
    pub(super) fn set(&self, files: &impl Files, request: &Request) -> io::Result<()> {
        if request.flock {
            files.with(request.inode, request.handle, |file| try_flock(file, request.range.kind))?;
        } else {
            self.set_posix(files, request)?;
        }
        if request.range.kind != Kind::Exclusive {
            self.try_queued(request.inode);
        }
        Ok(())
    }

    fn set_posix(&self, files: &impl Files, request: &Request) -> io::Result<()> {
        let key = (request.inode, request.owner);
        let host = request.range.host()?;
        let mut table = self.0.table();
        if request.range.kind == Kind::Unlock && !table.owners.contains_key(&key) {
            return Ok(());
        }
        let file = table.owner(files, request)?;
        let done = fcntl(&*file, FcntlArg::F_OFD_SETLK(&host));
        if done.is_ok() {
            table.note(key, request.range);
        } else {
            table.prune(key);
        }
        self.0.owners.store(table.owners.len(), Ordering::Relaxed);
        match done {
            Ok(_) => Ok(()),
            Err(Errno::EACCES) => Err(Errno::EAGAIN.into()),
            Err(e) => Err(e.into()),
        }
    }

    /// Answers when the lock is there, or cannot be waited for.
    pub(super) fn wait(
        &self,
        files: &impl Files,
        request: &Request,
        unique: u64,
        queue: usize,
        answer: Box<dyn Answer>,
    ) {
        match self.set(files, request) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
            done => return answer.answer(done.map_or_else(|e| errno(&e), |()| 0)),
        }
        let file = match self.file(files, request) {
            Ok(file) => file,
            Err(e) => return answer.answer(errno(&e)),
        };
        let wait = Wait { unique, queue, request: *request, file, answer, state: State::Queued, cancelled: false };
        if let Err((wait, why)) = self.enqueue(wait) {
            self.finish(wait, Err(why.into()));
        }
    }

    /// What a thread can wait on.
    fn file(&self, files: &impl Files, request: &Request) -> io::Result<Arc<File>> {
        if request.flock {
            return files.with(request.inode, request.handle, |file| Ok(Arc::new(file.try_clone()?)));
        }
        let mut table = self.0.table();
        let file = table.owner(files, request)?;
        if let Some(owner) = table.owners.get_mut(&(request.inode, request.owner)) {
            owner.waiting = owner.waiting.saturating_add(1);
        }
        self.0.owners.store(table.owners.len(), Ordering::Relaxed);
        Ok(file)
    }

    fn enqueue(&self, wait: Wait) -> Result<(), (Wait, Errno)> {
        let mut waits = self.0.waits();
        if let Some(at) = waits.early.iter().position(|unique| *unique == wait.unique) {
            waits.early.remove(at);
            return Err((wait, Errno::EINTR));
        }
        if waits.all.len() >= WAITS {
            return Err((wait, Errno::ENOLCK));
        }
        let ticket = waits.next;
        waits.next = ticket.wrapping_add(1);
        waits.all.insert(ticket, wait);
        waits.queued.push_back(ticket);
        if self.start_thread(waits) {
            return Ok(());
        }
        let mut waits = self.0.waits();
        waits.queued.retain(|queued| *queued != ticket);
        self.0.queued.store(waits.queued.len(), Ordering::Relaxed);
        waits.all.remove(&ticket).map_or(Ok(()), |wait| Err((wait, Errno::ENOLCK)))
    }

    /// Starts a thread for what is queued, if there may be one more; whether there is any thread.
    fn start_thread(&self, mut waits: MutexGuard<'_, Waits>) -> bool {
        self.0.queued.store(waits.queued.len(), Ordering::Relaxed);
        if waits.threads >= THREADS {
            return true;
        }
        waits.threads = waits.threads.saturating_add(1);
        drop(waits);
        let locks = self.clone();
        if (self.0.threads.0)(Box::new(move || locks.work())).is_ok() {
            return true;
        }
        // The host has no room for it. Another thread may take the request on, if there is one.
        let mut waits = self.0.waits();
        waits.threads = waits.threads.saturating_sub(1);
        waits.threads > 0
    }

    /// A thread's life.
    fn work(&self) {
        loop {
            let mut waits = self.0.waits();
            let Some(ticket) = waits.take() else {
                waits.threads = waits.threads.saturating_sub(1);
                return;
            };
            self.0.queued.store(waits.queued.len(), Ordering::Relaxed);
            let Some(wait) = waits.all.get(&ticket) else { continue };
            let (file, request) = (Arc::clone(&wait.file), wait.request);
            drop(waits);
            let done = loop {
                if self.0.waits().all.get(&ticket).is_none_or(|wait| wait.cancelled) {
                    break Err(Errno::EINTR.into());
                }
                match request.block(&file) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    done => break done,
                }
            };
            let mut waits = self.0.waits();
            if let Some(threads) = waits.files.get_mut(&request.inode) {
                *threads = threads.saturating_sub(1);
                if *threads == 0 {
                    waits.files.remove(&request.inode);
                }
            }
            let wait = waits.all.remove(&ticket);
            drop(waits);
            self.0.ended.notify_all();
            drop(file);
            if let Some(wait) = wait {
                self.finish(wait, done);
            }
        }
    }

    /// Notes the outcome and tells the guest.
    fn finish(&self, wait: Wait, done: io::Result<()>) {
        let Wait { request, file, answer, .. } = wait;
        let mut done = done;
        if !request.flock {
            let key = (request.inode, request.owner);
            let mut table = self.0.table();
            if let Some(owner) = table.owners.get_mut(&key) {
                owner.waiting = owner.waiting.saturating_sub(1);
                // It has been opened for writing meanwhile. The lock is shared, so that both can hold it.
                if done.is_ok() && !Arc::ptr_eq(&owner.file, &file) {
                    done = request
                        .range
                        .host()
                        .and_then(|host| Ok(fcntl(&*owner.file, FcntlArg::F_OFD_SETLK(&host))?))
                        .map(drop);
                }
            }
            match done {
                Ok(()) => table.note(key, request.range),
                Err(_) => table.prune(key),
            }
            self.0.owners.store(table.owners.len(), Ordering::Relaxed);
        }
        drop(file);
        answer.answer(done.map_or_else(|e| errno(&e), |()| 0));
    }

    /// The guest has given up a lock: those who wait for the file without a thread may have it.
    fn try_queued(&self, inode: u64) {
        if self.0.queued.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut waits = self.0.waits();
        let Waits { all, queued, .. } = &*waits;
        let of_file = |ticket: &&u64| all.get(ticket).is_some_and(|wait| wait.request.inode == inode);
        let tickets: Vec<u64> = queued.iter().filter(of_file).copied().collect();
        for ticket in tickets {
            // Not those that a thread has taken on since.
            let Some(wait) = waits.all.get_mut(&ticket).filter(|wait| matches!(wait.state, State::Queued)) else {
                continue;
            };
            wait.state = State::Tried;
            let (file, request) = (Arc::clone(&wait.file), wait.request);
            waits.queued.retain(|queued| *queued != ticket);
            drop(waits);
            let done = request.attempt(&file);
            waits = self.0.waits();
            let cancelled = waits.all.get(&ticket).is_some_and(|wait| wait.cancelled);
            if done.is_err() && !cancelled {
                if let Some(wait) = waits.all.get_mut(&ticket) {
                    wait.state = State::Queued;
                    waits.queued.push_back(ticket);
                }
                // The threads may have ended meanwhile, with nothing to do. Without any, it waits for the next release.
                self.start_thread(waits);
                waits = self.0.waits();
                continue;
            }
            let wait = waits.all.remove(&ticket);
            drop(waits);
            self.0.ended.notify_all();
            if let Some(wait) = wait {
                self.finish(wait, done.map_err(|_| Errno::EINTR.into()));
            }
            waits = self.0.waits();
        }
        self.0.queued.store(waits.queued.len(), Ordering::Relaxed);
    }

    /// The guest's process does not want to wait any more.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut waits = self.0.waits();
        let found = waits.all.iter().find(|(_, wait)| wait.unique == unique).map(|(ticket, _)| *ticket);
        match found {
            Some(ticket) => self.cancel(waits, ticket),
            None => {
                if waits.early.len() >= EARLY {
                    waits.early.pop_front();
                }
                waits.early.push_back(unique);
            }
        }
    }

    fn cancel(&self, mut waits: MutexGuard<'_, Waits>, ticket: u64) {
        for _ in 0..SIGNALS {
            let Some(wait) = waits.all.get_mut(&ticket) else { return };
            wait.cancelled = true;
            match &wait.state {
                State::Queued => {
                    waits.queued.retain(|queued| *queued != ticket);
                    self.0.queued.store(waits.queued.len(), Ordering::Relaxed);
                    let wait = waits.all.remove(&ticket);
                    drop(waits);
                    if let Some(wait) = wait {
                        self.finish(wait, Err(Errno::EINTR.into()));
                    }
                    return;
                }
                State::Tried => return,
                State::Running(thread) => thread.interrupt(),
            }
            waits = self.0.ended.wait_timeout(waits, SIGNAL_EVERY).unwrap_or_else(PoisonError::into_inner).0;
        }
        // A server on the network does not let go of the thread; it sees that it was cancelled as soon as it does.
    }

    /// A process has closed a file.
    pub(super) fn flushed(&self, inode: u64, owner: u64) {
        if self.0.owners.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut table = self.0.table();
        let gone = table.unlock((inode, owner));
        self.0.owners.store(table.owners.len(), Ordering::Relaxed);
        drop(table);
        if gone {
            self.try_queued(inode);
        }
    }

    /// An open file is no more.
    pub(super) fn released(&self, inode: u64, handle: u64) {
        if self.0.owners.load(Ordering::Relaxed) > 0 {
            let mut table = self.0.table();
            let of_handle =
                |((of, owner), held): (&Key, &Owner)| (*of == inode && held.handle == handle).then_some((*of, *owner));
            let keys: Vec<Key> = table.owners.iter().filter_map(of_handle).collect();
            for key in keys {
                table.unlock(key);
            }
            self.0.owners.store(table.owners.len(), Ordering::Relaxed);
        }
        self.try_queued(inode);
    }

    /// The guest has given up everything.
    pub(super) fn clear(&self) {
        self.cancel_where(|_| true);
        let mut table = self.0.table();
        *table = Table::default();
        self.0.owners.store(0, Ordering::Relaxed);
        drop(table);
        self.0.waits().early.clear();
    }

    /// Nobody asks on this queue any more.
    pub(super) fn leave(&self, queue: usize) {
        self.cancel_where(|wait| wait.queue == queue);
    }

    fn cancel_where(&self, which: impl Fn(&Wait) -> bool) {
        let tickets: Vec<u64> =
            self.0.waits().all.iter().filter(|(_, wait)| which(wait)).map(|(ticket, _)| *ticket).collect();
        for ticket in tickets {
            self.cancel(self.0.waits(), ticket);
        }
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        lock(&self.waits)
    }
}

impl Table {
    /// The description of the request's owner, opened if need be.
    fn owner(&mut self, files: &impl Files, request: &Request) -> io::Result<Arc<File>> {
        let flags = files.with(request.inode, request.handle, |file| Ok(fcntl(file, FcntlArg::F_GETFL)?))?;
        // Not for writing without need: that would copy a file of an image's layer up, and keep a program from being
        // started.
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        if self.ranges >= RANGES && request.range.kind != Kind::Unlock {
            return Err(Errno::ENOLCK.into());
        }
        let full = self.owners.len() >= OWNERS;
        let key = (request.inode, request.owner);
        if let Some(owner) = self.owners.get_mut(&key) {
            owner.handle = request.handle;
            if write && !owner.writable {
                let file = files.reopen(request.inode, OFlag::O_RDWR)?;
                // Shared locks, which the new description can hold beside the old one: nobody gets in between.
                for range in &owner.held.0 {
                    fcntl(&file, FcntlArg::F_OFD_SETLK(&range.host()?))?;
                }
                owner.file = Arc::new(file);
                owner.writable = true;
            }
            return Ok(Arc::clone(&owner.file));
        }
        if full {
            return Err(Errno::ENOLCK.into());
        }
        let flags = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        let file = Arc::new(files.reopen(request.inode, flags)?);
        let owner = Owner {
            file: Arc::clone(&file),
            writable: write,
            handle: request.handle,
            held: Held::default(),
            waiting: 0,
        };
        self.owners.insert(key, owner);
        Ok(file)
    }

    /// Ends an owner's locks; whether it had any.
    fn unlock(&mut self, key: Key) -> bool {
        let Some(owner) = self.owners.get(&key) else { return false };
        // Of one whose other requests wait, the description stays.
        if let Ok(all) = Range::ALL.host() {
            let _ = fcntl(&*owner.file, FcntlArg::F_OFD_SETLK(&all));
        }
        self.note(key, Range::ALL);
        true
    }
}

impl Request {
    /// Waits for the lock.
    fn block(&self, file: &File) -> io::Result<()> {
        if !self.flock {
            return Ok(fcntl(file, FcntlArg::F_OFD_SETLKW(&self.range.host()?)).map(drop)?);
        }
        match self.range.kind {
            Kind::Shared => file.lock_shared(),
            Kind::Exclusive => file.lock(),
            Kind::Unlock => file.unlock(),
        }
    }

    /// Tries to get it.
    fn attempt(&self, file: &File) -> io::Result<()> {
        if !self.flock {
            return Ok(fcntl(file, FcntlArg::F_OFD_SETLK(&self.range.host()?)).map(drop)?);
        }
        try_flock(file, self.range.kind)
    }
}

fn try_flock(file: &File, kind: Kind) -> io::Result<()> {
    let done = match kind {
        Kind::Shared => file.try_lock_shared(),
        Kind::Exclusive => file.try_lock(),
        Kind::Unlock => return file.unlock(),
    };
    done.map_err(|e| match e {
        TryLockError::WouldBlock => Errno::EAGAIN.into(),
        TryLockError::Error(e) => e,
    })
}

/// What the guest is told of an error.
pub(super) fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(libc::EIO)
}
