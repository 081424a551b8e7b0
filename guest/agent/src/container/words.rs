//! What libcontainer logs, which is often the better half of its errors: its init process reports an error's first
//! line only, and logs the cause.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use tracing::{Level, level_filters::LevelFilter};

use crate::log::{self, Log, Sink};

/// Most bytes of log that are read of one call.
const READ: u64 = 256 * 1024;
/// Most bytes of log that are passed on: with an error's text they must fit into a message, whatever JSON makes of
/// them.
const KEPT: usize = 12 * 1024;
/// Most bytes of one line, and of an error's text.
const LINE: usize = 2 * 1024;
/// Most lines that are added to an error.
const LINES: usize = 3;

/// Collects what this process and its forks log.
#[derive(Debug)]
pub struct Words(UnixStream);

impl Words {
    /// Points the log here: errors, and everything that the log's level asks for from debug on. What libcontainer says
    /// between these is about itself, and the same each time.
    pub fn listen(log: &Log) -> io::Result<Self> {
        // Not a pipe: writing to one whose reader is gone is a signal, and init may log when the worker has exited.
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        writer.set_nonblocking(true)?;
        let level = if log.level() >= LevelFilter::DEBUG { log.level() } else { LevelFilter::ERROR };
        log.redirect(level, Stream(writer));
        Ok(Self(reader))
    }

    /// What was logged so far: levels and lines.
    pub fn said(&self) -> Vec<(String, String)> {
        let mut bytes = Vec::new();
        // Ends with "would block", as the writer is open.
        let _ = (&self.0).take(READ).read_to_end(&mut bytes);
        selected(&String::from_utf8_lossy(&bytes))
    }
}

struct Stream(UnixStream);

impl Sink for Stream {
    fn line(&mut self, level: Level, _: &str, message: &str) {
        // One write, so that lines of several processes do not mix. What does not fit is lost.
        let line = format!("{}\t{}\n", log::name(level), message.replace('\n', " "));
        let _ = self.0.write(line.as_bytes());
    }
}

/// Levels and lines, in their order: errors before all, then the others while there is room.
fn selected(text: &str) -> Vec<(String, String)> {
    let lines: Vec<_> = text.lines().filter_map(|l| l.split_once('\t')).map(|(level, l)| (level, cut(l))).collect();
    let mut room = KEPT;
    let mut take = |line: &str| {
        let fits = line.len() <= room;
        room = room.saturating_sub(line.len());
        fits
    };
    let mut kept: Vec<_> = lines.iter().map(|(level, line)| *level == "error" && take(line)).collect();
    for (kept, (level, line)) in kept.iter_mut().zip(&lines) {
        *kept |= *level != "error" && take(line);
    }
    lines.iter().zip(kept).filter(|(_, kept)| *kept).map(|((a, b), _)| ((*a).into(), (*b).into())).collect()
}

/// The beginning of a text that may be too long.
pub fn cut(text: &str) -> &str {
    text.get(..text.floor_char_boundary(LINE)).unwrap_or_default()
}

/// What libcontainer logs where it passes an error on. What it logged before that is the cause.
const PASSED_ON: [&str; 5] = [
    "failed to initialize container process",
    "failed to run intermediate process",
    "failed to wait for init ready",
    "failed to run container process",
    "failed to execute payload",
];

/// Adds to an error the errors that were logged before it was passed on.
pub fn explain(error: &str, log: &[(String, String)]) -> String {
    let mut text = error.to_owned();
    let errors = log.iter().filter(|(level, _)| level == "error").map(|(_, line)| line.as_str());
    for line in errors.take_while(|line| !PASSED_ON.iter().any(|p| line.starts_with(p))).take(LINES) {
        if !text.contains(line) {
            text.push_str("; ");
            text.push_str(line);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_there_at_once() {
        let (reader, writer) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        let mut sink = Stream(writer);
        let words = Words(reader);
        assert_eq!(words.said(), []);
        sink.line(Level::ERROR, "", "no such\nfile");
        sink.line(Level::INFO, "", "tab\there");
        let wanted = [("error".to_owned(), "no such file".to_owned()), ("info".into(), "tab\there".into())];
        assert_eq!(words.said(), wanted);
    }

    #[test]
    fn errors_outweigh_everything_else() {
        let long = "x".repeat(1000);
        let text: String = (0..50).map(|_| format!("debug\t{long}\n")).collect::<String>() + "error\tcause\n";
        let kept = selected(&text);
        assert_eq!(kept.len(), 13);
        assert_eq!(kept.last(), Some(&("error".to_owned(), "cause".to_owned())));
        assert_eq!(selected(&format!("error\t{}", "y".repeat(9999)))[0].1.len(), LINE);
    }

    #[test]
    fn errors_are_explained_by_what_was_logged_before() {
        let log: Vec<_> = [
            ("info", "x"),
            ("error", "mount: EINVAL"),
            ("error", "failed to initialize container process: failed to prepare rootfs"),
            ("error", "c"),
        ]
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .into();
        assert_eq!(explain("failed to prepare rootfs", &log), "failed to prepare rootfs; mount: EINVAL");
        assert_eq!(explain("plain", &log[2..]), "plain");
    }
}
