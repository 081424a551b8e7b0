//! Errors as text, and names from the host.

use std::{error::Error, fmt::Write};

/// An error and its causes in one line. What a cause repeats of the text before it is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            // Writing to a string cannot fail.
            let _ = write!(text, ": {words}");
        }
        cause = error.source();
    }
    text
}

/// Whether a container or exec may be called that: it becomes a file name.
pub fn is_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 128
        && id != "."
        && id != ".."
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open the door")]
    struct Outer(#[source] Inner);
    #[derive(Debug, thiserror::Error)]
    #[error("it is locked")]
    struct Inner;
    #[derive(Debug, thiserror::Error)]
    #[error("open the door: {0}")]
    struct Repeats(#[source] Inner);

    #[test]
    fn a_chain_says_everything_once() {
        assert_eq!(chain(&Outer(Inner)), "open the door: it is locked");
        assert_eq!(chain(&Repeats(Inner)), "open the door: it is locked");
    }

    #[test]
    fn ids_are_file_names() {
        let long = "a".repeat(128);
        for id in ["a", "0123abc_x.y-z", "..a", long.as_str()] {
            assert!(is_id(id), "{id}");
        }
        let longer = "a".repeat(129);
        for id in ["", ".", "..", "a/b", "a b", "ä", "a\0", longer.as_str()] {
            assert!(!is_id(id), "{id}");
        }
    }
}
