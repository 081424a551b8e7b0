//! Exits in their order, to whoever listens.

use tokio::sync::mpsc;
use vz_proto::{Event, OutOfMemory, ProcessExit};

use crate::protocol::{Exit, Key};

/// The exits of all processes that were not deleted, and the listeners.
///
/// An exit that comes before the answer to the call that made the process waits for it, and later ones wait behind it.
#[derive(Debug, Default)]
pub struct Exits {
    records: Vec<Record>,
    /// Processes whose making has not been answered.
    unanswered: Vec<Key>,
    /// Number of the first exit that has not been told.
    told: u64,
    listeners: Vec<mpsc::UnboundedSender<Event>>,
}

#[derive(Debug)]
struct Record {
    key: Key,
    pid: i32,
    exit: Exit,
}

impl Record {
    fn event(&self) -> Event {
        let mut event = Event::new();
        event.set_exit(ProcessExit {
            container_id: self.key.container.clone(),
            exec_id: self.key.exec.clone(),
            pid: self.pid.unsigned_abs(),
            status: self.exit.status,
            exited_at_ns: self.exit.at_ns,
            ..Default::default()
        });
        event
    }
}

impl Exits {
    /// Adds an exit, in the order of their numbers, and tells it.
    pub fn push(&mut self, key: Key, pid: i32, exit: Exit) {
        let at = self.records.partition_point(|r| r.exit.number < exit.number);
        self.records.insert(at, Record { key, pid, exit });
        self.tell();
    }

    /// A process is being made: hold its exit back.
    pub fn hold(&mut self, key: Key) {
        self.unanswered.push(key);
    }

    /// The call that made it has its answer.
    pub fn release(&mut self, key: &Key) {
        self.unanswered.retain(|k| k != key);
        self.tell();
    }

    /// A new listener hears first of every exit that was told before.
    pub fn listen(&mut self) -> mpsc::UnboundedReceiver<Event> {
        let (send, receive) = mpsc::unbounded_channel();
        for record in self.records.iter().filter(|r| r.exit.number < self.told) {
            // The receiver is right here.
            let _ = send.send(record.event());
        }
        self.listeners.push(send);
        receive
    }

    /// A process of the container was killed for want of memory.
    pub fn out_of_memory(&mut self, container: &str) {
        let mut event = Event::new();
        event.set_oom(OutOfMemory { container_id: container.into(), ..Default::default() });
        self.send(&event);
    }

    /// Forgets exits.
    pub fn forget(&mut self, which: impl Fn(&Key) -> bool) {
        self.records.retain(|r| !which(&r.key));
        self.tell();
    }

    fn tell(&mut self) {
        let from = self.records.partition_point(|r| r.exit.number < self.told);
        let mut events = Vec::new();
        for record in self.records.iter().skip(from).take_while(|r| !self.unanswered.contains(&r.key)) {
            events.push(record.event());
            self.told = record.exit.number.saturating_add(1);
        }
        for event in events {
            self.send(&event);
        }
    }

    fn send(&mut self, event: &Event) {
        // A listener that is gone is forgotten.
        self.listeners.retain(|l| l.send(event.clone()).is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        Key { container: id.into(), exec: String::new() }
    }

    fn exit(number: u64) -> Exit {
        Exit { status: 0, at_ns: 0, number }
    }

    fn heard(receiver: &mut mpsc::UnboundedReceiver<Event>) -> Vec<String> {
        let mut ids = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            ids.push(if event.has_exit() { event.exit().container_id.clone() } else { "oom".into() });
        }
        ids
    }

    #[test]
    fn each_listener_hears_every_exit_once_and_in_order() {
        let mut exits = Exits::default();
        let mut first = exits.listen();
        exits.push(key("a"), 1, exit(0));
        exits.push(key("b"), 2, exit(1));
        let mut second = exits.listen();
        exits.out_of_memory("c");
        exits.push(key("c"), 3, exit(2));
        assert_eq!(heard(&mut first), ["a", "b", "oom", "c"]);
        assert_eq!(heard(&mut second), ["a", "b", "oom", "c"]);
        exits.forget(|k| k.container == "a");
        assert_eq!(heard(&mut exits.listen()), ["b", "c"]);
    }

    #[test]
    fn an_exit_waits_for_the_answer_and_those_behind_it_too() {
        let mut exits = Exits::default();
        let mut listener = exits.listen();
        exits.hold(key("a"));
        exits.push(key("a"), 1, exit(0));
        exits.push(key("b"), 2, exit(1));
        assert_eq!(heard(&mut listener), Vec::<String>::new());
        assert_eq!(heard(&mut exits.listen()), Vec::<String>::new());
        exits.release(&key("a"));
        assert_eq!(heard(&mut listener), ["a", "b"]);
    }

    #[test]
    fn exits_of_before_a_restart_are_told_in_their_order() {
        let mut exits = Exits::default();
        exits.push(key("b"), 2, exit(7));
        exits.push(key("a"), 1, exit(3));
        assert_eq!(heard(&mut exits.listen()), ["a", "b"]);
    }
}
