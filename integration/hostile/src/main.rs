//! An init that takes the guest agent's place and lies to the host. What it does is named on the kernel's command line:
//!
//! - `vz.hostile=NAME` one of the functions in [`SCENES`]
//! - `vz.at=METHOD,...` the requests at which it misbehaves, for the scenes that are honest otherwise; `*` for all
//! - `vz.version=VERSION` what it says of its version
//! - `vz.victim=ID` somebody else's container
//!
//! It speaks ttrpc by hand, to be able to say what no library would.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    mount::{MsFlags, mount},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, listen, socket},
};
use protobuf::Message;
use ttrpc::proto::{Request, Response};
use vz_proto::{
    CONTROL_PORT, CreateContainerRequest, CreateContainerResponse, Event, ExecProcessRequest, ExecProcessResponse,
    Hello, LOG_PORT, LogRecord, OutOfMemory, ProcessExit, ProcessRequest, STREAM_PORT, SignalProcessRequest, Stdio,
    WaitProcessResponse, event, frame::TOKEN_LEN,
};

/// `VMADDR_CID_HOST` and `VMADDR_CID_ANY`.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// ttrpc's message types, and the flag of an answer that is the last of its stream.
const RESPONSE: u8 = 2;
const DATA: u8 = 3;
/// Events of one flood.
const LIES: u32 = 5_000;
/// How late an answer is that comes after every deadline of the tests.
const LATE: Duration = Duration::from_secs(9);

type Scene = fn(&Lies) -> io::Result<()>;

const SCENES: [(&str, Scene); 13] = [
    ("giant-hello", giant_hello),
    ("silence", silence),
    ("other-version", other_version),
    ("giant-answer", giant_answer),
    ("garbage-answer", garbage_answer),
    ("forged-events", forged_events),
    ("floods", floods),
    ("hangs", hangs),
    ("pretends", pretends),
    ("late", late),
    ("hangs-up", hangs_up),
    ("floods-own", floods_own),
    ("floods-log", floods_log),
];

/// What the command line says.
struct Lies {
    version: String,
    victim: String,
    at: String,
}

impl Lies {
    /// Whether a request is one at which it misbehaves.
    fn at(&self, method: &str) -> bool {
        self.at.split(',').any(|at| at == method || at == "*")
    }
}

fn main() -> ExitCode {
    if let Err(e) = run() {
        // The kernel's console, which the host shows when the VM ends.
        eprintln!("hostile: {e}");
    }
    // An init that ends is a panic: not what is to be tested.
    loop {
        thread::park();
    }
}

fn run() -> io::Result<()> {
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>)?;
    let line = fs::read_to_string("/proc/cmdline")?;
    let value =
        |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)).unwrap_or_default().to_owned();
    let (name, lies) = (
        value("vz.hostile="),
        Lies { version: value("vz.version="), victim: value("vz.victim="), at: value("vz.at=") },
    );
    let scene = SCENES.iter().find(|(known, _)| *known == name);
    let (_, scene) = scene.ok_or_else(|| io::Error::other(format!("no scene {name:?}")))?;
    scene(&lies)
}

/// A connection to a port of the host.
fn dial(port: u32) -> io::Result<File> {
    let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(HOST, port))?;
    Ok(File::from(fd))
}

/// Streams that the host has opened; they stay until they are dropped here.
type Streams = Arc<Mutex<Vec<OwnedFd>>>;

/// Takes every stream that the host opens.
fn streams() -> io::Result<Streams> {
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(ANY, STREAM_PORT))?;
    listen(&listener, Backlog::new(16)?)?;
    let streams = Streams::default();
    let held = Arc::clone(&streams);
    thread::spawn(move || {
        while let Ok(fd) = vz_sys::socket::accept(&listener) {
            held.lock().unwrap_or_else(PoisonError::into_inner).push(fd);
        }
    });
    Ok(streams)
}

/// A frame of the control and log connections.
fn frame(to: &mut File, message: &impl Message) -> io::Result<()> {
    let body = message.write_to_bytes()?;
    let mut bytes = u32::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
    bytes.extend(body);
    to.write_all(&bytes)
}

/// The control connection, after an honest hello.
fn control(lies: &Lies) -> io::Result<File> {
    let mut control = dial(CONTROL_PORT)?;
    frame(&mut control, &Hello { agent_version: lies.version.clone(), ..Default::default() })?;
    let mut length = [0; 4];
    control.read_exact(&mut length)?;
    let mut welcome = vec![0; usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?];
    control.read_exact(&mut welcome)?;
    Ok(control)
}

