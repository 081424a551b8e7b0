//! Programs with a deadline, their output in files: whoever else holds the files open cannot keep a test waiting.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs::File,
    io::{self, Read, Seek},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};

use crate::poll::{patiently, try_until};

/// How long a program may take if a test does not say otherwise; generous, for a machine that is emulated.
const DEADLINE: Duration = Duration::from_secs(90);
/// Bytes of output that a failure quotes.
const QUOTED: usize = 3000;

/// A program that is about to be run.
#[derive(Debug)]
pub struct Program {
    command: Command,
    stdin: Input,
    deadline: Duration,
}

#[derive(Debug)]
enum Input {
    Null,
    Pipe,
    File(File),
}

impl Program {
    /// `name` is looked up in the path of `env`.
    pub fn new(name: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(name);
        // Its own process group: what it starts is ended with it.
        command.process_group(0);
        Self { command, stdin: Input::Null, deadline: DEADLINE }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Takes variables.
    #[must_use]
    pub fn envs<'a>(mut self, variables: impl IntoIterator<Item = &'a (String, String)>) -> Self {
        self.command.envs(variables.into_iter().map(|(name, value)| (name, value)));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<std::path::Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Reads `file`, from its start, instead of nothing.
    #[must_use]
    pub fn stdin(mut self, file: File) -> Self {
        self.stdin = Input::File(file);
        self
    }

    /// Reads these bytes instead of nothing.
    #[must_use]
    pub fn input(self, bytes: &[u8]) -> Self {
        let mut file = tempfile::tempfile().expect("make a temporary file");
        io::Write::write_all(&mut file, bytes).and_then(|()| file.rewind()).expect("write a temporary file");
        self.stdin(file)
    }

    /// Reads a pipe; see [`Running::stdin`].
    #[must_use]
    pub fn piped(mut self) -> Self {
        self.stdin = Input::Pipe;
        self
    }

    /// May take this long, [`patiently`].
    #[must_use]
    pub fn deadline(mut self, seconds: u64) -> Self {
        self.deadline = Duration::from_secs(seconds);
        self
    }

    /// Starts it.
    #[track_caller]
    pub fn start(mut self) -> Running {
        let (stdout, stderr) = (tempfile::tempfile(), tempfile::tempfile());
        let (stdout, stderr) = (stdout.expect("make a temporary file"), stderr.expect("make a temporary file"));
        let clone = |file: &File| Stdio::from(file.try_clone().expect("duplicate a descriptor"));
        self.command.stdout(clone(&stdout)).stderr(clone(&stderr)).stdin(match self.stdin {
            Input::Null => Stdio::null(),
            Input::Pipe => Stdio::piped(),
            Input::File(file) => Stdio::from(file),
        });
        let text = text(&self.command);
        let begun = Instant::now();
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("run {text}: {e}"));
        let stdin = child.stdin.take();
        Running { child: Some(child), text, stdout, stderr, stdin, begun, deadline: self.deadline }
    }

    /// Runs it to its end, or fails the test when that takes too long.
    #[track_caller]
    pub fn run(self) -> Output {
        self.start().wait()
    }
}

fn text(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        let quote = if arg.is_empty() || arg.contains([' ', '\n', '$', '"', ';']) { "'" } else { "" };
        write!(text, " {quote}{arg}{quote}").expect("write to a string");
    }
    text
}

/// A running program; dropped, it and all in its process group are killed.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    text: String,
    stdout: File,
    stderr: File,
    /// Its standard input, where that is a pipe; dropping it is the end of file.
    pub stdin: Option<ChildStdin>,
    begun: Instant,
    deadline: Duration,
}

