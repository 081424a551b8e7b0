//! What the guest knows of the share: its inodes, by the numbers that it was given.
//!
//! virtiofsd keeps a descriptor for each inode that the guest knows, and a process has only so many. The guest's kernel
//! forgets inodes when it is short of memory, not when we are short of descriptors. So the number that the guest has is
//! ours, and virtiofsd's inode behind it comes and goes: those that were not used for the longest time are given back,
//! and looked up again by the name under which the guest found them, beneath the share as every lookup is.
//!
//! Found again, a file has to be the one that it was, by inode number and type: otherwise the guest gets ESTALE, upon
//! which its kernel looks the name up anew. Renames and removals by the guest move and take the names. Inodes that are
//! in use, open, without a name or the root of a mount stay.
//!
//! Threat: the guest decides what it looks up and what it never forgets. That costs memory of this process, which is
//! the sandbox's; there are [`MOST`] nodes and no more. A name that is kept was looked up before, and checked.

use std::{
    collections::{HashMap, VecDeque},
    ffi::CStr,
    hash::{BuildHasher, RandomState},
    io, mem,
    sync::{
        Arc, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use virtiofsd::{
    filesystem::{Entry, FileSystem},
    fuse::{ATTR_SUBMOUNT, ROOT_ID},
};
use vz_sys::sync;

use super::{cache::Stamp, nobody};

/// Nodes that there can be: some hundred bytes each.
const MOST: usize = 1 << 23;
/// The longest way up to a directory that virtiofsd knows.
const DEPTH: usize = 2048;
/// Inodes that are given back in one go, and how many are looked at for it.
const BATCH: u64 = 64;
const LOOKED_AT: usize = 1 << 14;
/// Files that were given back, have the inode number of a new one, and may therefore be that one under another name.
const CANDIDATES: usize = 8;

/// An inode of virtiofsd's. It stays for as long as somebody has this.
#[derive(Debug)]
pub(super) struct Live(u64);

impl Live {
    /// virtiofsd's number.
    pub(super) fn number(&self) -> u64 {
        self.0
    }
}

#[derive(Debug)]
struct Node {
    live: Option<Arc<Live>>,
    /// What virtiofsd has counted for `live`.
    references: AtomicU64,
    /// What the guest has to forget.
    lookups: AtomicU64,
    /// Since it was looked at last.
    used: AtomicBool,
    /// The share's root, or a mount's.
    is_root: bool,
    /// Where it was found.
    place: Option<Place>,
    /// Nodes that were found in it.
    children: usize,
    /// Open files.
    handles: AtomicUsize,
    ino: u64,
    kind: u32,
    stamp: Option<Stamp>,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    parent: u64,
    name: Box<CStr>,
}

/// A node and the name that leads to it.
type Step = (u64, Box<CStr>);

impl Node {
    fn new(live: u64, entry: &Entry) -> Self {
        Self {
            live: Some(Arc::new(Live(live))),
            references: AtomicU64::new(1),
            lookups: AtomicU64::new(1),
            used: AtomicBool::new(true),
            is_root: entry.attr.flags & ATTR_SUBMOUNT != 0,
            place: None,
            children: 0,
            handles: AtomicUsize::new(0),
            ino: entry.attr.ino,
            kind: entry.attr.mode & libc::S_IFMT,
            stamp: None,
        }
    }

    /// The share's root, which is never forgotten.
    fn root() -> Self {
        Self {
            live: Some(Arc::new(Live(ROOT_ID))),
            references: AtomicU64::new(1),
            lookups: AtomicU64::new(1),
            used: AtomicBool::new(true),
            is_root: true,
            place: None,
            children: 0,
            handles: AtomicUsize::new(0),
            ino: 0,
            kind: libc::S_IFDIR,
            stamp: None,
        }
    }

    fn is_at(&self, parent: u64, name: &CStr) -> bool {
        self.place.as_ref().is_some_and(|place| place.parent == parent && *place.name == *name)
    }

    /// Whether a file that was found has this node's number and type.
    fn could_be(&self, entry: &Entry) -> bool {
        self.ino == entry.attr.ino
            && self.kind == entry.attr.mode & libc::S_IFMT
            && entry.attr.flags & ATTR_SUBMOUNT == 0
    }

    /// Nobody needs virtiofsd's inode, and it can be found again.
    fn is_idle(&self) -> bool {
        let free = self.live.as_ref().is_some_and(|live| Arc::strong_count(live) == 1);
        free && !self.is_root && self.handles.load(Ordering::Relaxed) == 0 && self.place.is_some()
    }

    fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// The guest and virtiofsd count one more.
    fn found_again(&self) {
        self.references.fetch_add(1, Ordering::Relaxed);
        self.given();
    }

    /// The guest counts one more.
    fn given(&self) {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        self.touch();
    }
}

#[derive(Debug, Default)]
struct Table {
    nodes: HashMap<u64, Node>,
    /// The guest's number of those that virtiofsd has given another one since. By default it is the same.
    renumbered: HashMap<u64, u64>,
    /// Directory and name, hashed, of those that have one.
    places: HashMap<(u64, u64), u64>,
    /// Those that virtiofsd does not know at the moment, by inode number.
    given_back: HashMap<u64, Vec<u64>>,
    /// Those that it knows, and some that it does not any more, in the order in which they are looked at.
    clock: VecDeque<u64>,
    /// What virtiofsd is to forget, with how often, once the table is not locked.
    forgotten: Vec<(u64, u64)>,
    hasher: RandomState,
}

impl Table {
    /// The guest's number of virtiofsd's inode.
    fn known(&self, live: u64) -> Option<u64> {
        if let Some(number) = self.renumbered.get(&live) {
            return Some(*number);
        }
        let node = self.nodes.get(&live)?;
        node.live.as_ref().is_some_and(|of| of.0 == live).then_some(live)
    }

    fn key(&self, parent: u64, name: &CStr) -> (u64, u64) {
        (parent, self.hasher.hash_one(name))
    }

    fn at(&self, parent: u64, name: &CStr) -> Option<u64> {
        let number = *self.places.get(&self.key(parent, name))?;
        self.nodes.get(&number).is_some_and(|node| node.is_at(parent, name)).then_some(number)
    }

    /// Takes a node's name away.
    fn displace(&mut self, number: u64) {
        let Some(place) = self.nodes.get_mut(&number).and_then(|node| node.place.take()) else { return };
        let key = self.key(place.parent, &place.name);
        if self.places.get(&key) == Some(&number) {
            self.places.remove(&key);
        }
        if let Some(parent) = self.nodes.get_mut(&place.parent) {
            parent.children = parent.children.saturating_sub(1);
            self.drop_unused(place.parent);
        }
    }

    /// Gives a node a name, and takes it from whoever had it.
    fn place(&mut self, number: u64, parent: u64, name: &CStr) {
        if self.nodes.get(&number).is_none_or(|node| node.is_root || node.is_at(parent, name)) {
            return;
        }
        if let Some(before) = self.at(parent, name) {
            self.displace(before);
        }
        let Some(directory) = self.nodes.get_mut(&parent) else { return };
        // First the new one, so that the directory is not without children in between.
        directory.children = directory.children.saturating_add(1);
        self.displace(number);
        let key = self.key(parent, name);
        self.places.insert(key, number);
        if let Some(node) = self.nodes.get_mut(&number) {
            node.place = Some(Place { parent, name: name.into() });
        }
    }

    /// Takes a node out that the guest has forgotten and that no other is found by, and those above it.
    fn drop_unused(&mut self, number: u64) {
        let unused = |node: &Node| node.children == 0 && node.lookups.load(Ordering::Relaxed) == 0;
        if number == ROOT_ID || !self.nodes.get(&number).is_some_and(unused) {
            return;
        }
        self.release(number);
        if let Some(node) = self.nodes.get(&number) {
            self.not_given_back(node.ino, number);
        }
        // Up the tree, one by one.
        let mut number = Some(number);
        while let Some(unnamed) = number.take() {
            let Some(node) = self.nodes.remove(&unnamed) else { return };
            let Some(place) = node.place else { return };
            let key = self.key(place.parent, &place.name);
            if self.places.get(&key) == Some(&unnamed) {
                self.places.remove(&key);
            }
            let Some(parent) = self.nodes.get_mut(&place.parent) else { return };
            parent.children = parent.children.saturating_sub(1);
            if place.parent != ROOT_ID && unused(parent) {
                let ino = parent.ino;
                self.release(place.parent);
                self.not_given_back(ino, place.parent);
                number = Some(place.parent);
            }
        }
    }

    /// Gives virtiofsd's inode back.
    fn release(&mut self, number: u64) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        let Some(live) = node.live.take() else { return };
        self.forgotten.push((live.0, node.references.swap(0, Ordering::Relaxed)));
        if self.renumbered.get(&live.0) == Some(&number) {
            self.renumbered.remove(&live.0);
        }
    }

    fn not_given_back(&mut self, ino: u64, number: u64) {
        if let Some(numbers) = self.given_back.get_mut(&ino) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.given_back.remove(&ino);
            }
        }
    }

    /// virtiofsd knows a node again, by this number, and has counted so many references.
    fn revive(&mut self, number: u64, live: u64, references: u64) -> Option<Arc<Live>> {
        let node = self.nodes.get_mut(&number)?;
        let made = Arc::new(Live(live));
        node.live = Some(Arc::clone(&made));
        node.references.store(references, Ordering::Relaxed);
        node.touch();
        let ino = node.ino;
        self.not_given_back(ino, number);
        if live != number {
            self.renumbered.entry(live).or_insert(number);
        }
        self.clock.push_back(number);
        Some(made)
    }
}

