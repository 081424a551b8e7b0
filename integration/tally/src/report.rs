//! The tally of a run: what passed, failed and was skipped, from what cargo and the suite print and what skipped tests
//! wrote down.

use std::{collections::BTreeSet, fmt};

use crate::{Host, List, Skipped};

/// What the names of the suite's tests begin with.
const SUITE: &str = "suite::";

/// What came of a run of tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many passed.
    pub passed: usize,
    /// Those that failed, as far as they have names.
    pub failed: BTreeSet<String>,
    /// Those that were skipped.
    pub skipped: BTreeSet<Skipped>,
}

/// Reads what a run of cargo's harness or of the suite printed, and what its skipped tests wrote down.
pub fn read(output: &str, skips: &str) -> Report {
    let mut report = Report::default();
    let mut failures = false;
    for line in output.lines() {
        if let Some(result) = line.strip_prefix("test result: ") {
            failures = false;
            report.passed += count(result, " passed");
        } else if line == "failures:" {
            failures = true;
        } else if let Some((test, reason)) =
            line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ignored, skipped: "))
        {
            report.skipped.insert(Skipped { test: format!("{SUITE}{test}"), reason: reason.to_owned() });
        } else if failures && let Some(name) = line.strip_prefix("    ") {
            // The suite says why behind a colon; what is longer than a name is some test's output.
            let name = name.split(": ").next().unwrap_or(name);
            if !name.is_empty() && !name.contains(' ') {
                report.failed.insert(name.to_owned());
            }
        }
    }
    let written: BTreeSet<Skipped> = skips
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(test, reason)| Skipped { test: test.to_owned(), reason: reason.to_owned() })
        .collect();
    // cargo's harness counts those as passed; tests without it print no result, and a test may skip more than one part
    // of itself.
    let tests: BTreeSet<&str> = written.iter().map(|skipped| skipped.test.as_str()).collect();
    report.passed = report.passed.saturating_sub(tests.len());
    report.skipped.extend(written);
    report
}

/// The number before a word, `12 passed`.
fn count(text: &str, word: &str) -> usize {
    let before = text.split(word).next().unwrap_or_default();
    before.rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

impl Report {
    /// Adds another run.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }

    /// Those that must not have been skipped. The suite's are not among them: it knows more of the host, and has them
    /// fail itself.
    pub fn not_allowed(&self, list: &List, host: &Host) -> Vec<&Skipped> {
        let judged = |skipped: &&Skipped| skipped.test.starts_with(SUITE) || list.allows(skipped, host);
        self.skipped.iter().filter(|skipped| !judged(skipped)).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tests: BTreeSet<&str> = self.skipped.iter().map(|skipped| skipped.test.as_str()).collect();
        writeln!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed.len(), tests.len())?;
        for name in &self.failed {
            writeln!(f, "  failed   {name}")?;
        }
        for Skipped { test, reason } in &self.skipped {
            writeln!(f, "  skipped  {test}: {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARGO: &str = "
running 3 tests
..F
failures:

---- list::tests::x stdout ----
    some words of a test
failures:
    list::tests::x

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 10 tests
..........
test result: ok. 10 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
    const SUITE_OUTPUT: &str = "
test run::a ... ok (0.1 s)
test escape::qemu ... ignored, skipped: the machine is not QEMU
test run::b ... FAILED (0.1 s)

failures:
    run::b: it did not

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.20s
";

    fn skipped(test: &str, reason: &str) -> Skipped {
        Skipped { test: test.into(), reason: reason.into() }
    }

    #[test]
    fn what_cargo_counts_as_passed_and_was_skipped_is_skipped() {
        let report = read(CARGO, "vz-kvm::a\tno kvm\nvz-kvm::a\tno kvm\nvz-net::b\tno root\n");
        assert_eq!((report.passed, report.failed), (10, ["list::tests::x".to_owned()].into()));
        assert_eq!(report.skipped, [skipped("vz-kvm::a", "no kvm"), skipped("vz-net::b", "no root")].into());
    }

    #[test]
    fn the_suites_skips_and_failures_are_named() {
        let mut report = read(SUITE_OUTPUT, "");
        assert_eq!((report.passed, report.failed.clone()), (1, ["run::b".to_owned()].into()));
        assert_eq!(report.skipped, [skipped("suite::escape::qemu", "the machine is not QEMU")].into());
        report.add(read(CARGO, ""));
        assert_eq!(
            report.to_string(),
            "13 passed, 2 failed, 1 skipped\n  failed   list::tests::x\n  failed   run::b\n  \
             skipped  suite::escape::qemu: the machine is not QEMU\n"
        );
    }

    #[test]
    fn a_skip_that_is_not_on_the_list_is_found() {
        let list = List::parse("vz-kvm::* | no-kvm | open *").unwrap();
        let report = read(SUITE_OUTPUT, "vz-kvm::a\topen /dev/kvm\n");
        assert_eq!(report.skipped.len(), 2);
        assert_eq!(report.not_allowed(&list, &Host::of(["no-kvm"])), Vec::<&Skipped>::new());
        assert_eq!(report.not_allowed(&list, &Host::default()), [&skipped("vz-kvm::a", "open /dev/kvm")]);
    }
}
