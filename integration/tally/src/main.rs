//! `vz-tally DIR [NAME]`: the sum of all runs of tests whose output is in a directory, or of one, as `mk/tallied`
//! writes it: `NAME.log` is what was printed, `NAME.skips` what skipped tests wrote down. Fails where a test was
//! skipped that may not be.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use vz_tally::{Host, List, Report, read};

fn main() -> ExitCode {
    let Some(dir) = env::args_os().nth(1) else {
        eprintln!("usage: vz-tally DIRECTORY [NAME]");
        return ExitCode::from(2);
    };
    let only = env::args_os().nth(2);
    let mut all = Report::default();
    let mut names: Vec<_> = match fs::read_dir(&dir) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(e) => {
            eprintln!("vz-tally: list {}: {e}", Path::new(&dir).display());
            return ExitCode::FAILURE;
        }
    };
    names.sort();
    let wanted = |path: &&PathBuf| only.as_deref().is_none_or(|name| path.file_stem() == Some(name));
    for log in names.iter().filter(wanted).filter(|path| path.extension().is_some_and(|end| end == "log")) {
        let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        all.add(read(&text(log), &text(&log.with_extension("skips"))));
    }
    print!("\ntests: {all}");
    let (list, host) = (List::known(), Host::look());
    let wrong = all.not_allowed(&list, &host);
    for skipped in &wrong {
        eprintln!(
            "error: {} may not be skipped here: integration/tally/skips does not have it: {}",
            skipped.test, skipped.reason
        );
    }
    if wrong.is_empty() && all.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
