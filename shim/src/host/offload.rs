//! Work on file systems that may hang (a network file system whose server is gone, FUSE), on a thread of its own.
//!
//! The shim's one runtime thread serves every request and must not wait in the kernel. A thread that hangs is left behind at
//! its deadline: it holds nothing that others wait for, and ends with the process. What it does after that must come to
//! nothing, which is the work's own duty (`Share::remove` sees to it for mounts).

use std::{
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

use crate::error::Error;

/// Bytes of a thread's stack; paths and mount options are on the heap.
const STACK: usize = 256 << 10;

/// What the work is at, for the error of one that hangs.
#[derive(Debug, Clone, Default)]
pub struct Doing(Arc<Mutex<String>>);

impl Doing {
    /// The next step begins.
    pub fn now(&self, what: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = what.into();
    }

    fn last(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs `work` on a thread of its own, for at most `deadline`.
pub async fn run<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce(&Doing) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
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
        .map_err(|e| Error::Message { what: "start a thread for file systems", source: Box::new(e) })?;
    match timeout(deadline, result).await {
        Ok(Ok(result)) => result,
        // The thread has panicked, and said so.
        Ok(Err(_)) => Err(Error::Sandbox(format!("the shim failed to {}", doing.last()).into())),
        Err(_) => Err(Error::Stuck { what: doing.last(), seconds: deadline.as_secs() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_named_and_left_behind() {
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let hung = run::<()>(Duration::from_millis(50), move |doing| {
            doing.now("look at /net/share");
            let _ = held.recv();
            Ok(())
        });
        let error = hung.await.unwrap_err();
        assert!(matches!(&error, Error::Stuck { what, .. } if what == "look at /net/share"), "{error}");
        drop(go_on);
        assert_eq!(run(Duration::from_secs(60), |_| Ok(7)).await.unwrap(), 7);
    }
}
