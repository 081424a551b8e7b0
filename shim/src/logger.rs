//! A logging program (`binary://`): gets a process's output on descriptors 3 and 4, and says on 5 that it is ready.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::CloneFlags,
    sys::signal::Signal,
};
use tokio::io::unix::AsyncFd;
use vz_sys::{
    process::{Command, Process, Steps},
    surroundings::Surroundings,
};

use crate::io::{logger_pipe, null, query};

/// How long it may take to be ready, in milliseconds.
const READY: u16 = 10_000;
/// How long it may take to end after its input has ended, and after SIGTERM.
const END: Duration = Duration::from_secs(12);

/// Why there is no logging program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error("start logging program {path}")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It did not say that it is ready.
    #[error("logging program {0} is not ready after 10 s")]
    Ready(PathBuf),
}

/// A running logging program.
#[derive(Debug)]
pub struct Logger {
    process: AsyncFd<Process>,
    path: PathBuf,
}

impl Logger {
    /// Starts the program of `uri`, and waits until it is ready. Returns it with the ends to write stdout and stderr to.
    /// It runs in `surroundings`, so that it keeps no mount of the sandbox busy.
    pub fn start(
        uri: &str,
        path: &str,
        id: &str,
        namespace: &str,
        surroundings: Option<&Surroundings>,
    ) -> Result<(Self, OwnedFd, OwnedFd), Error> {
        let fail = |source| Error::Start { path: path.into(), source };
        let text = |text: &str| CString::new(text).map_err(|e| fail(e.into()));
        let mut args = vec![text(path)?];
        for (key, value) in query(uri) {
            args.push(text(&key)?);
            if !value.is_empty() {
                args.push(text(&value)?);
            }
        }
        let env = vec![text(&format!("CONTAINER_ID={id}"))?, text(&format!("CONTAINER_NAMESPACE={namespace}"))?];
        let (out_read, out) = logger_pipe().map_err(fail)?;
        let (err_read, err) = logger_pipe().map_err(fail)?;
        let (ready, ready_write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| fail(e.into()))?;
        let null = null().map_err(fail)?;
        let null = null.as_fd();
        let process = Command {
            program: text(path)?,
            args,
            env,
            fds: vec![
                (null, 0),
                (null, 1),
                (null, 2),
                (out_read.as_fd(), 3),
                (err_read.as_fd(), 4),
                (ready_write.as_fd(), 5),
            ],
            namespaces: CloneFlags::empty(),
            // It ends with its input, after it has written everything.
            outlives_parent: true,
        }
        .spawn_with(Steps { surroundings, ..Steps::default() })
        .map_err(fail)?;
        drop((out_read, err_read, ready_write));
        // A byte, or the end of file of a program that closes what it does not know.
        let waited = poll(&mut [PollFd::new(ready.as_fd(), PollFlags::POLLIN)], PollTimeout::from(READY))
            .map_err(|e| fail(e.into()))?;
        if waited == 0 {
            process.kill(Signal::SIGKILL).and_then(|()| process.wait()).map_err(fail)?;
            return Err(Error::Ready(path.into()));
        }
        let process = crate::fd::watch(process).map_err(fail)?;
        Ok((Self { process, path: path.into() }, out, err))
    }

    /// Waits until it has ended by itself, which it does once it has read all of its input.
    pub async fn ended(&self) -> io::Result<()> {
        self.process.readable().await?.retain_ready();
        Ok(())
    }

    /// Waits for its end; its input must be closed already. One that does not end is told to, then killed.
    pub async fn end(&self) {
        let ended = async {
            for signal in [Signal::SIGTERM, Signal::SIGKILL] {
                if tokio::time::timeout(END, self.ended()).await.is_ok() {
                    break;
                }
                tracing::warn!(path = %self.path.display(), %signal, "logging program does not end");
                self.process.get_ref().kill(signal)?;
            }
            self.ended().await?;
            self.process.get_ref().wait()
        };
        if let Err(error) = ended.await {
            tracing::warn!(%error, path = %self.path.display(), "end logging program");
        }
    }
}
