//! Rate limit for log lines that a guest can trigger.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::sync::lock;

/// The length of a window.
const WINDOW: Duration = Duration::from_secs(10);

/// So many lines in each window of ten seconds; more are counted.
#[derive(Debug)]
pub struct Limit {
    most: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Instant,
    admitted: u32,
    left_out: u64,
}

impl Limit {
    /// For so many lines in ten seconds.
    pub fn new(most: u32) -> Self {
        Self { most, state: Mutex::new(State { since: Instant::now(), admitted: 0, left_out: 0 }) }
    }

    /// Whether one more line may be written, and how many were left out before it.
    pub fn admit(&self) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.since.elapsed() >= WINDOW {
            (state.since, state.admitted) = (Instant::now(), 0);
        }
        if state.admitted >= self.most {
            state.left_out = state.left_out.saturating_add(1);
            return None;
        }
        state.admitted = state.admitted.saturating_add(1);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_the_limit_is_counted() {
        let limit = Limit::new(2);
        assert_eq!([limit.admit(), limit.admit(), limit.admit(), limit.admit()], [Some(0), Some(0), None, None]);
        lock(&limit.state).since -= WINDOW;
        assert_eq!([limit.admit(), limit.admit(), limit.admit()], [Some(2), Some(0), None]);
    }

    #[test]
    fn a_whole_window_is_admitted_up_to_the_limit() {
        const LINES: u32 = 200;
        let limit = Limit::new(LINES);
        assert!((0..LINES).all(|_| limit.admit() == Some(0)));
        assert_eq!((limit.admit(), limit.admit()), (None, None));
        lock(&limit.state).since -= WINDOW;
        assert_eq!((limit.admit(), limit.admit()), (Some(2), Some(0)));
    }
}
