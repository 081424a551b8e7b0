//! The list of what may be skipped.

use crate::{
    Skipped,
    host::{Host, WORDS},
};

/// What may be skipped, in the file `skips` beside the sources.
const KNOWN: &str = include_str!("../skips");

/// A line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Which tests, with `*` for anything.
    pub test: String,
    /// Where, in words that are true of a host.
    pub places: Vec<String>,
    /// What they say, with `*` for anything.
    pub reason: String,
}

/// A line that is none.
#[derive(Debug, PartialEq, Eq)]
pub struct Invalid(pub String);

/// Tests that may be skipped.
#[derive(Debug, Default)]
pub struct List(Vec<Entry>);

impl List {
    /// Those of this repository.
    pub fn known() -> Self {
        Self::parse(KNOWN).unwrap_or_else(|Invalid(why)| panic!("integration/tally/skips: {why}"))
    }

    /// Reads lines of `test | where | reason`; `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(entry).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a test may be skipped on a host.
    pub fn allows(&self, skipped: &Skipped, host: &Host) -> bool {
        self.0.iter().any(|entry| {
            matches(&entry.test, &skipped.test)
                && matches(&entry.reason, &skipped.reason)
                && entry.places.iter().any(|word| host.is(word))
        })
    }
}

fn entry(line: &str) -> Result<Entry, Invalid> {
    let fields: Vec<&str> = line.split('|').map(str::trim).collect();
    let [test, places, reason] = fields[..] else {
        return Err(Invalid(format!("{line}: not `test | where | reason`")));
    };
    let places: Vec<String> = places.split(',').map(|word| word.trim().to_owned()).collect();
    match places.iter().find(|word| *word != "anywhere" && !WORDS.contains(&word.as_str())) {
        Some(word) => {
            Err(Invalid(format!("{line}: {word} is no word for a host, which are anywhere, {}", WORDS.join(", "))))
        }
        None => Ok(Entry { test: test.to_owned(), places, reason: reason.to_owned() }),
    }
}

/// Whether a text is what a pattern stands for.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|start| text.strip_prefix(start)) else { return false };
    let mut parts = parts.peekable();
    // Without a `*` nothing may be left.
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(test: &str, reason: &str) -> Skipped {
        Skipped { test: test.into(), reason: reason.into() }
    }

    #[test]
    fn patterns_stand_for_what_they_say() {
        for (pattern, text, is) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "ab", true),
            ("*", "", true),
            ("*b", "ab", true),
            ("*b", "ba", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("ab*ba", "aba", false),
        ] {
            assert_eq!(matches(pattern, text), is, "{pattern} {text}");
        }
    }

    #[test]
    fn a_skip_is_allowed_where_the_list_says_so_and_for_that_reason() {
        let list = List::parse("# why\nvz-kvm::* | no-kvm, no-root | open /dev/kvm: *\n\n").unwrap();
        let kvm = skipped("vz-kvm::machine::x", "open /dev/kvm: No such file");
        assert!(list.allows(&kvm, &Host::of(["no-kvm"])));
        assert!(list.allows(&kvm, &Host::of(["no-root", "slow"])));
        assert!(!list.allows(&kvm, &Host::of(["on-kvm"])));
        assert!(!list.allows(&skipped("vz-kvm::machine::x", "tired"), &Host::of(["no-kvm"])));
        assert!(!list.allows(&skipped("vz-net::x", "open /dev/kvm: "), &Host::of(["no-kvm"])));
    }

    #[test]
    fn a_word_that_nobody_knows_is_named() {
        for (line, named) in [("a | nowhere | b", "nowhere is no word"), ("a | anywhere", "not `test")] {
            assert!(List::parse(line).unwrap_err().0.contains(named), "{line}");
        }
    }

    #[test]
    fn the_list_of_this_repository_can_be_read() {
        assert!(!List::known().0.is_empty());
    }
}
