//! What the guest has to say: its log records, and its words in lines of our own. All of it is cut and budgeted.

use std::time::Instant;

use tokio::net::UnixStream;
use vz_proto::{LogRecord, frame};

use crate::limit::Budget;

/// What a line of the log has around the guest's own words.
const LINE_OVERHEAD: u64 = 200;
/// Longest id that a guest's word is quoted with, in bytes; containerd's own limit is 76.
pub const ID: usize = 128;
/// Longest log message, in bytes.
const LOG_LINE: usize = 4096;

/// Passes the guest's log on until its connection ends. `budget` is the sandbox's, however many connections it makes;
/// while there is none the connection is not read, and `throttled` is called.
pub async fn forward(mut stream: UnixStream, budget: &Budget, throttled: impl Fn()) -> Result<(), frame::Error> {
    loop {
        let Some(record) = frame::read::<LogRecord>(&mut stream).await? else { return Ok(()) };
        let (container, message) = (cut(&record.container_id, ID), bounded(&record.message));
        let characters = message.escape_debug().count().saturating_add(container.escape_debug().count());
        let bytes = u64::try_from(characters).unwrap_or(u64::MAX).saturating_add(LINE_OVERHEAD);
        let mut waited = false;
        while let Err(wait) = budget.take(bytes, Instant::now()) {
            if !std::mem::replace(&mut waited, true) {
                throttled();
            }
            tokio::time::sleep(wait).await;
        }
        match record.level.as_str() {
            "error" => tracing::error!(target: "guest", container, "{message}"),
            "warn" => tracing::warn!(target: "guest", container, "{message}"),
            "info" => tracing::info!(target: "guest", container, "{message}"),
            _ => tracing::debug!(target: "guest", container, "{message}"),
        }
    }
}

/// A guest's text, cut to what a log line may have.
pub fn bounded(text: &str) -> &str {
    cut(text, LOG_LINE)
}

/// A guest's text, cut to so many bytes.
pub fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}
