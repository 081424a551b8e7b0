//! What the guest does.

use crate::{fuse::Answer, machine::say};

pub mod chains;
pub mod endless;
pub mod lies;
pub mod names;
pub mod places;
pub mod registers;
pub mod shares;

/// Says what came of a request that has to be refused.
fn must_refuse(answer: Answer, what: core::fmt::Arguments<'_>) {
    match answer {
        Answer::Refused(error) => say!("refused {what} {error}"),
        Answer::Dropped => say!("dropped {what}"),
        Answer::Done(_) => say!("WRONG: done: {what}"),
        Answer::Silence => say!("WRONG: silence: {what}"),
    }
}

/// Says what came of a request that has to be done, and returns whether it was.
fn must_do(answer: Answer, what: &str) -> bool {
    let done = matches!(answer, Answer::Done(_));
    match answer {
        Answer::Done(_) => say!("fine {what}"),
        Answer::Refused(error) => say!("WRONG: refused: {what} {error}"),
        Answer::Dropped => say!("WRONG: dropped: {what}"),
        Answer::Silence => say!("WRONG: silence: {what}"),
    }
    done
}

macro_rules! refuse {
    ($answer:expr, $($arg:tt)*) => { must_refuse($answer, format_args!($($arg)*)) };
}
use refuse;
