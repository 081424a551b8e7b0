//! What happens in a worker: a child that PID 1 has forked for one call of libcontainer.
//!
//! libcontainer forks too: an intermediate process, and from that the container's process as a child of the worker.
//! When the worker exits, after it has sent its result, PID 1 becomes the parent and learns how the process ends.

mod console;
mod devices;
mod executor;
mod make;
mod seccomp;
mod words;

use std::{
    fmt::Display,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use libcontainer::container::Container;
use serde::{Deserialize, Serialize};
use vz_sys::channel::Channel;

use crate::{
    log::Log,
    paths,
    protocol::{Key, Stream},
    text,
};

/// What a worker is to do.
#[derive(Debug)]
pub enum Task {
    /// Create the container whose bundle is there.
    Create {
        /// Its id.
        container: String,
        /// Whether its init gets a terminal.
        terminal: bool,
    },
    /// Start a created container.
    Start {
        /// Its id.
        container: String,
    },
    /// Start the process whose `process.json` is there.
    Exec {
        /// Which.
        key: Key,
        /// Whether it gets a terminal.
        terminal: bool,
    },
}

/// What a worker says before it exits; with a terminal's master where it made one.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// The pid of what was made, or 0; else what went wrong.
    pub result: Result<i32, String>,
    /// Levels and lines that were logged.
    pub log: Vec<(String, String)>,
}

impl Outcome {
    /// A failure that the worker itself could not tell.
    pub fn failed(error: &dyn Display) -> Self {
        Self { result: Err(error.to_string()), log: Vec::new() }
    }
}

/// What was made: a pid, and the terminal's master where there is one.
type Made = (i32, Option<OwnedFd>);

/// Does the task, reports to PID 1 and ends the process.
pub fn run(task: Task, stdio: Vec<(Stream, OwnedFd)>, report: &Channel, log: &Log) -> ! {
    let keep: Vec<_> = stdio.iter().map(|(_, fd)| fd.as_raw_fd()).chain([report.as_raw_fd()]).collect();
    // What PID 1 keeps of other containers must not live on in this one's init, which may wait for its start for long.
    if let Err(e) = vz_sys::fork::close_other_fds(&keep) {
        finish(report, &Outcome::failed(&format!("close descriptors: {e}")), None);
    }
    let words = match words::Words::listen(log) {
        Ok(words) => words,
        Err(e) => finish(report, &Outcome::failed(&format!("listen to libcontainer: {e}")), None),
    };
    let result = match task {
        Task::Create { container, terminal } => make::create(&container, terminal, stdio),
        Task::Start { container } => start(&container),
        Task::Exec { key, terminal } => make::exec(&key, terminal, stdio),
    };
    let log = words.said();
    match result {
        Ok((pid, master)) => finish(report, &Outcome { result: Ok(pid), log }, master.as_ref()),
        Err(e) => {
            let text = words::explain(words::cut(&text::chain(&*e)), &log);
            finish(report, &Outcome { result: Err(text), log }, None)
        }
    }
}

fn start(container: &str) -> Result<Made, Box<dyn std::error::Error>> {
    Container::load(paths::state(container))?.start()?;
    Ok((0, None))
}

fn finish(report: &Channel, outcome: &Outcome, master: Option<&OwnedFd>) -> ! {
    let fds: Vec<_> = master.iter().map(|fd| fd.as_fd()).collect();
    let sent = serde_json::to_vec(outcome).map_err(std::io::Error::other).and_then(|bytes| report.send(&bytes, &fds));
    // Where PID 1 does not get it, it sees the end of the channel.
    std::process::exit(i32::from(sent.is_err()))
}
