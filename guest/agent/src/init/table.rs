//! Every process that the shim knows about, kept over the death of a server.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use crate::protocol::{self, Exit, Key, Stdio, Stream};

/// Descriptors of one stream, kept so that the next server can go on with them.
#[derive(Debug)]
pub struct Kept<F = OwnedFd> {
    /// Which.
    pub stream: Stream,
    /// The connection to the host.
    pub host: F,
    /// The agent's end of the process's pipe, or the pseudo terminal's master.
    pub process: F,
}

/// A process.
#[derive(Debug)]
pub struct Entry<F = OwnedFd> {
    /// Its pid; `None` while it is being created.
    pub pid: Option<i32>,
    /// Container only: whether it was started.
    pub started: bool,
    /// Whether the server that asked for it died before it was there.
    pub abandoned: bool,
    /// How it ended, where it has.
    pub exit: Option<Exit>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// What is left of its stdio.
    pub kept: Vec<Kept<F>>,
}

/// The processes, containers before their execs.
#[derive(Debug)]
pub struct Table<F = OwnedFd> {
    entries: BTreeMap<Key, Entry<F>>,
    exits: u64,
}

impl<F> Default for Table<F> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), exits: 0 }
    }
}

impl<F> Table<F> {
    /// Whether there is such a process.
    pub fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    /// The process.
    pub fn get_mut(&mut self, key: &Key) -> Option<&mut Entry<F>> {
        self.entries.get_mut(key)
    }

    /// Adds a process.
    pub fn insert(&mut self, key: Key, entry: Entry<F>) {
        self.entries.insert(key, entry);
    }

    /// All processes.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Entry<F>)> {
        self.entries.iter()
    }

    /// Removes a process, a container with its execs.
    pub fn forget(&mut self, key: &Key) {
        if key.exec.is_empty() {
            self.entries.retain(|k, _| k.container != key.container);
        } else {
            self.entries.remove(key);
        }
    }

    /// Notes that a process has ended; `None` where it is none of the table's.
    pub fn ended(&mut self, pid: i32, status: u32, at_ns: u64) -> Option<(Key, Exit)> {
        let (key, entry) = self.entries.iter_mut().find(|(_, e)| e.pid == Some(pid) && e.exit.is_none())?;
        let exit = Exit { status, at_ns, number: self.exits };
        self.exits = self.exits.saturating_add(1);
        entry.exit = Some(exit);
        Some((key.clone(), exit))
    }

    /// The pid to signal: of a process that is there and was not reaped yet, so that it cannot be another's.
    pub fn living(&self, key: &Key) -> Option<i32> {
        self.entries.get(key).filter(|e| e.exit.is_none()).and_then(|e| e.pid)
    }

    /// Drops what is kept of one stream.
    pub fn close_stream(&mut self, key: &Key, stream: Stream) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.kept.retain(|kept| kept.stream != stream);
        }
    }
}

impl<F> Entry<F> {
    /// A process that is being created.
    pub fn new(terminal: bool, kept: Vec<Kept<F>>) -> Self {
        Self { pid: None, started: false, abandoned: false, exit: None, terminal, kept }
    }

    /// As it is reported to a server; `None` while it is being created.
    pub fn report(&self, key: &Key) -> Option<protocol::Process> {
        let pid = self.pid?;
        Some(protocol::Process {
            key: key.clone(),
            pid,
            started: self.started,
            abandoned: self.abandoned,
            exit: self.exit,
            stdio: Stdio { terminal: self.terminal, streams: self.kept.iter().map(|k| k.stream).collect() },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(container: &str, exec: &str) -> Key {
        Key { container: container.into(), exec: exec.into() }
    }

    fn entry(pid: i32) -> Entry<u32> {
        let kept = vec![
            Kept { stream: Stream::Stdin, host: 1, process: 2 },
            Kept { stream: Stream::Stdout, host: 3, process: 4 },
        ];
        Entry { pid: Some(pid), ..Entry::new(false, kept) }
    }

    #[test]
    fn exits_are_counted_and_belong_to_the_living() {
        let mut table = Table::default();
        table.insert(key("a", ""), entry(10));
        table.insert(key("a", "x"), entry(11));
        assert_eq!(table.living(&key("a", "")), Some(10));
        assert_eq!(table.ended(12, 0, 0), None);
        let (who, exit) = table.ended(11, 137, 5).unwrap();
        assert_eq!((who, exit.status, exit.number), (key("a", "x"), 137, 0));
        // The pid may be another process's by now.
        assert_eq!(table.ended(11, 0, 6), None);
        assert_eq!(table.living(&key("a", "x")), None);
        assert_eq!(table.ended(10, 0, 7).unwrap().1.number, 1);
    }

    #[test]
    fn a_container_is_forgotten_with_its_execs() {
        let mut table = Table::default();
        for (container, exec) in [("a", ""), ("a", "x"), ("a", "y"), ("b", "")] {
            table.insert(key(container, exec), entry(1));
        }
        table.forget(&key("a", "x"));
        assert_eq!(table.iter().count(), 3);
        table.forget(&key("a", ""));
        assert_eq!(table.iter().map(|(k, _)| k.clone()).collect::<Vec<_>>(), [key("b", "")]);
    }

    #[test]
    fn a_closed_stream_is_not_reported() {
        let mut table = Table::default();
        table.insert(key("a", ""), entry(1));
        table.close_stream(&key("a", ""), Stream::Stdin);
        let (k, e) = table.iter().next().unwrap();
        assert_eq!(e.report(k).unwrap().stdio.streams, [Stream::Stdout]);
        assert_eq!(Entry::<u32>::new(true, Vec::new()).report(k), None);
    }
}
