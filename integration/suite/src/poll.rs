//! Waiting for what has no event to wait for.

use std::{
    thread,
    time::{Duration, Instant},
};

const INTERVAL: Duration = Duration::from_millis(10);

/// Asks until there is an answer; `None` when the deadline has passed without one.
pub fn try_until<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(INTERVAL);
    }
}

/// Asks until there is an answer, and fails the test when the deadline has passed without one.
#[track_caller]
pub fn until<T>(what: &str, deadline: Duration, ask: impl FnMut() -> Option<T>) -> T {
    match try_until(deadline, ask) {
        Some(answer) => answer,
        None => panic!("{what}: not within {} s", deadline.as_secs()),
    }
}
