//! Watches over a sandbox's daemon from the reply of `start` to containerd's first request.
//!
//! containerd calls `delete` for a shim whose connection it loses. Nobody would call it for a daemon that dies before
//! containerd has connected: this process takes away what such a daemon has left. So it does with what takes longer
//! than `delete` may. It outlives `start` and `delete`, for whose end containerd waits, and the journal has it, so that
//! an `unwind` by anybody else ends it first.

use std::{
    io::{self, Read},
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, ExitCode, Stdio},
};

use crate::{
    host::journal::{self, Journal},
    report::KNOWN,
};

/// The action that it is called with, in the form of containerd's own.
pub const ACTION: &str = "watch";
/// Its role in the journal.
const ROLE: &str = "watcher";

/// Why a daemon cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process cannot be started.
    #[error("start the daemon's watcher")]
    Spawn(#[source] io::Error),
    /// It cannot be written down.
    #[error(transparent)]
    Journal(#[from] journal::Error),
}

/// Starts it for the sandbox `namespace`/`id`, whose daemon reports into the pipe `report`.
pub fn start(namespace: &str, id: &str, report: OwnedFd) -> Result<(), Error> {
    watch(namespace, id, report.into())
}

/// Starts it for a sandbox whose daemon is dead, and of which not everything could be taken away in the time that was
/// given.
pub fn go_on(namespace: &str, id: &str) -> Result<(), Error> {
    watch(namespace, id, Stdio::null())
}

fn watch(namespace: &str, id: &str, report: Stdio) -> Result<(), Error> {
    let child = std::env::current_exe()
        .and_then(|exe| {
            Command::new(exe)
                .args(["-namespace", namespace, "-id", id, ACTION])
                .current_dir("/")
                .stdin(report)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .process_group(0)
                .spawn()
        })
        .map_err(Error::Spawn)?;
    Journal::add_process(&vz_state::dir(namespace, id), ROLE, child.id().cast_signed())?;
    Ok(())
}

/// The process: waits for the daemon's word or end, and has `take_away` called for a daemon that nobody knew.
pub fn main(take_away: impl FnOnce()) -> ExitCode {
    let mut said = Vec::new();
    // The daemon holds the other end, and says a line at most. A pipe that cannot be read tells no end.
    match io::stdin().lock().take(KNOWN.len() as u64).read_to_end(&mut said) {
        Ok(_) if said == KNOWN.as_bytes() => ExitCode::SUCCESS,
        Ok(_) => {
            take_away();
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}
