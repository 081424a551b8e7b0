//! What the server and PID 1 say to each other, over a [`vz_sys::channel::Channel`].
//!
//! JSON messages with descriptors. The server asks, PID 1 reports; an answer to a request has the request's id. A
//! started server first gets one [`Report::Process`] for each process that PID 1 knows, then [`Report::Ready`].

use serde::{Deserialize, Serialize};

use crate::clock::Moment;

/// Which process: a container's init where `exec` is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    /// The container.
    pub container: String,
    /// The exec in it, or nothing.
    pub exec: String,
}

/// One of a process's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Host to process.
    Stdin,
    /// Process to host; with a terminal both ways.
    Stdout,
    /// Process to host.
    Stderr,
}

/// What a process gets as its stdio.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// A pseudo terminal, carried by [`Stream::Stdout`].
    pub terminal: bool,
    /// The streams that exist; the others are `/dev/null`.
    pub streams: Vec<Stream>,
}

/// From the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answered once the boot is done: before, there are neither cgroups nor the containers' network namespace.
    Booted {
        /// Chosen by the server.
        id: u64,
    },
    /// Create the container whose bundle has been written. With the connected stream for each of `stdio.streams`, in
    /// that order. Answered by [`Report::Done`] with the process's end for each of them, in that order.
    Create {
        /// Chosen by the server.
        id: u64,
        /// The container.
        container: String,
        /// Its stdio.
        stdio: Stdio,
    },
    /// Start a created container.
    Start {
        /// Chosen by the server.
        id: u64,
        /// The container.
        container: String,
    },
    /// Start another process in a running container; descriptors as for [`Request::Create`].
    Exec {
        /// Chosen by the server.
        id: u64,
        /// The process.
        key: Key,
        /// Its stdio.
        stdio: Stdio,
    },
    /// Send a signal to a process that has not ended.
    Signal {
        /// Chosen by the server.
        id: u64,
        /// The process.
        key: Key,
        /// Number of the signal.
        signal: i32,
    },
    /// A stream has come to its end: keep its descriptors no longer.
    CloseStream {
        /// The process.
        key: Key,
        /// The stream.
        stream: Stream,
    },
    /// Forget an ended process, or a container with all its processes. Not answered.
    Forget {
        /// The process.
        key: Key,
    },
    /// Log from this level on, here and in workers. Not answered.
    Log {
        /// Its name.
        level: String,
    },
}

/// From PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// A process of before this server was started. With two descriptors for each of `stdio.streams`: the connected
    /// stream and the process's end.
    Process(Box<Process>),
    /// All that there was has been reported.
    Ready {
        /// How often a server was started before this one.
        incarnation: u32,
        /// When PID 1 ran its first line.
        first: Moment,
    },
    /// The answer to a request.
    Done {
        /// The request's.
        id: u64,
        /// The process's pid where one was made, else 0.
        result: Result<i32, Failure>,
        /// What libcontainer logged meanwhile: levels and lines.
        log: Vec<(String, String)>,
    },
    /// A process has ended. Follows the answer to the request that made it.
    Exit {
        /// The process.
        key: Key,
        /// Its pid.
        pid: i32,
        /// How and when.
        exit: Exit,
    },
}

/// A process as PID 1 knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Which.
    pub key: Key,
    /// Its pid; 0 where creating it failed after its server had died.
    pub pid: i32,
    /// Whether the container was started.
    pub started: bool,
    /// Whether the server that had it made died before it could tell the host: to be removed.
    pub abandoned: bool,
    /// How it ended, where it has.
    pub exit: Option<Exit>,
    /// What is left of its stdio.
    pub stdio: Stdio,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// Counts the exits of this boot.
    pub number: u64,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// There is such a process already.
    Exists,
    /// There is no such process, or it has ended.
    Gone,
    /// libcontainer, or the kernel, in its own words.
    Failed(String),
}
