//! Log lines, from `tracing` to wherever the process has its log.
//!
//! One subscriber for the whole life of a process and its forks: each child points it to a place of its own.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::Write as _,
    sync::{Arc, Mutex},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
};
use vz_sys::sync::lock;

/// Where lines go. Must not block and must not log.
pub trait Sink: Send {
    /// Takes one line, without its end, about a container or, where that is empty, the VM.
    fn line(&mut self, level: Level, container: &str, message: &str);
}

/// Handle of the log, to point it elsewhere.
#[derive(Clone)]
pub struct Log(Arc<Mutex<Shared>>);

struct Shared {
    level: LevelFilter,
    sink: Box<dyn Sink>,
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

/// Makes `sink` the log of this process, at level info.
pub fn install(sink: impl Sink + 'static) -> Log {
    let log = Log(Arc::new(Mutex::new(Shared { level: LevelFilter::INFO, sink: Box::new(sink) })));
    // Fails only where there is one already, and main calls this once.
    let _ = tracing::subscriber::set_global_default(log.clone());
    log
}

impl Log {
    /// Sends lines elsewhere from now on.
    pub fn redirect(&self, level: LevelFilter, sink: impl Sink + 'static) {
        let mut shared = lock(&self.0);
        shared.level = level;
        shared.sink = Box::new(sink);
        drop(shared);
        tracing::callsite::rebuild_interest_cache();
    }

    /// Sets the lowest level that is logged.
    pub fn set_level(&self, level: LevelFilter) {
        lock(&self.0).level = level;
        tracing::callsite::rebuild_interest_cache();
    }

    /// The lowest level that is logged.
    pub fn level(&self) -> LevelFilter {
        lock(&self.0).level
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level())
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let Line { message, fields, container } = line;
        let level = *event.metadata().level();
        let mut shared = lock(&self.0);
        shared.sink.line(level, &container, &(message + &fields));
    }

    // Nothing here uses spans.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
    container: String,
}

// Writing to a string cannot fail.
impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message.push_str(value),
            "container" => self.container.push_str(value),
            name => {
                let _ = write!(self.fields, " {name}={value}");
            }
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

/// The kernel's log, and so the console for what is bad enough: where PID 1 logs to.
#[derive(Debug)]
pub struct Kernel;

impl Sink for Kernel {
    fn line(&mut self, level: Level, container: &str, message: &str) {
        let priority = match level {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        // A line that cannot be logged has nowhere else to go.
        if let Ok(mut kmsg) = File::options().write(true).open("/dev/kmsg") {
            let about = if container.is_empty() { String::new() } else { format!("{container}: ") };
            let _ = kmsg.write_all(format!("<{priority}>vz-agent: {about}{message}").as_bytes());
        }
    }
}

/// A level's name, as the host writes it.
pub fn name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        _ => "trace",
    }
}

/// A level by its name; info where there is no such level.
pub fn level(name: &str) -> LevelFilter {
    match name {
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => LevelFilter::INFO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<String>>>);
    impl Sink for Kept {
        fn line(&mut self, level: Level, container: &str, message: &str) {
            self.0.lock().unwrap().push(format!("{} {container} {message}", name(level)));
        }
    }

    #[test]
    fn lines_have_their_level_message_and_fields() {
        let kept = Kept::default();
        let log = Log(Arc::new(Mutex::new(Shared { level: LevelFilter::INFO, sink: Box::new(kept.clone()) })));
        tracing::subscriber::with_default(log, || {
            tracing::warn!(pid = 3, name = "a b", container = "c1", "it {}", "went wrong");
            tracing::debug!("not this");
        });
        assert_eq!(*kept.0.lock().unwrap(), ["warn c1 it went wrong pid=3 name=a b"]);
    }

    #[test]
    fn levels_have_names() {
        for filter in ["error", "warn", "info", "debug", "trace"] {
            assert_eq!(level(filter).into_level().map(name), Some(filter));
        }
    }
}
