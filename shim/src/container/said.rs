//! What a guest may still say of a process.
//!
//! | the guest was | exit | out of memory (of the init) |
//! | --- | --- | --- |
//! | asked for nothing | refused | refused |
//! | asked to make the process | taken, once | taken |
//! | believed that it has ended | refused | taken until the end is published |
//!
//! Threat: the guest repeats itself, or reports what never was. A refused report costs a table lookup and nothing else:
//! no task, no event, no memory.

use std::time::SystemTime;

use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When, by the host's clock.
    pub at: SystemTime,
}

impl Exit {
    /// A process that ended just now.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// How far the guest has come with a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Stage {
    /// The guest was not asked to make it.
    #[default]
    Unknown,
    /// The guest was asked to make it, and may have done so.
    Made,
    /// Its first exit.
    Ended(Exit),
}

/// What becomes of a reported exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the process's end.
    Taken,
    /// The end is known already.
    Repeated,
    /// The guest was never asked for this process.
    Unasked,
}

/// What was said of one process.
#[derive(Debug, Default)]
pub struct Said(watch::Sender<Stage>);

impl Said {
    /// The guest is about to be asked for the process.
    pub fn ask(&self) {
        self.0.send_if_modified(|stage| replace(stage, Stage::Unknown, Stage::Made));
    }

    /// The guest has refused to make the process: it has no end.
    pub fn withdraw(&self) {
        self.0.send_if_modified(|stage| replace(stage, Stage::Made, Stage::Unknown));
    }

    /// The process has ended, says the guest, or the host that has ended the guest.
    pub fn exit(&self, exit: Exit) -> Verdict {
        let mut verdict = Verdict::Unasked;
        self.0.send_if_modified(|stage| {
            verdict = match stage {
                Stage::Unknown => Verdict::Unasked,
                Stage::Ended(_) => Verdict::Repeated,
                Stage::Made => Verdict::Taken,
            };
            replace(stage, Stage::Made, Stage::Ended(exit))
        });
        verdict
    }

    /// Whether the guest may report a lack of memory.
    pub fn may_lack_memory(&self) -> bool {
        *self.0.borrow() != Stage::Unknown
    }

    /// Waits for the first exit.
    pub async fn ended(&self) {
        let mut stage = self.0.subscribe();
        // The sender is in self: this ends only with an exit.
        drop(stage.wait_for(|stage| matches!(stage, Stage::Ended(_))).await);
    }
}

fn replace(stage: &mut Stage, from: Stage, to: Stage) -> bool {
    let applies = *stage == from;
    if applies {
        *stage = to;
    }
    applies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_exit_of_a_process_that_was_asked_for_is_its_end() {
        let said = Said::default();
        assert_eq!(said.exit(Exit::now(1)), Verdict::Unasked);
        assert!(!said.may_lack_memory());
        said.ask();
        assert!(said.may_lack_memory());
        assert_eq!(said.exit(Exit::now(2)), Verdict::Taken);
        assert_eq!(said.exit(Exit::now(3)), Verdict::Repeated);
        // Neither another request nor a refusal that comes late revives it.
        said.ask();
        said.withdraw();
        assert_eq!(said.exit(Exit::now(4)), Verdict::Repeated);
    }

    #[test]
    fn what_was_refused_has_no_end_and_can_be_asked_for_again() {
        let said = Said::default();
        said.ask();
        said.withdraw();
        assert_eq!(said.exit(Exit::now(1)), Verdict::Unasked);
        said.ask();
        assert_eq!(said.exit(Exit::now(2)), Verdict::Taken);
    }

    #[tokio::test]
    async fn an_end_can_be_waited_for_before_and_after() {
        let said = std::sync::Arc::new(Said::default());
        let waiting = tokio::spawn({
            let said = said.clone();
            async move { said.ended().await }
        });
        tokio::task::yield_now().await;
        said.ask();
        said.exit(Exit::now(0));
        waiting.await.unwrap();
        said.ended().await;
    }
}