/// A message of ttrpc: length, stream, type and flags, then the payload.
fn message(stream: u32, kind: u8, payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut bytes = u32::try_from(payload.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    Ok(bytes)
}

/// The guest's side of a sandbox whose containers do nothing but wait for a signal.
struct Guest {
    from: File,
    to: Arc<Mutex<File>>,
    /// Connected streams by their tokens.
    streams: Arc<Mutex<HashMap<String, OwnedFd>>>,
    /// Tokens of the streams of each process that runs.
    running: HashMap<(String, String), Vec<String>>,
    events: Option<u32>,
}

/// How bytes are sent on the control connection.
type Send<'a> = dyn Fn(&Arc<Mutex<File>>, Vec<u8>) -> io::Result<()> + 'a;

/// How a request is answered.
enum Manner {
    /// As asked.
    Honest,
    /// Never.
    Never,
    /// With success, and without doing it.
    Pretend,
    /// As asked, after every deadline.
    Late,
    /// By closing the connection for good.
    HangUp,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    fn connect(lies: &Lies) -> io::Result<Self> {
        let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &VsockAddr::new(ANY, STREAM_PORT))?;
        listen(&listener, Backlog::new(16)?)?;
        let streams = Arc::<Mutex<HashMap<String, OwnedFd>>>::default();
        let held = Arc::clone(&streams);
        thread::spawn(move || {
            while let Ok(fd) = vz_sys::socket::accept(&listener) {
                let mut token = [0; TOKEN_LEN];
                // It does not wait, and the token may be on its way.
                if fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())).is_err() {
                    continue;
                }
                let mut stream = File::from(fd);
                if stream.read_exact(&mut token).is_ok() {
                    lock(&held).insert(String::from_utf8_lossy(&token).into_owned(), stream.into());
                }
            }
        });
        let from = control(lies)?;
        let to = Arc::new(Mutex::new(from.try_clone()?));
        Ok(Self { from, to, streams, running: HashMap::new(), events: None })
    }

    /// Serves requests, each in its manner; `each` sees every request after it was answered.
    fn serve(
        mut self,
        manner: impl Fn(&str) -> Manner,
        mut each: impl FnMut(&Self, &str) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let (stream, method, payload) = request(&mut self.from)?;
            match manner(&method) {
                Manner::Honest => self.honest(stream, &method, &payload, &|to, bytes| lock(to).write_all(&bytes))?,
                Manner::Never => {}
                Manner::Pretend => self.send(&answer_of(stream, &Response::default())?)?,
                Manner::Late => self.honest(stream, &method, &payload, &|to, bytes| {
                    let to = Arc::clone(to);
                    thread::spawn(move || {
                        thread::sleep(LATE);
                        // The host may have closed it by now.
                        drop(lock(&to).write_all(&bytes));
                    });
                    Ok(())
                })?,
                Manner::HangUp => {
                    drop(self);
                    loop {
                        thread::park();
                    }
                }
            }
            each(&self, &method)?;
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        lock(&self.to).write_all(bytes)
    }

    fn honest(&mut self, stream: u32, method: &str, payload: &[u8], send: &Send<'_>) -> io::Result<()> {
        let tokens = |stdio: Option<Stdio>| {
            let stdio = stdio.unwrap_or_default();
            [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().filter(|token| !token.is_empty()).collect()
        };
        let mut ended = None;
        let reply = match method {
            "Events" => {
                self.events = Some(stream);
                return Ok(());
            }
            "CreateContainer" => {
                let asked = CreateContainerRequest::parse_from_bytes(payload)?;
                self.running.insert((asked.container_id, String::new()), tokens(asked.stdio.into_option()));
                answer_of(stream, &CreateContainerResponse { pid: 100, ..Default::default() })?
            }
            "ExecProcess" => {
                let asked = ExecProcessRequest::parse_from_bytes(payload)?;
                self.running.insert((asked.container_id, asked.exec_id), tokens(asked.stdio.into_option()));
                answer_of(stream, &ExecProcessResponse { pid: 101, ..Default::default() })?
            }
            "SignalProcess" => {
                let asked = SignalProcessRequest::parse_from_bytes(payload)?;
                let exec = if asked.all { String::new() } else { asked.exec_id };
                ended = Some(((asked.container_id, exec), 128 + asked.signal));
                answer_of(stream, &Response::default())?
            }
            "DeleteProcess" | "WaitProcess" => answer_of(stream, &WaitProcessResponse::default())?,
            _ => answer_of(stream, &Response::default())?,
        };
        send(&self.to, reply)?;
        if let Some((key, status)) = ended
            && let Some(tokens) = self.running.remove(&key)
        {
            let mut streams = lock(&self.streams);
            tokens.iter().for_each(|token| drop(streams.remove(token)));
            drop(streams);
            send(&self.to, self.exit(&key.0, &key.1, status)?)?;
        }
        Ok(())
    }

    fn event(&self, kind: event::Kind) -> io::Result<Vec<u8>> {
        let stream = self.events.ok_or_else(|| io::Error::other("nobody asked for events"))?;
        message(stream, DATA, &Event { kind: Some(kind), ..Default::default() }.write_to_bytes()?)
    }

    fn exit(&self, container: &str, exec: &str, status: u32) -> io::Result<Vec<u8>> {
        let (container_id, exec_id) = (container.to_owned(), exec.to_owned());
        self.event(event::Kind::Exit(ProcessExit { container_id, exec_id, status, ..Default::default() }))
    }

    fn out_of_memory(&self, container: &str) -> io::Result<Vec<u8>> {
        self.event(event::Kind::Oom(OutOfMemory { container_id: container.to_owned(), ..Default::default() }))
    }
}

