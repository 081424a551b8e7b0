//! Runs tests one after the other, each between two looks at the host, and reports in the words of cargo's own harness.

use std::{
    any::Any,
    collections::BTreeMap,
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    time::{Duration, Instant},
};

use vz_tally::{Host, List, Skipped};

use crate::{
    Lab, lab, leaks,
    outside::{self, Outside},
    table::{self, Notes, Row},
};

/// Why a test cannot run here.
#[derive(Debug)]
pub struct Skip(pub String);

/// What a test returns; it fails by panicking.
pub type Verdict = Result<(), Skip>;

/// A test.
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// The module it is in.
    pub module: &'static str,
    /// Its name.
    pub name: &'static str,
    /// The test.
    pub run: fn(&Lab) -> Verdict,
}

impl Test {
    fn group(&self) -> &'static str {
        self.module.rsplit("::").next().unwrap_or_default()
    }

    fn full_name(&self) -> String {
        format!("{}::{}", self.group(), self.name)
    }

    /// Whether its guest is hostile, so that the whole host is looked at.
    fn is_scene(&self) -> bool {
        outside::BOUNDARY.contains(&self.group())
    }
}

/// What the command line asks for, as far as cargo's own harness has it.
#[derive(Debug, Default)]
struct Options {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
    only_ignored: bool,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--list" => options.list = true,
                "--exact" => options.exact = true,
                "--ignored" => options.only_ignored = true,
                "--skip" => options.skips.push(args.next().ok_or("--skip needs a name")?),
                // Of no meaning here: one test at a time, nothing is captured.
                "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q" | "--include-ignored" => {}
                "--test-threads" | "--color" | "--format" | "-Z" => drop(args.next()),
                arg if arg.starts_with("--test-threads=") || arg.starts_with("--color=") => {}
                arg if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
                _ => options.filters.push(arg),
            }
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        let matches = |pattern: &String| if self.exact { name == pattern } else { name.contains(pattern.as_str()) };
        (self.filters.is_empty() || self.filters.iter().any(matches)) && !self.skips.iter().any(matches)
    }
}

/// The `main` of the test program.
pub fn main(groups: &[&[Test]]) -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let all: Vec<Test> = groups.iter().flat_map(|group| group.iter().copied()).collect();
    let chosen: Vec<Test> =
        all.iter().copied().filter(|test| options.wants(&test.full_name()) && !options.only_ignored).collect();
    if options.list {
        for test in &chosen {
            println!("{}: test", test.full_name());
        }
        println!("\n{} tests, 0 benchmarks", chosen.len());
        return ExitCode::SUCCESS;
    }
    let begun = Instant::now();
    println!("\nrunning {} tests", chosen.len());
    let mut results =
        Results { filtered: all.len() - chosen.len(), list: List::known(), host: Host::look(), ..Default::default() };
    if !chosen.is_empty() {
        match Lab::set_up() {
            Ok(lab) => {
                results.host.add(if lab.chosen_machine() == "kvm" { "on-kvm" } else { "on-qemu" });
                run_all(&lab, &chosen, &mut results);
                results.print_table(lab.chosen_machine());
                lab.take_down();
            }
            Err(lab::Unfit::Skip(reason)) => {
                for test in &chosen {
                    results.add(test, Outcome::Skipped(reason.clone()), Duration::ZERO, Notes::default());
                }
            }
            Err(lab::Unfit::Broken(reason)) => {
                eprintln!("error: {reason}");
                results.failed.insert("set up the devbox".into(), vec![reason]);
            }
        }
    }
    results.report(begun.elapsed())
}

enum Outcome {
    Passed,
    Skipped(String),
    Failed(Vec<String>),
}

impl Outcome {
    /// A skip is a failure where the list of those that may be does not have it.
    fn judged(self, test: &Test, list: &List, host: &Host) -> Self {
        let Self::Skipped(reason) = self else { return self };
        let skipped = Skipped { test: format!("suite::{}", test.full_name()), reason };
        if list.allows(&skipped, host) {
            Self::Skipped(skipped.reason)
        } else {
            Self::Failed(vec![format!(
                "skipped, which integration/tally/skips does not allow here: {}",
                skipped.reason
            )])
        }
    }

    /// A word for the table of scenes, or why there was none.
    fn word(&self) -> String {
        match self {
            Self::Passed => "ok".into(),
            Self::Skipped(reason) => format!("skipped: {reason}"),
            Self::Failed(_) => "FAILED".into(),
        }
    }
}

#[derive(Default)]
struct Results {
    passed: usize,
    skipped: usize,
    filtered: usize,
    failed: BTreeMap<String, Vec<String>>,
    scenes: Vec<Row>,
    /// How many files were looked at after the last scene.
    files: usize,
    list: List,
    host: Host,
}

