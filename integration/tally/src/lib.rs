//! Which tests were skipped, and whether they may be: a test that cannot run here must not count as one that passed.
//!
//! A unit test that cannot run calls [`skip!`] and returns. cargo's harness knows no such thing and counts it as
//! passed; with `VZ_TEST_SKIPS` naming a file, it is written down there too, which is how `make test` counts it, and
//! fails where [`List::known`] does not have it.

use std::{env, fmt, fs::File, io::Write as _, thread};

mod host;
mod list;
mod report;

pub use host::Host;
pub use list::{Entry, Invalid, List};
pub use report::{Report, read};

/// The variable that names the file for tests that were skipped.
pub const FILE: &str = "VZ_TEST_SKIPS";

/// A test that was skipped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped {
    /// `PACKAGE::MODULE::TEST`.
    pub test: String,
    /// What it said.
    pub reason: String,
}

/// Says that the test that runs here cannot, and why; the arguments are those of `format!`. The test returns
/// afterwards.
///
/// Its name is its thread's, which is how cargo's harness runs tests. A test that has threads of its own, or no
/// harness, names itself: `skip!(test: "name", "not root")`.
#[macro_export]
macro_rules! skip {
    (test: $test:expr, $($reason:tt)*) => {
        $crate::record(env!("CARGO_PKG_NAME"), $test, ::core::format_args!($($reason)*))
    };
    ($($reason:tt)*) => {
        $crate::record(env!("CARGO_PKG_NAME"), &$crate::running(), ::core::format_args!($($reason)*))
    };
}

/// The name of the test that runs on this thread.
pub fn running() -> String {
    let thread = thread::current();
    thread.name().expect("a test that skips on a thread of its own names itself").to_owned()
}

/// Writes down a test that is skipped.
pub fn record(package: &str, test: &str, reason: fmt::Arguments<'_>) {
    let reason = reason.to_string().replace(['\n', '\t'], " ");
    println!("skipped: {package}::{test}: {reason}");
    if let Some(path) = env::var_os(FILE).filter(|path| !path.is_empty()) {
        // One write, so that tests of several programs at a time do not mix.
        let line = format!("{package}::{test}\t{reason}\n");
        let written =
            File::options().create(true).append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
        written.unwrap_or_else(|e| panic!("write {}: {e}", path.display()));
    }
}
