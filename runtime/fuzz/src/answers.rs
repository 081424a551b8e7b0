//! The bounds of messages on the connection to the agent, however the stream is cut.
//!
//! The first byte says how many of the next ones are sizes of pieces, which take turns; the rest is the stream.

use vz_proto::bounds::{Bounds, HEADER, MOST, TooLarge};

/// What the whole stream comes to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// It ends, between two messages or not.
    Passed { between: bool },
    /// A length that is too large ends before this byte.
    Refused { length: u32, end: usize },
}

/// The same by looking at all of it at once.
fn expected(stream: &[u8]) -> Outcome {
    let mut at = 0;
    loop {
        let rest = &stream[at..];
        let Some(length) = rest.first_chunk().map(|length| u32::from_be_bytes(*length)) else {
            return Outcome::Passed { between: rest.is_empty() };
        };
        if length > MOST {
            return Outcome::Refused { length, end: at + 4 };
        }
        let message = HEADER + length as usize;
        if rest.len() < message {
            return Outcome::Passed { between: false };
        }
        at += message;
    }
}

pub(crate) fn run(bytes: &[u8]) -> Result<(), String> {
    let Some((count, bytes)) = bytes.split_first() else { return Ok(()) };
    let (sizes, stream) = bytes.split_at(usize::from(count % 8).min(bytes.len()));
    let expected = expected(stream);
    let mut sizes = sizes.iter().map(|size| usize::from(*size) + 1).cycle();
    let (mut bounds, mut at) = (Bounds::default(), 0);
    while at < stream.len() {
        let end = stream.len().min(at + sizes.next().unwrap_or(stream.len()));
        match (bounds.pass(&stream[at..end]), &expected) {
            (Ok(()), Outcome::Refused { end: refused, .. }) => assert!(end < *refused, "passed {end} of {expected:?}"),
            (Ok(()), Outcome::Passed { .. }) => {}
            (Err(TooLarge(said)), Outcome::Refused { length, end: refused }) => {
                assert!(said == *length && at < *refused && *refused <= end, "refused {at}..{end} of {expected:?}");
                return Ok(());
            }
            (Err(error), Outcome::Passed { .. }) => panic!("{error}"),
        }
        at = end;
    }
    assert_eq!(Outcome::Passed { between: bounds.is_between() }, expected);
    Ok(())
}
