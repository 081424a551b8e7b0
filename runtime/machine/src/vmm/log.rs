//! Log lines on stderr, which the shim forwards: `level=warn sandbox=default/x msg="what happened" key=value`.
//!
//! What a guest does can make us log, so the rate is bounded for the whole process; how many lines were left out is
//! said in the next one.

use std::{
    fmt::{self, Write as _},
    io::Write as _,
    sync::Arc,
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, filter::LevelFilter, layer::Context, layer::SubscriberExt};
use vz_sys::rate::Limit;

/// Lines in ten seconds.
const LINES: u32 = 200;

/// Installs it for tracing, and for what libraries send to `log` from warnings on. Only the first call has an effect.
pub(super) fn install(sandbox: &str, level: &str) {
    let level = level.parse().unwrap_or(LevelFilter::INFO);
    let lines = Arc::new(Lines { sandbox: sandbox.to_owned(), limit: Limit::new(LINES) });
    let subscriber = tracing_subscriber::registry().with(Output(Arc::clone(&lines)).with_filter(level));
    let first = tracing::subscriber::set_global_default(subscriber).is_ok();
    if first && log::set_boxed_logger(Box::new(Output(lines))).is_ok() {
        log::set_max_level(if level >= LevelFilter::WARN { log::LevelFilter::Warn } else { log::LevelFilter::Error });
    }
}

struct Lines {
    sandbox: String,
    limit: Limit,
}

impl Lines {
    fn write(&self, level: &str, fields: &str) {
        let Some(left_out) = self.limit.admit() else { return };
        let mut line = format!("level={level} sandbox={}{fields}", self.sandbox);
        if left_out > 0 {
            let _ = write!(line, " left_out={left_out}");
        }
        line.push('\n');
        // One write, so that lines of threads do not mix. Nowhere to say that logging failed.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

struct Output(Arc<Lines>);

impl<S: Subscriber> Layer<S> for Output {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        self.0.write(level, &format!(" msg={}{}", quote(&fields.message), fields.others));
    }
}

impl log::Log for Output {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if log::Log::enabled(self, record.metadata()) {
            let level = if record.level() == log::Level::Error { "error" } else { "warn" };
            let fields = format!(" msg={} from={}", quote(&record.args().to_string()), record.target());
            self.0.write(level, &fields);
        }
    }

    fn flush(&self) {}
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            let _ = write!(self.others, " {}={}", field.name(), quote(&format!("{value:?}")));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let _ = write!(self.others, " {}={}", field.name(), quote(value));
    }
}

/// The value as it is, or quoted and escaped where it would not stay one.
fn quote(value: &str) -> String {
    let plain = !value.is_empty() && value.chars().all(|c| c.is_ascii_graphic() && c != '"' && c != '=' && c != '\\');
    if plain { value.to_owned() } else { format!("{value:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_one() {
        assert_eq!(quote("a/b"), "a/b");
        assert_eq!(quote(""), "\"\"");
        assert_eq!(quote("a b"), "\"a b\"");
        assert_eq!(quote("a\nlevel=error"), "\"a\\nlevel=error\"");
    }
}