impl Running {
    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&contents(&self.stdout)).into_owned()
    }

    /// What it has complained of so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&contents(&self.stderr)).into_owned()
    }

    /// Waits until it has written `wanted`.
    #[track_caller]
    pub fn expect(&self, wanted: &str) {
        let found = try_until(self.deadline, || self.stdout().contains(wanted).then_some(()));
        if found.is_none() {
            panic!("{}: wrote no {wanted:?}: {:?} {:?}", self.text, self.stdout(), self.stderr());
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.as_ref().and_then(|child| Pid::from_raw(i32::try_from(child.id()).ok()?)) {
            rustix::process::kill_process(pid, signal).expect("send a signal to a child");
        }
    }

    /// Waits for its end, or fails the test when that takes too long.
    #[track_caller]
    pub fn wait(mut self) -> Output {
        let deadline = patiently(self.deadline);
        match self.wait_for(deadline.saturating_sub(self.begun.elapsed())) {
            Some(output) => output,
            None => {
                let (out, err) = (self.stdout(), self.stderr());
                panic!("{}: not done after {} s\n{}{}", self.text, deadline.as_secs(), quote(&out), quote(&err))
            }
        }
    }

    /// Waits for its end for at most this long, [`patiently`].
    pub fn wait_at_most(&mut self, time: Duration) -> Option<Output> {
        self.wait_for(patiently(time))
    }

    fn wait_for(&mut self, time: Duration) -> Option<Output> {
        drop(self.stdin.take());
        let child = self.child.as_mut()?;
        if !ended(child, time) {
            return None;
        }
        let status = child.wait().expect("wait for a child");
        self.child = None;
        Some(Output {
            text: self.text.clone(),
            status,
            stdout: contents(&self.stdout),
            stderr: contents(&self.stderr),
            took: self.begun.elapsed(),
        })
    }
}

fn ended(child: &Child, time: Duration) -> bool {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a child has a pid");
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("open a child's pidfd");
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a deadline fits");
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.expect("poll a pidfd") > 0,
        }
    }
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut at = 0;
    // By offset: the position is shared with the program that writes.
    let mut part = vec![0; 1 << 16];
    loop {
        match std::os::unix::fs::FileExt::read_at(file, &mut part, at) {
            Ok(0) => return bytes,
            Ok(n) => {
                bytes.extend_from_slice(&part[..n]);
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => panic!("read a temporary file: {e}"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
        drop(child.wait());
    }
}

/// What became of a program.
#[derive(Debug, Clone)]
pub struct Output {
    text: String,
    status: ExitStatus,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it complained of.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

impl Output {
    /// Its exit code; 128 and the signal, where one ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }

    /// Its output, trimmed.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Its complaints.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// Fails the test unless it succeeded; else its output, trimmed.
    #[track_caller]
    pub fn ok(&self) -> String {
        self.exits(0).text()
    }

    /// Fails the test unless it ended with this code.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Self {
        assert!(self.code() == code, "exit code {} instead of {code}: {self}", self.code());
        self
    }

    /// Fails the test unless it failed; else its complaints.
    #[track_caller]
    pub fn fails(&self) -> String {
        assert!(self.code() != 0, "succeeded, should have failed: {self}");
        self.errors()
    }

    /// Fails the test unless it failed, and its complaints have all these parts.
    #[track_caller]
    pub fn fails_with(&self, parts: &[&str]) -> String {
        let said = self.fails();
        for part in parts {
            assert!(said.contains(part), "no {part:?} in the error: {self}");
        }
        said
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (out, err) = (String::from_utf8_lossy(&self.stdout), String::from_utf8_lossy(&self.stderr));
        write!(f, "{}\n  {} after {:.1} s", self.text, self.status, self.took.as_secs_f64())?;
        for (name, text) in [("stdout", out), ("stderr", err)] {
            if !text.trim().is_empty() {
                write!(f, "\n  {name}: {}", quote(&text))?;
            }
        }
        Ok(())
    }
}

fn quote(text: &str) -> String {
    let text = text.trim();
    if text.contains('\0') || text.contains('\u{fffd}') {
        return format!("{} bytes that are no text", text.len());
    }
    let mut start = text.len().saturating_sub(QUOTED);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    if start == 0 { text.to_owned() } else { format!("[...] {}", &text[start..]) }
}

/// A program's arguments, from words.
pub fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

/// Reads a whole file, for tests that compare.
#[track_caller]
pub fn read(path: impl AsRef<std::path::Path>) -> Vec<u8> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    bytes
}
