//! containerd's events, as `ctr events` tells them.

use std::time::Duration;

use serde_json::Value;

use crate::{Lab, command::Running, lab::BUSYBOX, poll::try_until};

/// An event.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its topic, without `/tasks/` or `/containers/` cut off.
    pub topic: String,
    /// What it says.
    pub body: Value,
}

impl Event {
    fn parse(line: &str) -> Option<Self> {
        // 2026-01-31 12:00:00.123 +0000 UTC default /tasks/create {"container_id":...}
        let at = line.find(" /")?;
        let (topic, body) = line[at + 1..].split_once(' ')?;
        Some(Self { topic: topic.to_owned(), body: serde_json::from_str(body).ok()? })
    }

    /// A field, empty where it is not there.
    pub fn text(&self, field: &str) -> &str {
        self.body[field].as_str().unwrap_or_default()
    }

    /// A number, 0 where it is not there.
    pub fn number(&self, field: &str) -> u64 {
        self.body[field].as_u64().unwrap_or_default()
    }
}

/// The topics of events, with the process's id where it is not the container's.
pub fn story(events: &[Event]) -> Vec<String> {
    let line = |event: &Event| {
        let topic = event.topic.trim_start_matches("/tasks/");
        let exec = ["exec_id", "id"].iter().map(|field| event.text(field)).find(|id| !id.is_empty());
        match exec {
            Some(exec) if exec != event.text("container_id") => format!("{topic} {exec}"),
            _ => topic.to_owned(),
        }
    };
    events.iter().map(line).collect()
}

/// Listens to events from its start on.
#[derive(Debug)]
pub struct Recorder(Running);

impl Recorder {
    /// Starts to listen; returns once it does.
    #[track_caller]
    pub fn start(lab: &Lab) -> Self {
        let recorder = Self(lab.ctr(&["events"]).deadline(3600).start());
        // Nothing says that it listens but an event: a label is changed until one comes.
        let mut n = 0;
        let heard = try_until(Duration::from_secs(30), || {
            n += 1;
            lab.ctr(&["images", "label", BUSYBOX, &format!("vz.test/listening={n}")]).run().ok();
            try_until(Duration::from_millis(200), || recorder.0.stdout().contains("/images/update").then_some(()))
        });
        assert!(heard.is_some(), "ctr events hears nothing: {}", recorder.0.stderr());
        recorder
    }

    /// The events about a container's tasks so far.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let all = self.0.stdout();
        let whole = all.rfind('\n').map_or("", |end| &all[..end]);
        let about = |event: &Event| event.topic.starts_with("/tasks/") && event.text("container_id") == container;
        whole.lines().filter_map(Event::parse).filter(about).collect()
    }

    /// Waits for a container's event.
    #[track_caller]
    pub fn expect(&self, container: &str, topic: &str) -> Event {
        self.expect_where(container, topic, |_| true)
    }

    /// Waits for a container's event of which this is true.
    #[track_caller]
    pub fn expect_where(&self, container: &str, topic: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let found = try_until(Duration::from_secs(30), || {
            self.of(container).into_iter().find(|event| event.topic == topic && wanted(event))
        });
        found.unwrap_or_else(|| panic!("no event {topic} of {container}: {:?}", self.of(container)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ctr_events_are_read() {
        let line = r#"2026-11-22 19:05:49.6 +0000 UTC default /tasks/exit {"container_id":"x","exit_status":137}"#;
        let event = Event::parse(line).unwrap();
        assert_eq!((event.topic.as_str(), event.text("container_id")), ("/tasks/exit", "x"));
        assert_eq!((event.number("exit_status"), event.number("no_such_field")), (137, 0));
        assert!(Event::parse("no event").is_none());
    }
}
