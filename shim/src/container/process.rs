//! A process of a container: its state, what the guest may still say of it, and its streams.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use oci_spec::runtime::Process as ProcessSpec;
use tokio::{sync::watch, time::Instant};

use super::{
    said::{Exit, Said},
    stdio::{Copies, Stdio},
};
use vz_sys::sync::lock;

/// The state of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It exists, and does not run yet.
    Created,
    /// It runs.
    Running,
    /// It has ended.
    Stopped(Exit),
}

impl State {
    /// Its name, as in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A container's init or an exec process.
#[derive(Debug)]
pub struct Process {
    /// Empty for the init.
    pub exec_id: String,
    /// As the client asked for.
    pub stdio: Stdio,
    /// What an exec process runs; the init's is in the bundle.
    pub spec: Option<ProcessSpec>,
    /// Held from before a start is asked for until it has been published, and while an exit is published.
    pub transition: tokio::sync::Mutex<()>,
    /// What the guest has said of it.
    pub said: Said,
    state: watch::Sender<State>,
    /// Until when its output is waited for, once it is known that nobody will wait for long.
    hurry: watch::Sender<Option<Instant>>,
    streams: Mutex<Streams>,
}

/// What is between a process and its client.
#[derive(Debug, Default)]
struct Streams {
    copies: Option<Arc<Copies>>,
    /// A client may close stdin before the process, and with it the copies, is there.
    stdin_closed: bool,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(exec_id: &str, stdio: Stdio, spec: Option<ProcessSpec>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            transition: tokio::sync::Mutex::default(),
            said: Said::default(),
            state: watch::Sender::new(State::Created),
            hurry: watch::Sender::new(None),
            streams: Mutex::default(),
        }
    }

    /// Its state now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// It runs. False where it has ended already.
    pub fn set_running(&self) -> bool {
        self.state.send_if_modified(|state| match state {
            State::Created => {
                *state = State::Running;
                true
            }
            _ => false,
        })
    }

    /// It has ended. False where that was known already.
    pub fn set_stopped(&self, exit: Exit) -> bool {
        self.state.send_if_modified(|state| match state {
            State::Stopped(_) => false,
            state => {
                *state = State::Stopped(exit);
                true
            }
        })
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            if state.changed().await.is_err() {
                // The sender is in self.
                return Exit::now(255);
            }
        }
    }

    /// Sets the copies of its streams.
    pub fn set_copies(&self, copies: Copies) {
        let mut streams = lock(&self.streams);
        if streams.stdin_closed {
            copies.close_stdin();
        }
        streams.copies = Some(Arc::new(copies));
    }

    /// Its stdin ends after what its client has written.
    pub fn close_stdin(&self) {
        let mut streams = lock(&self.streams);
        streams.stdin_closed = true;
        if let Some(copies) = &streams.copies {
            copies.close_stdin();
        }
    }

    /// Waits until its output has been passed on: at most for `deadline`, and not after [`Process::hurry`].
    pub async fn drain(&self, deadline: Duration) -> bool {
        let Some(copies) = lock(&self.streams).copies.clone() else { return true };
        tokio::select! {
            drained = copies.drain(deadline) => drained,
            () = self.hurried() => {
                copies.give_up();
                false
            }
        }
    }

    /// Its output is not waited for any longer than until then.
    pub fn hurry(&self, by: Instant) {
        self.hurry.send_if_modified(|known| match known {
            Some(known) if *known <= by => false,
            _ => {
                *known = Some(by);
                true
            }
        });
    }

    /// Waits for the time that was given to [`Process::hurry`].
    pub async fn hurried(&self) {
        let mut hurry = self.hurry.subscribe();
        // The sender is in self.
        let by = hurry.wait_for(Option::is_some).await.ok().and_then(|by| *by);
        tokio::time::sleep_until(by.unwrap_or_else(Instant::now)).await;
    }

    /// Closes its streams.
    pub async fn close(&self) {
        let copies = lock(&self.streams).copies.take();
        if let Some(copies) = copies {
            copies.close().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_ends_once_and_does_not_run_again() {
        let process = Process::new("", Stdio::default(), None);
        assert_eq!(process.state().name(), "created");
        assert!(process.set_stopped(Exit::now(7)));
        assert!(!process.set_stopped(Exit::now(8)));
        process.set_running();
        assert!(matches!(process.state(), State::Stopped(Exit { status: 7, .. })));
    }

    #[tokio::test]
    async fn all_who_wait_are_told() {
        let process = Arc::new(Process::new("", Stdio::default(), None));
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.wait().await.status })
            })
            .collect();
        tokio::task::yield_now().await;
        process.set_running();
        process.set_stopped(Exit::now(3));
        for waiter in waiting {
            assert_eq!(waiter.await.unwrap(), 3);
        }
        assert_eq!(process.wait().await.status, 3);
    }
}
