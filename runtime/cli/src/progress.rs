//! What a long step is at, on a terminal; nowhere else.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, IsTerminal},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the clock moves.
const TICK: Duration = Duration::from_millis(120);
/// Lines of a program that has failed which are shown.
const TAIL: usize = 30;

/// A step under way; it vanishes from the screen with this.
#[derive(Debug)]
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// Begins to show `what`, if standard error is a terminal.
    pub fn begin(what: &str) -> Self {
        if !io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        // The form is a constant, and good; without it there is another one.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {prefix}: {wide_msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(TICK);
        Self(Some(bar))
    }

    /// Shows what it is at.
    pub fn at(&self, what: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(what.to_owned());
        }
    }

    /// Runs a program. On a terminal its last line is shown, and the end of its words if it fails; else its words go to
    /// standard error, as they come.
    pub fn run(&self, command: &mut Command) -> io::Result<ExitStatus> {
        let Some(bar) = &self.0 else { return command.stdout(Stdio::from(io::stderr())).status() };
        let (said, to) = io::pipe()?;
        let mut child = command.stdin(Stdio::null()).stdout(to.try_clone()?).stderr(to).spawn()?;
        // It holds the pipe's other end too, until it is given another one.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let tail = follow(said, |line| self.at(line));
        let status = child.wait()?;
        if !status.success() {
            bar.suspend(|| tail.iter().for_each(|line| eprintln!("{line}")));
        }
        Ok(status)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Calls `each` with every line, and returns the last ones.
fn follow(said: impl io::Read, mut each: impl FnMut(&str)) -> VecDeque<String> {
    let mut tail = VecDeque::new();
    for line in BufReader::new(said).split(b'\n') {
        // Whatever is wrong with the pipe, its program's status counts.
        let Ok(line) = line else { break };
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        each(&line);
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let text: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let mut seen = 0;
        let tail = follow(text.as_bytes(), |_| seen += 1);
        assert_eq!((seen, tail.len()), (100, TAIL));
        assert_eq!((tail[0].as_str(), tail[TAIL - 1].as_str()), ("line 70", "line 99"));
    }

    #[test]
    fn a_programs_status_comes_back() {
        let status = Progress(None).run(Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(status.code(), Some(3));
        let bar = Progress(Some(ProgressBar::hidden()));
        assert_eq!(bar.run(Command::new("sh").args(["-c", "echo x; exit 4"])).unwrap().code(), Some(4));
    }
}