impl Results {
    fn add(&mut self, test: &Test, outcome: Outcome, took: Duration, notes: Notes) {
        let (name, took) = (test.full_name(), took.as_secs_f64());
        let outcome = outcome.judged(test, &self.list, &self.host);
        if test.is_scene() {
            self.scenes.push(Row { scene: name.clone(), outcome: outcome.word(), notes });
        }
        match outcome {
            Outcome::Passed => {
                println!("test {name} ... ok ({took:.1} s)");
                self.passed += 1;
            }
            Outcome::Skipped(reason) => {
                println!("test {name} ... ignored, skipped: {reason}");
                self.skipped += 1;
            }
            Outcome::Failed(reasons) => {
                println!("test {name} ... FAILED ({took:.1} s)");
                for reason in &reasons {
                    println!("    {}", reason.replace('\n', "\n    "));
                }
                self.failed.insert(name, reasons);
            }
        }
    }

    fn print_table(&self, machine: &str) {
        if !self.scenes.is_empty() {
            print!("{}", table::text(&self.scenes, machine, self.files));
        }
    }

    fn report(&self, took: Duration) -> ExitCode {
        if !self.failed.is_empty() {
            println!("\nfailures:");
            for (name, reasons) in &self.failed {
                let first = reasons.first().and_then(|reason| reason.lines().next()).unwrap_or_default();
                println!("    {name}: {first}");
            }
        }
        let result = if self.failed.is_empty() { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {result}. {} passed; {} failed; {} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
            self.passed,
            self.failed.len(),
            self.skipped,
            self.filtered,
            took.as_secs_f64()
        );
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(101) }
    }
}

fn run_all(lab: &Lab, tests: &[Test], results: &mut Results) {
    // What a panic says is reported with its test; where it was is said at once.
    panic::set_hook(Box::new(|info| {
        if let Some(location) = info.location() {
            println!("failed at {location}");
        }
    }));
    // How the host looks after a test is how it looks before the next one; where something was left, it is looked at
    // again.
    let mut known = None;
    for test in tests {
        let begun = Instant::now();
        let before = known.take().unwrap_or_else(|| leaks::Snapshot::take(lab));
        let outside = test.is_scene().then(|| Outside::look(lab, &before));
        let (outcome, after) = run(lab, test, &before, outside.as_ref());
        known = after;
        results.files = outside.map_or(results.files, |outside| outside.files());
        results.add(test, outcome, begun.elapsed(), lab.take_notes());
    }
    drop(panic::take_hook());
}

fn run(
    lab: &Lab,
    test: &Test,
    before: &leaks::Snapshot,
    outside: Option<&Outside>,
) -> (Outcome, Option<leaks::Snapshot>) {
    let mark = lab.log_position();
    let result = panic::catch_unwind(AssertUnwindSafe(|| (test.run)(lab)));
    let mut reasons = Vec::new();
    if let Err(payload) = &result {
        reasons.push(panic_text(payload.as_ref()));
    }
    // What a failed test leaves behind is a leak only if it outlives the removal of its containers.
    let swept = panic::catch_unwind(AssertUnwindSafe(|| lab.sweep()));
    match swept {
        Ok(left) if left.is_empty() => {}
        Ok(left) if result.is_ok() => reasons.push(format!("containers left by the test: {}", left.join(", "))),
        Ok(_) => {}
        Err(payload) => reasons.push(format!("removing its containers: {}", panic_text(payload.as_ref()))),
    }
    let (left, after) = before.settle(lab);
    if !left.is_empty() {
        let list: Vec<_> = left.iter().map(|item| format!("\n  {item}")).collect();
        reasons.push(format!("leaked:{}", list.concat()));
        leaks::kill(&left);
    }
    let changes = outside.map(|outside| outside.changes(&Outside::look(lab, &after))).unwrap_or_default();
    if !changes.is_empty() {
        reasons.push(format!("outside of the sandbox:\n  {}", changes.join("\n  ")));
        lab.plant().expect("put back what was planted");
    }
    let outcome = match result {
        _ if !reasons.is_empty() => {
            let log = lab.log_since(mark);
            if !log.is_empty() {
                reasons.push(format!("containerd's log:\n{log}"));
            }
            Outcome::Failed(reasons)
        }
        Ok(Err(Skip(reason))) => Outcome::Skipped(reason),
        _ => Outcome::Passed,
    };
    (outcome, left.is_empty().then_some(after))
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "panicked".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(args: &[&str], name: &str) -> bool {
        Options::parse(args.iter().map(|arg| (*arg).to_owned())).unwrap().wants(name)
    }

    #[test]
    fn tests_are_chosen_as_cargos_own_harness_does() {
        assert!(wants(&[], "run::a"));
        assert!(wants(&["exec::", "run::"], "run::a"));
        assert!(!wants(&["exec::"], "run::a"));
        assert!(!wants(&["run::", "--skip", "::a"], "run::a"));
        assert!(!wants(&["--exact", "run::"], "run::a"));
        assert!(wants(&["--test-threads=1", "--nocapture", "--color", "never", "run"], "run::a"));
        assert!(Options::parse(["--no-such-option".to_owned()].into_iter()).is_err());
    }
}
