//! Two pieces of work at once.

use std::{panic::resume_unwind, thread};

use crate::Error;

/// What the thread needs at most: it reads files.
const STACK: usize = 256 << 10;

/// Does `other` in a thread of this name while this one does its `own`. Of two errors, the own one counts.
pub(crate) fn join<A: Send, B>(
    name: &str,
    other: impl FnOnce() -> Result<A, Error> + Send,
    own: impl FnOnce() -> Result<B, Error>,
) -> Result<(A, B), Error> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name.into()).stack_size(STACK).spawn_scoped(scope, other);
        let own = own();
        let thread = thread.map_err(|source| Error::Thread { name: name.into(), source });
        let other = thread.and_then(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)));
        let own = own?;
        Ok((other?, own))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn both_are_done_at_once() {
        let (to_other, from_own) = channel();
        let (to_own, from_other) = channel();
        let other = move || {
            to_own.send(1).unwrap();
            Ok(from_own.recv().unwrap())
        };
        let own = || {
            to_other.send(2).unwrap();
            Ok(from_other.recv().unwrap())
        };
        assert_eq!(join("other", other, own).unwrap(), (2, 1));
    }

    #[test]
    fn errors_of_both_are_told() {
        let error = join("other", || Err::<(), _>(Error::Cpuid), || Ok(())).unwrap_err();
        assert!(matches!(error, Error::Cpuid));
        let error = join("other", || Err::<(), _>(Error::Cpuid), || Err::<(), _>(Error::Vcpus(0))).unwrap_err();
        assert!(matches!(error, Error::Vcpus(0)));
    }
}
