//! A container's standard streams, between the descriptors that its caller left and the daemon.
//!
//! The daemon opens pipes, by their place in /proc, and waits for them as it likes: what it opens is its own, so a
//! caller never finds its descriptors changed. A caller's pipe is handed on as it is; for everything else (a terminal,
//! a file, a socket) there is a pipe of ours and a thread that copies, with calls that block.

use std::{
    fs::{File, OpenOptions},
    io::{self, PipeReader, PipeWriter, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::error::Error;

/// How long the last of the output may take to be taken once its process has ended.
const DRAIN: Duration = Duration::from_secs(10);
const BUFFER: usize = 64 * 1024;
/// Where what is written vanishes: makedev(1, 3).
const NULL: u64 = 0x103;

/// What the daemon is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Empty, or where stdin comes from.
    pub stdin: String,
    /// Empty, or where stdout goes to.
    pub stdout: String,
    /// Empty, or where stderr goes to.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// The streams of a process that is about to be made.
#[derive(Debug)]
pub struct Stdio {
    addresses: Addresses,
    null: File,
    /// Opened anew by the daemon; ours only until then.
    handed: Vec<OwnedFd>,
    input: Option<(File, PipeWriter)>,
    outputs: Vec<(PipeReader, File)>,
}

/// Running copies.
#[derive(Debug)]
pub struct Copies {
    outputs: Vec<mpsc::Receiver<()>>,
    ended: PipeWriter,
}

fn address(fd: &OwnedFd) -> String {
    format!("pipe:///proc/{}/fd/{}", std::process::id(), fd.as_raw_fd())
}

fn duplicate(fd: impl AsFd) -> Result<OwnedFd, Error> {
    fd.as_fd().try_clone_to_owned().map_err(Error::step("duplicate standard stream"))
}

impl Stdio {
    /// The caller's three streams.
    pub fn inherited() -> Result<Self, Error> {
        Self::streams(duplicate(io::stdin())?, duplicate(io::stdout())?, duplicate(io::stderr())?)
    }

    fn streams(stdin: OwnedFd, stdout: OwnedFd, stderr: OwnedFd) -> Result<Self, Error> {
        let mut this = Self::new()?;
        this.addresses.stdin = this.read_from(stdin.into())?;
        this.addresses.stdout = this.write_to(stdout.into())?;
        this.addresses.stderr = this.write_to(stderr.into())?;
        Ok(this)
    }

    /// A terminal: what is typed, and what is shown.
    pub fn terminal(keyboard: OwnedFd, screen: OwnedFd) -> Result<Self, Error> {
        let mut this = Self::new()?;
        this.addresses.terminal = true;
        this.addresses.stdin = this.read_from(keyboard.into())?;
        this.addresses.stdout = this.write_to(screen.into())?;
        Ok(this)
    }

    fn new() -> Result<Self, Error> {
        let null =
            OpenOptions::new().read(true).write(true).open("/dev/null").map_err(Error::at("open", "/dev/null"))?;
        Ok(Self { addresses: Addresses::default(), null, handed: Vec::new(), input: None, outputs: Vec::new() })
    }

    fn read_from(&mut self, file: File) -> Result<String, Error> {
        match kind(&file)? {
            Kind::Null => Ok(String::new()),
            Kind::Pipe => Ok(self.hand(file)),
            Kind::Other => {
                let (read, write) = io::pipe().map_err(Error::step("make pipe"))?;
                self.input = Some((file, write));
                Ok(self.hand(read))
            }
        }
    }

    fn write_to(&mut self, file: File) -> Result<String, Error> {
        match kind(&file)? {
            Kind::Null => Ok(String::new()),
            Kind::Pipe => Ok(self.hand(file)),
            Kind::Other => {
                let (read, write) = io::pipe().map_err(Error::step("make pipe"))?;
                self.outputs.push((read, file));
                Ok(self.hand(write))
            }
        }
    }

    fn hand(&mut self, fd: impl Into<OwnedFd>) -> String {
        let fd = fd.into();
        let address = address(&fd);
        self.handed.push(fd);
        address
    }

    /// What the daemon is told; valid until [`begin`](Self::begin).
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The daemon has opened its ends: lets go of the caller's descriptors, and begins to copy. Starts threads.
    pub fn begin(self) -> Result<Copies, Error> {
        drop(self.handed);
        let place = Error::step::<nix::errno::Errno>;
        nix::unistd::dup2_stdin(&self.null).map_err(place("replace stdin"))?;
        nix::unistd::dup2_stdout(&self.null).map_err(place("replace stdout"))?;
        nix::unistd::dup2_stderr(&self.null).map_err(place("replace stderr"))?;
        let (ending, ended) = io::pipe().map_err(Error::step("make pipe"))?;
        let ending = Arc::new(ending);
        if let Some((from, to)) = self.input {
            thread::spawn(move || copy_in(from, to));
        }
        let mut outputs = Vec::new();
        for (from, to) in self.outputs {
            let (done, told) = mpsc::channel();
            let ending = ending.clone();
            thread::spawn(move || {
                copy_out(from, to, &ending);
                drop(done);
            });
            outputs.push(told);
        }
        Ok(Copies { outputs, ended })
    }
}

impl Copies {
    /// The process has ended: what it has written is passed on, as far as it is taken in time.
    pub fn finish(self) {
        drop(self.ended);
        for output in self.outputs {
            // Nothing is ever sent: it is the end that counts.
            let _ = output.recv_timeout(DRAIN);
        }
    }
}

enum Kind {
    Null,
    Pipe,
    Other,
}

fn kind(file: &File) -> Result<Kind, Error> {
    let meta = file.metadata().map_err(Error::step("look at standard stream"))?;
    Ok(match meta.file_type() {
        kind if kind.is_fifo() => Kind::Pipe,
        kind if kind.is_char_device() && meta.rdev() == NULL => Kind::Null,
        _ => Kind::Other,
    })
}

fn copy_in(mut from: File, mut to: PipeWriter) {
    let mut buffer = vec![0; BUFFER];
    // Its end, of whatever kind, is the end of the process's input: dropping the pipe says so.
    while let Ok(n @ 1..) = retry(|| from.read(&mut buffer)) {
        if to.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

fn copy_out(mut from: PipeReader, mut to: File, ending: &PipeReader) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let readable = {
            let mut fds =
                [PollFd::new(from.as_fd(), PollFlags::POLLIN), PollFd::new(ending.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => return,
                Ok(_) => fds[0].any().unwrap_or_default(),
            }
        };
        // Nothing there, and no more to come: whoever else holds the pipe is not waited for.
        if !readable {
            return;
        }
        match retry(|| from.read(&mut buffer)) {
            Ok(n @ 1..) if to.write_all(&buffer[..n]).is_ok() => {}
            // Dropping the pipe tells the process that nobody reads any more.
            _ => return,
        }
    }
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Seek};

    use super::*;

    #[test]
    fn a_pipe_is_handed_on_and_null_is_nothing() {
        let (read, _write) = io::pipe().unwrap();
        let null = || OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/null").unwrap());
        let number = read.as_raw_fd();
        let stdio = Stdio::streams(read.into(), null(), null()).unwrap();
        let pid = std::process::id();
        let wanted = Addresses { stdin: format!("pipe:///proc/{pid}/fd/{number}"), ..Default::default() };
        assert_eq!(*stdio.addresses(), wanted);
        assert!(stdio.input.is_none() && stdio.outputs.is_empty());
    }

    #[test]
    fn what_is_no_pipe_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.write_all(b"before\n").unwrap();
        let (from, mut to) = io::pipe().unwrap();
        let (ending, ended) = io::pipe().unwrap();
        let copy = file.try_clone().unwrap();
        let held = to.try_clone().unwrap();
        let thread = thread::spawn(move || copy_out(from, copy, &ending));
        to.write_all(b"said\n").unwrap();
        drop(to);
        // Somebody still holds the pipe, and is not waited for.
        drop(ended);
        thread.join().unwrap();
        drop(held);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nsaid\n");
        assert_eq!(file.stream_position().unwrap(), 12);
    }

    #[test]
    fn a_reader_that_goes_ends_the_copy() {
        let (from, mut to) = io::pipe().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let (_ended, ending) = io::pipe().map(|(r, w)| (w, r)).unwrap();
        drop(reader);
        let thread = thread::spawn(move || copy_out(from, OwnedFd::from(writer).into(), &ending));
        while to.write_all(b"y\n").is_ok() {}
        thread.join().unwrap();
    }
}
