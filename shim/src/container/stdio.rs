//! A process's standard streams between containerd's side (fifo, file, logger) and the guest's vsock streams.
//!
//! containerd's forms (runtime v2 README, "IO"): a bare path or `fifo://` is a fifo that a client has open,
//! `file://` is appended to, `binary://` is a program that gets both outputs. One form is our own: `pipe://` is a pipe
//! whose other end is somebody's already, as the command line `vz` inherits it (`/proc/PID/fd/N`). Opened anew, it can
//! be waited for without its owner noticing; and when the other end goes, so does ours, and the process is told.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    task::{AbortHandle, JoinHandle},
};
use vz_sys::surroundings::Surroundings;

use crate::container::logger::{self, Logger};
use vz_sys::sync::lock;

/// First and longest pause before a fifo is looked at again for output that its client has not read yet.
const UNREAD_PAUSES: (Duration, Duration) = (Duration::from_millis(2), Duration::from_secs(1));
/// Bytes per copy.
const BUFFER: usize = 64 * 1024;

/// The streams of a process, as its client asked for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Empty, or where stdin comes from.
    pub stdin: String,
    /// Empty, or where stdout goes to.
    pub stdout: String,
    /// Empty, or where stderr goes to.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The form of its address is not known.
    #[error("stdio {uri:?}: scheme {scheme:?} is not supported, use a fifo, file://, pipe:// or binary://")]
    Scheme {
        /// The address.
        uri: String,
        /// Its scheme.
        scheme: String,
    },
    /// It could not be opened.
    #[error("open {stream} {path}")]
    Open {
        /// `stdin`, `stdout`, `stderr`.
        stream: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The logging program.
    #[error(transparent)]
    Logger(#[from] logger::Error),
}

/// containerd's side of a process's streams, open.
#[derive(Debug)]
pub struct ClientEnds {
    stdin: Option<Stdin>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

#[derive(Debug)]
struct Stdin {
    from: pipe::Receiver,
    /// Keeps a fifo from looking ended before a client has opened it, until CloseIO.
    hold: Option<pipe::Sender>,
}

#[derive(Debug)]
enum Sink {
    Fifo(pipe::Sender),
    Pipe(pipe::Sender),
    File(tokio::fs::File),
}

/// The guest's side: a connected stream for each that is wanted.
#[derive(Debug, Default)]
pub struct GuestEnds {
    /// Towards the process; unused with a terminal.
    pub stdin: Option<UnixStream>,
    /// From the process; both ways with a terminal.
    pub stdout: Option<UnixStream>,
    /// From the process.
    pub stderr: Option<UnixStream>,
}

/// Running copies of a process's streams.
#[derive(Debug, Default)]
pub struct Copies {
    outputs: tokio::sync::Mutex<Vec<JoinHandle<()>>>,
    /// Of all copies: they can be ended while somebody waits for them.
    aborts: Vec<AbortHandle>,
    hold: Mutex<Option<pipe::Sender>>,
    logger: Mutex<Option<Arc<Logger>>>,
    /// Whether the output was waited for in vain.
    late: AtomicBool,
}

impl Stdio {
    /// Which streams the guest must provide: stdin, stdout, stderr.
    pub fn wanted(&self) -> (bool, bool, bool) {
        let set = |uri: &String| !uri.is_empty();
        if self.terminal {
            (false, set(&self.stdin) || set(&self.stdout), false)
        } else {
            (set(&self.stdin), set(&self.stdout), set(&self.stderr))
        }
    }
}

/// Opens containerd's side. `id` and `namespace` are told to a logging program, which starts in `surroundings`.
pub async fn open(
    stdio: &Stdio,
    id: &str,
    namespace: &str,
    surroundings: Option<&Surroundings>,
) -> Result<ClientEnds, Error> {
    let stdin = if stdio.stdin.is_empty() { None } else { Some(open_stdin(&stdio.stdin)?) };
    let mut host = ClientEnds { stdin, stdout: None, stderr: None, logger: None };
    let (scheme, path) = split(&stdio.stdout);
    if scheme == "binary" {
        let want_stderr = !stdio.stderr.is_empty() && !stdio.terminal;
        let (logger, stdout, stderr) = Logger::start(&stdio.stdout, path, id, namespace, surroundings).await?;
        let sink =
            |fd: OwnedFd, stream| pipe::Sender::from_owned_fd(fd).map(Sink::Fifo).map_err(open_error(stream, path));
        host.stdout = Some(sink(stdout, "stdout")?);
        host.stderr = if want_stderr { Some(sink(stderr, "stderr")?) } else { None };
        host.logger = Some(logger);
        return Ok(host);
    }
    host.stdout = open_sink("stdout", &stdio.stdout)?;
    if !stdio.terminal {
        host.stderr = open_sink("stderr", &stdio.stderr)?;
    }
    Ok(host)
}

fn open_stdin(uri: &str) -> Result<Stdin, Error> {
    let (scheme, path) = split(uri);
    if scheme != "fifo" && scheme != "pipe" {
        return Err(Error::Scheme { uri: uri.into(), scheme: scheme.into() });
    }
    let from = pipe::OpenOptions::new().open_receiver(path).map_err(open_error("stdin", path))?;
    let hold = match scheme {
        "pipe" => None,
        _ => Some(pipe::OpenOptions::new().open_sender(path).map_err(open_error("stdin", path))?),
    };
    Ok(Stdin { from, hold })
}

fn open_sink(stream: &'static str, uri: &str) -> Result<Option<Sink>, Error> {
    if uri.is_empty() {
        return Ok(None);
    }
    let (scheme, path) = split(uri);
    match scheme {
        // Open for reading too: the client may go away and come back, and writing must not fail in between.
        "fifo" => pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(path)
            .map(Sink::Fifo)
            .map(Some)
            .map_err(open_error(stream, path)),
        "pipe" => {
            pipe::OpenOptions::new().open_sender(path).map(|to| Some(Sink::Pipe(to))).map_err(open_error(stream, path))
        }
        "file" => OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .map(|file| Some(Sink::File(file.into())))
            .map_err(open_error(stream, path)),
        _ => Err(Error::Scheme { uri: uri.into(), scheme: scheme.into() }),
    }
}

fn open_error(stream: &'static str, path: &str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Open { stream, path: path.into(), source }
}

/// Splits `scheme://path?query` into scheme and path; a bare path is a fifo.
fn split(uri: &str) -> (&str, &str) {
    match uri.split_once("://") {
        None => ("fifo", uri),
        Some((scheme, rest)) => (scheme, rest.split_once('?').map_or(rest, |(path, _)| path)),
    }
}

impl ClientEnds {
    /// Starts copying.
    pub fn connect(self, guest: GuestEnds, terminal: bool) -> Copies {
        let (mut outputs, mut aborts) = (Vec::new(), Vec::new());
        let mut hold = None;
        let (from_guest, mut to_guest) = match guest.stdout {
            None => (None, None),
            Some(stream) if terminal => {
                let (from, to) = stream.into_split();
                (Some(from), Some(to))
            }
            Some(stream) => (Some(stream.into_split().0), None),
        };
        if let Some(stream) = guest.stdin {
            to_guest = Some(stream.into_split().1);
        }
        if let (Some(from), Some(sink)) = (from_guest, self.stdout) {
            outputs.push(tokio::spawn(copy_out("stdout", from, sink)));
        }
        if let (Some(stream), Some(sink)) = (guest.stderr, self.stderr) {
            outputs.push(tokio::spawn(copy_out("stderr", stream.into_split().0, sink)));
        }
        if let (Some(stdin), Some(to)) = (self.stdin, to_guest) {
            aborts.push(tokio::spawn(copy_in(stdin.from, to, terminal)).abort_handle());
            hold = stdin.hold;
        }
        aborts.extend(outputs.iter().map(JoinHandle::abort_handle));
        Copies {
            outputs: tokio::sync::Mutex::new(outputs),
            aborts,
            hold: Mutex::new(hold),
            logger: Mutex::new(self.logger.map(Arc::new)),
            late: AtomicBool::new(false),
        }
    }

    /// These, and what `work` makes. After its failure they are closed: there will be nothing to copy.
    pub async fn with<T, E>(self, work: impl Future<Output = Result<T, E>>) -> Result<(Self, T), E> {
        match work.await {
            Ok(made) => Ok((self, made)),
            Err(error) => {
                self.close().await;
                Err(error)
            }
        }
    }

    /// Closes everything again.
    async fn close(self) {
        let Self { logger, .. } = self;
        if let Some(logger) = logger {
            logger.end(false).await;
        }
    }
}

impl Copies {
    /// stdin ends after what the client has written already.
    pub fn close_stdin(&self) {
        drop(lock(&self.hold).take());
    }

    /// Waits until all output has been passed on, at most for `deadline`; copying goes on afterwards.
    ///
    /// A logging program may take its container's exit for the end of its own work (nerdctl's does, and what it has not
    /// read by then is lost), so it gets to read everything, and end, before.
    pub async fn drain(&self, deadline: Duration) -> bool {
        let mut outputs = self.outputs.lock().await;
        let logger = lock(&self.logger).clone();
        let all = async {
            while let Some(copy) = outputs.last_mut() {
                // A copy ends with its stream; what failed has been logged. It can be waited for once only.
                drop(copy.await);
                outputs.pop();
            }
            if let Some(logger) = logger
                && let Err(error) = logger.ended().await
            {
                tracing::warn!(%error, "wait for logging program");
            }
        };
        let drained = tokio::time::timeout(deadline, all).await.is_ok();
        if !drained {
            self.give_up();
        }
        drained
    }

    /// Nobody waits for the output any more; copying goes on.
    pub fn give_up(&self) {
        self.late.store(true, Ordering::Relaxed);
    }

    /// Ends everything: streams are closed, a logging program is told and waited for.
    pub async fn close(&self) {
        self.close_stdin();
        self.aborts.iter().for_each(AbortHandle::abort);
        let logger = lock(&self.logger).take();
        if let Some(logger) = logger {
            logger.end(self.late.load(Ordering::Relaxed)).await;
        }
    }
}

async fn copy_out(stream: &'static str, mut from: impl AsyncRead + Unpin, sink: Sink) {
    let copied = match sink {
        Sink::Fifo(mut to) => {
            let copied = copy(&mut from, &mut to).await;
            // A fifo forgets what it holds with its last descriptor, and a client may not have opened its end yet:
            // ours stays until everything has been read, or until the process is deleted. No event tells that a fifo is
            // empty: POLLOUT comes with the first free page, and inotify misses readers that splice. The pauses grow
            // with the time that the client takes, so that it learns of the end at most as late again.
            let (mut pause, longest) = UNREAD_PAUSES;
            while copied.is_ok() && vz_sys::channel::unread(to.as_fd()).is_ok_and(|unread| unread > 0) {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
            copied
        }
        Sink::Pipe(to) => match copy(&mut from, to).await {
            // Its reader has seen enough, and so the process is told, by the end of its stream.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return tracing::debug!(stream, "output has no reader"),
            copied => copied,
        },
        Sink::File(to) => copy(&mut from, to).await,
    };
    if let Err(error) = copied {
        tracing::warn!(%error, stream, "copy output");
        // A full disk or a dead logging program is not the process's fault, and shall not stop it.
        if let Err(error) = copy(from, tokio::io::sink()).await {
            tracing::debug!(%error, stream, "pass over output");
        }
    }
}

async fn copy_in(from: pipe::Receiver, mut to: tokio::net::unix::OwnedWriteHalf, terminal: bool) {
    match copy(from, &mut to).await {
        Ok(()) if terminal => {}
        // The half-close is the process's end of file, in order after the data.
        Ok(()) => {
            if let Err(error) = to.shutdown().await {
                tracing::debug!(%error, "close stdin");
            }
        }
        // The process has closed its end, or ended.
        Err(error) => tracing::debug!(%error, "copy stdin"),
    }
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.flush().await,
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn addresses_are_split_as_containerd_writes_them() {
        assert_eq!(split("/run/x"), ("fifo", "/run/x"));
        assert_eq!(split("fifo:///run/x"), ("fifo", "/run/x"));
        assert_eq!(split("binary:///bin/nerdctl?a=b"), ("binary", "/bin/nerdctl"));
    }

    #[tokio::test]
    async fn output_arrives_whole_and_then_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let uri = path.to_str().unwrap().to_owned();
        let host = open(&Stdio { stdout: uri, ..Default::default() }, "c1", "ns", None).await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copies = host.connect(GuestEnds { stdout: Some(ours), ..Default::default() }, false);
        let sent = vec![7; 300_000];
        let (sent2, writer) = (
            sent.clone(),
            tokio::spawn(async move {
                guest.write_all(&sent).await.unwrap();
            }),
        );
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        writer.await.unwrap();
        assert_eq!(got, sent2);
        assert!(copies.drain(Duration::from_secs(1)).await);
    }

    #[tokio::test]
    async fn a_pipe_ends_both_ways_with_its_other_end() {
        use std::io::Write;
        let (read, write) = io::pipe().unwrap();
        let (input, mut typed) = io::pipe().unwrap();
        let uri = |fd: &dyn std::os::fd::AsRawFd| format!("pipe:///proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        let stdio = Stdio { stdin: uri(&input), stdout: uri(&write), ..Default::default() };
        let host = open(&stdio, "c1", "ns", None).await.unwrap();
        drop((input, write));
        let (ours, mut process_in) = UnixStream::pair().unwrap();
        let (theirs, mut process_out) = UnixStream::pair().unwrap();
        let copies = host.connect(GuestEnds { stdin: Some(ours), stdout: Some(theirs), ..Default::default() }, false);
        typed.write_all(b"hello").unwrap();
        drop(typed);
        let mut got = String::new();
        process_in.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "hello");
        drop(read);
        // Into a pipe that nobody reads: the copy ends, and the process's stream with it.
        while process_out.write_all(b"y\n").await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(copies.drain(Duration::from_secs(1)).await);
    }

    #[tokio::test]
    async fn stdin_ends_after_its_data_once_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let uri = path.to_str().unwrap().to_owned();
        let host = open(&Stdio { stdin: uri, ..Default::default() }, "c1", "ns", None).await.unwrap();
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let copies = host.connect(GuestEnds { stdin: Some(ours), ..Default::default() }, false);
        let mut client = pipe::OpenOptions::new().open_sender(&path).unwrap();
        client.write_all(b"hello").await.unwrap();
        copies.close_stdin();
        drop(client);
        let mut got = String::new();
        guest.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "hello");
    }

    #[tokio::test]
    async fn the_clients_ends_are_closed_if_the_guests_cannot_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let opened = async || {
            let stdout = path.to_str().unwrap().to_owned();
            open(&Stdio { stdout, ..Default::default() }, "c1", "ns", None).await.unwrap()
        };
        // Where nobody writes, a fifo that is not waited for cannot be read from either: its end is there at once.
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (ends, made) = opened().await.with(async { Ok::<_, ()>(7) }).await.unwrap();
        assert_eq!(made, 7);
        let mut byte = [0];
        assert_eq!(reader.try_read(&mut byte).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(ends);
        let ends = opened().await.with(async { Err::<(), _>("no guest") }).await;
        assert_eq!(ends.map(drop), Err("no guest"));
        let read = tokio::time::timeout(Duration::from_secs(10), reader.read(&mut byte)).await;
        assert_eq!(read.expect("it is closed").unwrap(), 0);
    }

    #[tokio::test]
    async fn an_unknown_scheme_is_named() {
        let stdio = Stdio { stdout: "ttrpc+unix:///x".into(), ..Default::default() };
        assert!(open(&stdio, "c1", "ns", None).await.unwrap_err().to_string().contains("ttrpc+unix"));
    }
}