fn answer_of(stream: u32, payload: &impl Message) -> io::Result<Vec<u8>> {
    let response = Response { payload: payload.write_to_bytes()?, ..Default::default() };
    message(stream, RESPONSE, &response.write_to_bytes()?)
}

/// The next request of the host: its stream, its method, its payload.
fn request(control: &mut File) -> io::Result<(u32, String, Vec<u8>)> {
    loop {
        let mut header = [0; 10];
        control.read_exact(&mut header)?;
        let field = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut body = vec![0; usize::try_from(field(0)).map_err(io::Error::other)?];
        control.read_exact(&mut body)?;
        if let Ok(request) = Request::parse_from_bytes(&body)
            && !request.method.is_empty()
        {
            return Ok((field(4), request.method, request.payload));
        }
    }
}

fn answer(control: &mut File, stream: u32, payload: &impl Message) -> io::Result<()> {
    control.write_all(&answer_of(stream, payload)?)
}

// --- Scenes ----------------------------------------------------------------------------------------------------------

/// A hello of almost 4 GiB.
fn giant_hello(_: &Lies) -> io::Result<()> {
    let mut control = dial(CONTROL_PORT)?;
    control.write_all(&[0xff; 4])?;
    loop {
        control.write_all(&[0; 65536])?;
    }
}

/// A connection, and no word.
fn silence(_: &Lies) -> io::Result<()> {
    let _control = dial(CONTROL_PORT)?;
    loop {
        thread::park();
    }
}

/// The agent of another bundle.
fn other_version(_: &Lies) -> io::Result<()> {
    let forged = Lies { version: "0.0.0-forged".into(), victim: String::new(), at: String::new() };
    control(&forged).map(drop)
}

/// An answer of 2 GiB.
fn giant_answer(lies: &Lies) -> io::Result<()> {
    let _streams = streams()?;
    let mut control = control(lies)?;
    loop {
        let (stream, method, _) = request(&mut control)?;
        if method == "CreateContainer" {
            let mut header = message(stream, RESPONSE, &[])?;
            header[0] = 0x7f;
            control.write_all(&header)?;
            loop {
                control.write_all(&[0; 65536])?;
            }
        }
    }
}

/// Answers to what nobody asked, of types that do not exist, and one that is no protobuf.
fn garbage_answer(lies: &Lies) -> io::Result<()> {
    let _streams = streams()?;
    let mut control = control(lies)?;
    loop {
        let (stream, method, _) = request(&mut control)?;
        for kind in [RESPONSE, DATA, 0, 7, 255] {
            for of in [0, 2, stream + 1, stream + 1000, u32::MAX] {
                control.write_all(&message(of, kind, &[0xff; 100])?)?;
            }
        }
        if method == "CreateContainer" {
            control.write_all(&message(stream, RESPONSE, &[0xff; 100])?)?;
        }
    }
}

/// Every request is answered well, and the events are about other people's processes; the own one's end is told when it
/// is killed, with more bits than a status has.
fn forged_events(lies: &Lies) -> io::Result<()> {
    let streams = streams()?;
    let mut control = control(lies)?;
    let (mut events, mut created) = (None, String::new());
    loop {
        let (stream, method, payload) = request(&mut control)?;
        match method.as_str() {
            "Events" => {
                events = Some(stream);
                for number in 0..LIES {
                    let id = match number % 4 {
                        0 => lies.victim.clone(),
                        1 => "../../../etc/passwd".into(),
                        2 => "x".repeat(30_000),
                        _ => String::new(),
                    };
                    let kind = match number % 8 {
                        0..4 => {
                            event::Kind::Exit(ProcessExit { container_id: id, status: number, ..Default::default() })
                        }
                        _ => event::Kind::Oom(OutOfMemory { container_id: id, ..Default::default() }),
                    };
                    let event = Event { kind: Some(kind), ..Default::default() };
                    control.write_all(&message(stream, DATA, &event.write_to_bytes()?)?)?;
                }
            }
            "CreateContainer" => {
                created = ProcessRequest::parse_from_bytes(&payload).map(|r| r.container_id).unwrap_or_default();
                answer(&mut control, stream, &CreateContainerResponse { pid: u32::MAX, ..Default::default() })?;
            }
            "SignalProcess" => {
                let asked = SignalProcessRequest::parse_from_bytes(&payload)?;
                answer(&mut control, stream, &Response::default())?;
                streams.lock().unwrap_or_else(PoisonError::into_inner).clear();
                let exit = ProcessExit {
                    container_id: created.clone(),
                    status: 0xabcd_ef00 | (128 + asked.signal),
                    ..Default::default()
                };
                let event = Event { kind: Some(event::Kind::Exit(exit)), ..Default::default() };
                let stream = events.ok_or_else(|| io::Error::other("nobody asked for events"))?;
                control.write_all(&message(stream, DATA, &event.write_to_bytes()?)?)?;
            }
            "DeleteProcess" => answer(&mut control, stream, &WaitProcessResponse::default())?,
            _ => answer(&mut control, stream, &Response::default())?,
        }
    }
}

