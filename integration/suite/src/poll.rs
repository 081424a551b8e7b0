//! Waiting for what has no event to wait for.

use std::{
    env, thread,
    time::{Duration, Instant},
};

const INTERVAL: Duration = Duration::from_millis(10);

/// How many times longer than elsewhere everything may take on this machine.
pub fn patience() -> u32 {
    let text = env::var("VZ_PATIENCE").ok().filter(|text| !text.is_empty());
    let factor = text.map_or(Ok(1), |text| text.parse().map_err(|_| text));
    factor.unwrap_or_else(|text| panic!("VZ_PATIENCE={text:?} is not a whole number"))
}

/// A time that is meant for machines that are not emulated, as it is on this one.
pub fn patiently(time: Duration) -> Duration {
    time * patience()
}

/// Asks until there is an answer; `None` when the deadline, [`patiently`], has passed without one.
pub fn try_until<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patiently(deadline);
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
        None => panic!("{what}: not within {} s", patiently(deadline).as_secs()),
    }
}