/// All nodes of a share.
#[derive(Debug)]
pub(super) struct Nodes {
    table: RwLock<Table>,
    /// Descriptors for inodes, and for open files.
    live: AtomicU64,
    handles: AtomicU64,
    /// Inodes with open files.
    open: AtomicU64,
    /// How many descriptors there can be.
    limit: u64,
}

impl Nodes {
    /// For so many descriptors.
    pub(super) fn new(limit: u64) -> Self {
        // Some requests need one or two in between, on each queue.
        let limit = limit.saturating_sub((limit / 8).min(64)).max(1);
        Self {
            table: RwLock::default(),
            live: AtomicU64::new(0),
            handles: AtomicU64::new(0),
            open: AtomicU64::new(0),
            limit,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        sync::read(&self.table)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        sync::write(&self.table)
    }

    /// Lets virtiofsd forget what the table has given up.
    fn settle<F: FileSystem>(&self, fs: &F, mut table: RwLockWriteGuard<'_, Table>) {
        let forgotten = mem::take(&mut table.forgotten);
        drop(table);
        for (live, references) in forgotten {
            fs.forget(nobody(), live.into(), references);
            fewer(&self.live);
        }
    }

    /// A session begins: the guest knows the root.
    pub(super) fn start(&self) {
        let mut table = self.write();
        *table = Table::default();
        table.nodes.insert(ROOT_ID, Node::root());
        self.live.store(1, Ordering::Relaxed);
        self.handles.store(0, Ordering::Relaxed);
        self.open.store(0, Ordering::Relaxed);
    }

    /// A session ends, and virtiofsd forgets everything by itself.
    pub(super) fn clear(&self) {
        *self.write() = Table::default();
        self.live.store(0, Ordering::Relaxed);
        self.handles.store(0, Ordering::Relaxed);
        self.open.store(0, Ordering::Relaxed);
    }

    /// virtiofsd's inode of a node, looked up again if need be.
    pub(super) fn get<F: FileSystem>(&self, fs: &F, number: u64) -> io::Result<Arc<Live>> {
        {
            let table = self.read();
            let node = table.nodes.get(&number).ok_or_else(|| os(libc::EBADF))?;
            if let Some(live) = &node.live {
                node.touch();
                return Ok(Arc::clone(live));
            }
        }
        self.look_up_again(fs, number)
    }

    fn look_up_again<F: FileSystem>(&self, fs: &F, number: u64) -> io::Result<Arc<Live>> {
        let (mut live, way) = self.way_to(number)?;
        for (number, name) in way.into_iter().rev() {
            self.make_room(fs, 1);
            let found = fs.lookup(nobody(), live.0.into(), &name).map_err(|e| match e.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EBADF) => os(libc::ESTALE),
                _ => e,
            })?;
            live = self.found_again(fs, number, &found)?;
        }
        Ok(live)
    }

    /// The nearest directory above a node that virtiofsd knows, and the way from there, the last step first.
    fn way_to(&self, number: u64) -> io::Result<(Arc<Live>, Vec<Step>)> {
        let table = self.read();
        let (mut number, mut way) = (number, Vec::new());
        loop {
            let node = table.nodes.get(&number).ok_or_else(|| os(libc::ESTALE))?;
            if let Some(live) = &node.live {
                return Ok((Arc::clone(live), way));
            }
            let place = node.place.as_ref().filter(|_| way.len() < DEPTH).ok_or_else(|| os(libc::ESTALE))?;
            way.push((number, place.name.clone()));
            number = place.parent;
        }
    }

    /// A node was looked up by its name.
    fn found_again<F: FileSystem>(&self, fs: &F, number: u64, found: &Entry) -> io::Result<Arc<Live>> {
        let mut table = self.write();
        let node = table.nodes.get(&number);
        let live = match node {
            Some(Node { live: Some(live), references, .. }) => {
                // By another thread.
                if live.0 == found.inode {
                    references.fetch_add(1, Ordering::Relaxed);
                    return Ok(Arc::clone(live));
                }
                Some(Arc::clone(live))
            }
            Some(node) if node.could_be(found) => {
                self.live.fetch_add(1, Ordering::Relaxed);
                return table.revive(number, found.inode, 1).ok_or_else(|| os(libc::EBADF));
            }
            _ => None,
        };
        drop(table);
        fs.forget(nobody(), found.inode.into(), 1);
        live.ok_or_else(|| os(libc::ESTALE))
    }

    /// Notes what virtiofsd has found at a name, and opened so often, and puts the guest's number into it.
    pub(super) fn found<F: FileSystem>(
        &self,
        fs: &F,
        parent: u64,
        name: &CStr,
        entry: &mut Entry,
        open: usize,
    ) -> io::Result<()> {
        self.handles.fetch_add(u64::try_from(open).unwrap_or(0), Ordering::Relaxed);
        let live = entry.inode;
        {
            let table = self.read();
            if let Some(number) = table.known(live)
                && let Some(node) = table.nodes.get(&number)
                && (node.is_root || node.is_at(parent, name) || is_dots(name))
            {
                node.found_again();
                self.count_open(node, open);
                entry.inode = number;
                return Ok(());
            }
        }
        entry.inode = self.found_new(fs, parent, name, entry, open)?;
        Ok(())
    }

    fn found_new<F: FileSystem>(
        &self,
        fs: &F,
        parent: u64,
        name: &CStr,
        entry: &Entry,
        open: usize,
    ) -> io::Result<u64> {
        let mut table = self.write();
        if let Some(number) = table.known(entry.inode) {
            if let Some(node) = table.nodes.get(&number) {
                node.found_again();
                self.count_open(node, open);
            }
            if !is_dots(name) {
                table.place(number, parent, name);
            }
            self.settle(fs, table);
            return Ok(number);
        }
        // It was given back: under this name, or while it was looked up.
        let same = table.at(parent, name).filter(|_| !is_dots(name)).or(Some(entry.inode));
        if let Some(number) = same
            && let Some(node) = table.nodes.get(&number)
            && node.live.is_none()
            && node.could_be(entry)
        {
            node.given();
            self.count_open(node, open);
            self.live.fetch_add(1, Ordering::Relaxed);
            table.revive(number, entry.inode, 1);
            self.settle(fs, table);
            return Ok(number);
        }
        let candidates: Vec<u64> =
            table.given_back.get(&entry.attr.ino).into_iter().flatten().take(CANDIDATES).copied().collect();
        if !candidates.is_empty() {
            self.settle(fs, table);
            if let Some(number) = candidates.into_iter().find(|number| self.is_same(fs, *number, entry, open)) {
                return Ok(number);
            }
            table = self.write();
            // By another thread meanwhile.
            if let Some(number) = table.known(entry.inode) {
                if let Some(node) = table.nodes.get(&number) {
                    node.found_again();
                    self.count_open(node, open);
                }
                return Ok(number);
            }
        }
        if table.nodes.len() >= MOST || table.nodes.contains_key(&entry.inode) {
            drop(table);
            fs.forget(nobody(), entry.inode.into(), 1);
            return Err(os(libc::ENFILE));
        }
        let number = entry.inode;
        let node = Node::new(number, entry);
        self.count_open(&node, open);
        table.nodes.insert(number, node);
        self.live.fetch_add(1, Ordering::Relaxed);
        table.clock.push_back(number);
        if !is_dots(name) {
            table.place(number, parent, name);
        }
        self.settle(fs, table);
        Ok(number)
    }

    /// Whether a node that was given back is what was found, under another name. If so, it is that again.
    fn is_same<F: FileSystem>(&self, fs: &F, number: u64, entry: &Entry, open: usize) -> bool {
        let place = {
            let table = self.read();
            table
                .nodes
                .get(&number)
                .filter(|node| node.live.is_none() && node.could_be(entry))
                .and_then(|n| n.place.clone())
        };
        let Some(place) = place else { return false };
        let Ok(parent) = self.get(fs, place.parent) else { return false };
        let Ok(found) = fs.lookup(nobody(), parent.0.into(), &place.name) else { return false };
        if found.inode == entry.inode {
            let mut table = self.write();
            if let Some(node) = table.nodes.get(&number) {
                node.given();
                self.count_open(node, open);
                if node.live.is_some() {
                    node.references.fetch_add(2, Ordering::Relaxed);
                } else {
                    self.live.fetch_add(1, Ordering::Relaxed);
                    table.revive(number, entry.inode, 2);
                }
                return true;
            }
        }
        fs.forget(nobody(), found.inode.into(), 1);
        false
    }

    /// The guest forgets; whether the node is gone with it.
    pub(super) fn forget<F: FileSystem>(&self, fs: &F, number: u64, count: u64) {
        if number == ROOT_ID {
            return;
        }
        let mut table = self.write();
        let Some(node) = table.nodes.get_mut(&number) else { return };
        let lookups = node.lookups.get_mut();
        *lookups = lookups.saturating_sub(count);
        table.drop_unused(number);
        // A guest that looks up and forgets leaves traces here only.
        if table.clock.len() > table.nodes.len().saturating_mul(2).saturating_add(1024) {
            let Table { clock, nodes, .. } = &mut *table;
            clock.retain(|number| nodes.get(number).is_some_and(|node| node.live.is_some()));
        }
        self.settle(fs, table);
    }

    /// A name is no more.
    pub(super) fn removed<F: FileSystem>(&self, fs: &F, parent: u64, name: &CStr) {
        let mut table = self.write();
        if let Some(number) = table.at(parent, name) {
            table.displace(number);
        }
        self.settle(fs, table);
    }

    /// What had one name has another, or the two have been exchanged.
    pub(super) fn renamed<F: FileSystem>(&self, fs: &F, old: (u64, &CStr), new: (u64, &CStr), exchanged: bool) {
        let mut table = self.write();
        let (moved, there) = (table.at(old.0, old.1), table.at(new.0, new.1));
        if moved.is_some() && moved == there && !exchanged {
            // Two names of one file: rename(2) does nothing.
            return;
        }
        for number in [moved, there].into_iter().flatten() {
            // The directories stay: the guest has just named them.
            table.displace(number);
        }
        if let Some(number) = moved {
            table.place(number, new.0, new.1);
        }
        if exchanged && let Some(number) = there {
            table.place(number, old.0, old.1);
        }
        self.settle(fs, table);
    }

    /// Makes room for an open file and its inode. A quarter is left to inodes that come and go: with all of it open,
    /// the guest could not even name the files that it knows.
    pub(super) fn make_room_to_open<F: FileSystem>(&self, fs: &F) -> io::Result<()> {
        let (handles, open) = (self.handles.load(Ordering::Relaxed), self.open.load(Ordering::Relaxed));
        if handles.saturating_add(open).saturating_add(2) > self.share() {
            return Err(os(libc::ENFILE));
        }
        self.make_room(fs, 2);
        Ok(())
    }

    /// What one kind of descriptors may have.
    fn share(&self) -> u64 {
        self.limit.saturating_sub(self.limit / 4)
    }

    /// The guest has opened a file.
    pub(super) fn opened(&self, number: u64) {
        self.handles.fetch_add(1, Ordering::Relaxed);
        if let Some(node) = self.read().nodes.get(&number) {
            self.count_open(node, 1);
        }
    }

    fn count_open(&self, node: &Node, open: usize) {
        if open > 0 && node.handles.fetch_add(open, Ordering::Relaxed) == 0 {
            self.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The guest has closed a file.
    pub(super) fn closed(&self, number: u64) {
        fewer(&self.handles);
        if let Some(node) = self.read().nodes.get(&number) {
            let less = |handles: usize| handles.checked_sub(1);
            if node.handles.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(1) {
                fewer(&self.open);
            }
        }
    }

    /// How a file was when the guest opened it last; gone with the node.
    pub(super) fn with_stamp<R>(&self, number: u64, f: impl FnOnce(&mut Option<Stamp>) -> R) -> Option<R> {
        Some(f(&mut self.write().nodes.get_mut(&number)?.stamp))
    }

    /// Gives descriptors back, so that there are so many. A quarter is for open files: it is not taken by inodes.
    pub(super) fn make_room<F: FileSystem>(&self, fs: &F, wanted: u64) {
        let live = self.live.load(Ordering::Relaxed);
        let all = live.saturating_add(self.handles.load(Ordering::Relaxed)).saturating_add(wanted);
        let over = live.saturating_add(wanted).saturating_sub(self.share()).max(all.saturating_sub(self.limit));
        if over == 0 {
            return;
        }
        self.give_back(fs, over.saturating_add(BATCH.min(self.limit / 16)));
    }

    fn give_back<F: FileSystem>(&self, fs: &F, count: u64) {
        let mut table = self.write();
        let (mut left, mut steps) = (count, table.clock.len().saturating_mul(2).min(LOOKED_AT));
        while left > 0 && steps > 0 {
            steps = steps.saturating_sub(1);
            let Some(number) = table.clock.pop_front() else { break };
            let Some(node) = table.nodes.get(&number) else { continue };
            if node.live.is_none() {
                continue;
            }
            // A second chance.
            if node.used.swap(false, Ordering::Relaxed) || !node.is_idle() {
                table.clock.push_back(number);
                continue;
            }
            let ino = node.ino;
            table.release(number);
            table.given_back.entry(ino).or_default().push(number);
            left = left.saturating_sub(1);
        }
        self.settle(fs, table);
    }
}

/// A directory itself, or the one above it: no name to find it by.
fn is_dots(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}

/// One less; none where a new session has started to count anew.
fn fewer(count: &AtomicU64) {
    let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
}

fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
