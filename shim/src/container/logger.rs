//! A logging program (`binary://`): gets a process's output on descriptors 3 and 4, and says on 5 that it is ready.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use nix::{fcntl::OFlag, sched::CloneFlags, sys::signal::Signal, unistd::pipe2};
use tokio::{
    io::{AsyncReadExt, unix::AsyncFd},
    net::unix::pipe,
    time::timeout,
};
use vz_sys::{
    fd::set_nonblocking,
    process::{Command, Process, Steps},
    surroundings::Surroundings,
};

/// How long it may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end after its input has ended, and after SIGTERM. It had `timeouts.drain_s` before for what
/// it was given.
const END: Duration = Duration::from_secs(3);
/// How long a killed one may take to be gone.
const GONE: Duration = Duration::from_secs(1);

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
    #[error("logging program {0} did not say that it is ready within {secs} s", secs = READY.as_secs())]
    Ready(PathBuf),
}

/// A running logging program.
#[derive(Debug)]
pub struct Logger {
    process: AsyncFd<Process>,
    path: PathBuf,
}

impl Logger {
    /// Starts the program of `uri`, and waits until it is ready. Returns it with the ends to write stdout and stderr
    /// to. It runs in `surroundings`, so that it keeps no mount of the sandbox busy.
    pub async fn start(
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
        let (ready, ready_write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| fail(e.into()))?;
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
        let logger = Self { process: crate::fd::watch(process).map_err(fail)?, path: path.into() };
        // A byte, or the end of file of a program that closes what it does not know.
        let said = async { pipe::Receiver::from_owned_fd(ready)?.read(&mut [0]).await };
        match timeout(READY, said).await {
            Ok(said) => drop(said.map_err(fail)?),
            Err(_) => {
                drop((out, err));
                logger.kill().await.map_err(fail)?;
                return Err(Error::Ready(path.into()));
            }
        }
        Ok((logger, out, err))
    }

    /// Waits until it has ended by itself, which it does once it has read all of its input.
    pub async fn ended(&self) -> io::Result<()> {
        self.process.readable().await?.retain_ready();
        Ok(())
    }

    /// Waits for its end; its input must be closed already. One that does not end is told to, then killed; one that is
    /// `late` was waited for already.
    pub async fn end(&self, late: bool) {
        let ended = async {
            if late || timeout(END, self.ended()).await.is_err() {
                tracing::warn!(path = %self.path.display(), "logging program does not end by itself");
                self.process.get_ref().kill(Signal::SIGTERM)?;
                if timeout(END, self.ended()).await.is_err() {
                    tracing::warn!(path = %self.path.display(), "logging program is killed");
                    return self.kill().await;
                }
            }
            self.process.get_ref().try_wait().map(drop)
        };
        if let Err(error) = ended.await {
            tracing::warn!(%error, path = %self.path.display(), "end logging program");
        }
    }

    /// Kills and reaps it. One that the kernel holds longer than a moment is left to the shim's end.
    async fn kill(&self) -> io::Result<()> {
        self.process.get_ref().kill(Signal::SIGKILL)?;
        timeout(GONE, self.ended()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        self.process.get_ref().try_wait().map(drop)
    }
}

/// A pipe for a logging program: its end to read, and ours to write.
fn logger_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    set_nonblocking(&write, true)?;
    Ok((read, write))
}

/// The `key=value` pairs of an address, percent-decoded.
fn query(uri: &str) -> Vec<(String, String)> {
    let Some((_, query)) = uri.split_once('?') else { return Vec::new() };
    let pairs: HashMap<_, _> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect();
    let mut pairs: Vec<_> = pairs.into_iter().collect();
    pairs.sort();
    pairs
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes.get(at + 1..at + 3).and_then(|hex| std::str::from_utf8(hex).ok());
        match (bytes[at], hex.and_then(|hex| u8::from_str_radix(hex, 16).ok())) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => decoded.push(b' '),
            (byte, _) => decoded.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Opens a file of the logging program's for reading what it says.
fn null() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/null")
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::Instant};

    use super::*;

    #[test]
    fn an_addresss_pairs_are_decoded() {
        assert_eq!(
            query("binary:///b?_INTERNAL=%2Fvar%2Flib&x=a+b&flag"),
            [("_INTERNAL", "/var/lib"), ("flag", ""), ("x", "a b")].map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
    }

    /// A logging program in a shell's words; the directory is to live as long.
    fn program(script: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logger");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (dir, path)
    }

    #[tokio::test]
    async fn one_that_is_never_ready_is_ended_and_others_are_served_meanwhile() {
        let (_dir, path) = program("exec sleep 1000");
        let begun = Instant::now();
        let starting = Logger::start("binary:///x", &path, "c1", "ns", None);
        let ticking = async {
            let mut ticks = 0;
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                ticks += 1;
                if ticks == 20 {
                    return;
                }
            }
        };
        let (started, ()) = tokio::join!(starting, async {
            ticking.await;
            assert!(begun.elapsed() < READY, "the runtime's thread was blocked");
        });
        assert!(matches!(started, Err(Error::Ready(_))));
    }

    #[tokio::test]
    async fn one_that_does_not_end_is_told_and_then_killed() {
        let (_dir, path) = program("trap '' TERM; exec 5>&-; while :; do sleep 0.1; done");
        let (logger, out, err) = Logger::start("binary:///x", &path, "c1", "ns", None).await.unwrap();
        drop((out, err));
        let begun = Instant::now();
        logger.end(true).await;
        assert!((END..END + GONE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        timeout(GONE, logger.ended()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_that_ends_with_its_input_is_not_disturbed() {
        let (_dir, path) = program("exec 5>&-; cat <&3 >/dev/null; exit 0");
        let (logger, out, err) = Logger::start("binary:///x", &path, "c1", "ns", None).await.unwrap();
        drop((out, err));
        let begun = Instant::now();
        logger.end(false).await;
        assert!(begun.elapsed() < END, "{:?}", begun.elapsed());
    }
}