/// Log records without end on as many connections as it gets, and connections to every port but the agent's own: with
/// those it would end itself.
fn floods(lies: &Lies) -> io::Result<()> {
    for _ in 0..4 {
        thread::spawn(|| -> io::Result<()> {
            let record = LogRecord { level: "error".into(), message: "flood ".repeat(9000), ..Default::default() };
            loop {
                let mut log = dial(LOG_PORT)?;
                while frame(&mut log, &record).is_ok() {}
            }
        });
    }
    thread::spawn(|| {
        let mut held = Vec::new();
        for port in (0..u32::MAX).step_by(7).filter(|port| *port != CONTROL_PORT) {
            held.extend(dial(port).ok().filter(|_| held.len() < 1000));
        }
    });
    forged_events(lies)
}

fn nothing(_: &Guest, _: &str) -> io::Result<()> {
    Ok(())
}

/// Serves in one manner at the requests of the command line, and honestly at others.
fn mannered(lies: &Lies, manner: fn() -> Manner) -> io::Result<()> {
    let choose = |method: &str| match lies.at(method) {
        true => manner(),
        false => Manner::Honest,
    };
    Guest::connect(lies)?.serve(choose, nothing)
}

/// Some requests are never answered.
fn hangs(lies: &Lies) -> io::Result<()> {
    mannered(lies, || Manner::Never)
}

/// Some requests are answered and not done: an agent that ignores SIGKILL.
fn pretends(lies: &Lies) -> io::Result<()> {
    mannered(lies, || Manner::Pretend)
}

/// Some requests are answered when nobody waits any more.
fn late(lies: &Lies) -> io::Result<()> {
    mannered(lies, || Manner::Late)
}

/// Some requests make it close the control connection, and never dial again.
fn hangs_up(lies: &Lies) -> io::Result<()> {
    mannered(lies, || Manner::HangUp)
}

/// Events about its own container and its own exec process, as fast as the host takes them: lacks of memory and exits
/// of the exec, that was told long ago. The init's end is told many times, once it is killed.
fn floods_own(lies: &Lies) -> io::Result<()> {
    let mut flooding = false;
    let mut known: Vec<(String, String)> = Vec::new();
    Guest::connect(lies)?.serve(
        |_| Manner::Honest,
        |guest, method| {
            known.extend(guest.running.keys().filter(|key| !known.contains(key)).cloned().collect::<Vec<_>>());
            if method == "ExecProcess" && !flooding {
                flooding = true;
                let mut burst = Vec::new();
                for (container, exec) in &known {
                    burst.extend(guest.out_of_memory(container)?);
                    if !exec.is_empty() {
                        burst.extend(guest.exit(container, exec, 7)?);
                    }
                    // Of an exec process that nobody has asked for.
                    burst.extend(guest.exit(container, "never-asked", 7)?);
                }
                let burst = burst.repeat(1000);
                let to = Arc::clone(&guest.to);
                thread::spawn(move || {
                    while lock(&to).write_all(&burst).is_ok() {
                        // The lock is not fair, and answers are to get through.
                        thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            if method == "SignalProcess" {
                for (container, exec) in &known {
                    guest.send(&guest.exit(container, exec, 137)?.repeat(10_000))?;
                }
            }
            Ok(())
        },
    )
}

/// Long lines of log, on as many connections as the host takes.
fn floods_log(lies: &Lies) -> io::Result<()> {
    for _ in 0..4 {
        thread::spawn(|| {
            let record = LogRecord { level: "error".into(), message: "\u{1}".repeat(60_000), ..Default::default() };
            loop {
                let Ok(mut log) = dial(LOG_PORT) else { return };
                while frame(&mut log, &record).is_ok() {}
            }
        });
    }
    mannered(lies, || Manner::Honest)
}
