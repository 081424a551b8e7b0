//! The host's log: lines as frames on a connection of their own.

use tokio::sync::mpsc;
use tracing::{Level, level_filters::LevelFilter};
use vz_proto::{LogRecord, frame};

use super::{kmsg, vsock};
use crate::{
    log::{self, Log, Sink},
    text,
};

/// Most lines that wait for the connection; what comes on top of that is counted and dropped.
const QUEUE: usize = 1024;

/// Points the log to the host, after what the kernel's own log holds where that is wanted.
pub fn start(log: &Log, level: LevelFilter, kernel_log: bool) {
    let (send, receive) = mpsc::channel(QUEUE);
    log.redirect(level, Remote { queue: send, lost: 0 });
    let log = log.clone();
    tokio::spawn(async move {
        if let Err(why) = forward(receive, kernel_log).await {
            log.redirect(level, log::Kernel);
            tracing::warn!("log to the host: {why}");
        }
    });
}

async fn forward(mut lines: mpsc::Receiver<LogRecord>, kernel_log: bool) -> Result<(), String> {
    let mut host = vsock::connect(vz_proto::LOG_PORT).await.map_err(|e| text::chain(&e))?;
    if kernel_log {
        // The lines that could be read are worth having, and so is an end of them.
        let (records, failed) = kmsg::records();
        for record in records {
            frame::write(&mut host, &record).await.map_err(|e| text::chain(&e))?;
        }
        if let Some(e) = failed {
            tracing::warn!("read the kernel's log: {e}");
        }
    }
    while let Some(line) = lines.recv().await {
        frame::write(&mut host, &line).await.map_err(|e| text::chain(&e))?;
    }
    Ok(())
}

struct Remote {
    queue: mpsc::Sender<LogRecord>,
    lost: u64,
}

impl Sink for Remote {
    fn line(&mut self, level: Level, container: &str, message: &str) {
        let record = record(level, container, message, self.lost);
        self.lost = match self.queue.try_send(record) {
            Ok(()) => 0,
            Err(_) => self.lost.saturating_add(1),
        };
    }
}

fn record(level: Level, container: &str, message: &str, lost: u64) -> LogRecord {
    // Well below the limit of a frame, at a character's boundary.
    let end = message.floor_char_boundary(16 * 1024);
    let mut message = message.get(..end).unwrap_or_default().to_owned();
    if lost > 0 {
        message = format!("({lost} lines lost) {message}");
    }
    LogRecord { level: log::name(level).into(), message, container_id: container.into(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_do_not_fit_are_counted() {
        let (send, mut receive) = mpsc::channel(1);
        let mut remote = Remote { queue: send, lost: 0 };
        for message in ["a", "b", "c"] {
            remote.line(Level::INFO, "", message);
        }
        assert_eq!(receive.try_recv().unwrap().message, "a");
        remote.line(Level::WARN, "c1", "d");
        let last = receive.try_recv().unwrap();
        assert_eq!((last.message.as_str(), last.level.as_str()), ("(2 lines lost) d", "warn"));
        assert_eq!(last.container_id, "c1");
    }

    #[test]
    fn long_lines_are_cut() {
        assert_eq!(record(Level::INFO, "", &"ä".repeat(20_000), 0).message.len(), 16 * 1024);
    }
}
