//! What undoes the steps of a creation, if a later one fails.

use std::{fmt, pin::Pin};

use crate::host;

type Action = Pin<Box<dyn Future<Output = Result<(), host::Error>> + Send>>;

/// An action for each step that has begun.
///
/// A step pushes its action before it does anything that can fail halfway. So an action must bear that nothing of its
/// step is there.
#[derive(Default)]
pub struct Undo(Vec<(&'static str, Action)>);

impl fmt::Debug for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(step, _)| step)).finish()
    }
}

impl Undo {
    /// Adds what undoes `step`. Nothing of `action` is done before [`Undo::settle`].
    pub fn push(&mut self, step: &'static str, action: impl Future<Output = Result<(), host::Error>> + Send + 'static) {
        self.0.push((step, Box::pin(action)));
    }

    /// Ends the creation with its outcome. After a failure the actions run, the last first, each after the end of the
    /// one before it. One that fails is told to `report`, and keeps no other from running.
    pub async fn settle<T, E>(
        self,
        made: Result<T, E>,
        mut report: impl FnMut(&'static str, host::Error),
    ) -> Result<T, E> {
        if made.is_err() {
            for (step, action) in self.0.into_iter().rev() {
                if let Err(error) = action.await {
                    report(step, error);
                }
            }
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vz_sys::sync::lock;

    use super::*;
    use crate::host::offload;

    /// What happened, in its order.
    #[derive(Debug, Clone, Default)]
    struct Diary(Arc<Mutex<Vec<String>>>);

    /// Something that a step has made, which ends with its last owner.
    struct Owned(Diary);

    impl Drop for Owned {
        fn drop(&mut self) {
            self.0.note("dropped");
        }
    }

    impl Diary {
        fn note(&self, what: &str) {
            lock(&self.0).push(what.to_owned());
        }

        /// A creation of three steps, of which the one at `failing` fails halfway and the undoing of `stuck` too.
        async fn create(&self, failing: usize, stuck: &[usize]) -> Result<(), usize> {
            const NAMES: [&str; 3] = ["files", "anchor", "hooks"];
            let mut undo = Undo::default();
            let mut steps = || {
                for (number, name) in NAMES.into_iter().enumerate() {
                    let (diary, stuck) = (self.clone(), stuck.contains(&number));
                    undo.push(name, async move {
                        diary.note(&format!("begin to undo {name}"));
                        tokio::task::yield_now().await;
                        diary.note(&format!("undo {name}"));
                        let panicked = || offload::Error::Panicked(name.into()).into();
                        if stuck { Err(panicked()) } else { Ok(()) }
                    });
                    self.note(name);
                    if number == failing {
                        return Err(number);
                    }
                }
                Ok(())
            };
            let made = steps();
            undo.settle(made, |step, error| self.note(&format!("report {step}: {error}"))).await
        }

        fn all(&self) -> Vec<String> {
            lock(&self.0).clone()
        }
    }

    #[tokio::test]
    async fn steps_are_undone_in_reverse_and_one_by_one() {
        let diary = Diary::default();
        assert_eq!(diary.create(1, &[]).await, Err(1));
        let all = diary.all();
        assert_eq!(
            all,
            ["files", "anchor", "begin to undo anchor", "undo anchor", "begin to undo files", "undo files"]
        );
    }

    #[tokio::test]
    async fn what_cannot_be_undone_is_reported_and_keeps_nothing_else() {
        let diary = Diary::default();
        assert_eq!(diary.create(2, &[0, 2]).await, Err(2));
        let mut all = diary.all();
        all.retain(|said| said.starts_with("undo") || said.starts_with("report"));
        assert_eq!(
            all,
            [
                "undo hooks",
                "report hooks: the shim failed to hooks",
                "undo anchor",
                "undo files",
                "report files: the shim failed to files",
            ]
        );
    }

    #[tokio::test]
    async fn nothing_is_undone_of_what_succeeds() {
        let diary = Diary::default();
        assert_eq!(diary.create(3, &[]).await, Ok(()));
        assert_eq!(diary.all(), ["files", "anchor", "hooks"]);
    }

    #[tokio::test]
    async fn what_an_action_owns_ends_before_the_next_one() {
        let diary = Diary::default();
        let mut undo = Undo::default();
        let below = diary.clone();
        undo.push("files", async move {
            below.note("files");
            Ok(())
        });
        let owned = Owned(diary.clone());
        undo.push("anchor", async move {
            owned.0.note("anchor");
            Ok(())
        });
        let made: Result<(), ()> = undo.settle(Err(()), |step, error| panic!("{step}: {error}")).await;
        assert_eq!(made, Err(()));
        assert_eq!(diary.all(), ["anchor", "dropped", "files"]);
    }
}
