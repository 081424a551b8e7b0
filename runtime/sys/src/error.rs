//! Errors as text, for logs and people.

use std::error::Error;

/// An error with all its causes, as one line. What a cause says that stands at the end already, as some libraries
/// repeat it, is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str, #[source] Option<Box<Said>>);

    #[test]
    fn causes_follow_and_are_not_repeated() {
        let chained = |said, cause| chain(&Said("open file", Some(Box::new(Said(said, cause)))));
        let denied = || Some(Box::new(Said("denied", None)));
        assert_eq!(chained("read: denied", denied()), "open file: read: denied");
        assert_eq!(chained("read", denied()), "open file: read: denied");
    }
}
