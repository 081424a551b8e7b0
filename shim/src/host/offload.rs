//! Work on file systems that may hang (a network file system whose server is gone, FUSE), on a thread of its own.
//!
//! The shim's one runtime thread serves every request and must not wait in the kernel. A thread that hangs is left
//! behind at its deadline: it holds nothing that others wait for, and ends with the process. What it does after that
//! must come to nothing, which is the work's own duty (`Share::remove` sees to it for mounts).

use std::{
    io,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

use vz_sys::sync::lock;

/// Bytes of a thread's stack; paths and mount options are on the heap.
const STACK: usize = 256 << 10;

/// Why work has no result of its own.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file system of the host's does not answer.
    #[error("{what}: the file system did not answer for {seconds} s")]
    Stuck {
        /// What was tried.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// There is no thread for it.
    #[error("start a thread for file systems")]
    Thread(#[source] io::Error),
    /// Its thread has panicked, and said so.
    #[error("the shim failed to {0}")]
    Panicked(String),
}

/// What the work is at, for the error of one that hangs.
#[derive(Debug, Clone, Default)]
pub struct Doing(Arc<Mutex<String>>);

impl Doing {
    /// The next step begins.
    pub fn now(&self, what: impl Into<String>) {
        *lock(&self.0) = what.into();
    }

    fn last(&self) -> String {
        lock(&self.0).clone()
    }
}

/// Runs `work` on a thread of its own, for at most `deadline`.
pub async fn run<T: Send + 'static, E: From<Error> + Send + 'static>(
    deadline: Duration,
    work: impl FnOnce(&Doing) -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    let doing = Doing::default();
    let (done, result) = oneshot::channel();
    let theirs = doing.clone();
    thread::Builder::new()
        .name("files".into())
        .stack_size(STACK)
        .spawn(move || {
            // Nobody waits any more where the deadline has passed.
            drop(done.send(work(&theirs)));
        })
        .map_err(Error::Thread)?;
    match timeout(deadline, result).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(Error::Panicked(doing.last()).into()),
        Err(_) => Err(Error::Stuck { what: doing.last(), seconds: deadline.as_secs() }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_named_and_left_behind() {
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let hung = run::<(), Error>(Duration::from_millis(50), move |doing| {
            doing.now("look at /net/share");
            let _ = held.recv();
            Ok(())
        });
        let error = hung.await.unwrap_err();
        assert!(matches!(&error, Error::Stuck { what, .. } if what == "look at /net/share"), "{error}");
        drop(go_on);
        assert_eq!(run::<_, Error>(Duration::from_secs(60), |_| Ok(7)).await.unwrap(), 7);
    }
}
