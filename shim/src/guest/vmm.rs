//! The sandbox's vmm process, as the shim sees it: started, asked, and outlived.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Mutex,
    time::Duration,
};

use nix::{
    sys::{signal::Signal, wait::WaitStatus},
    unistd::Pid,
};
use tokio::{
    io::unix::AsyncFd,
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use vz_machine::{
    client::{self, Client, Said},
    control::{BootConfig, Ended, MachineKind},
    spawn::{Spawn, SpawnError},
};
use vz_sys::{channel::Channel, error::chain, process::Process};

use crate::host::{cgroup::Cgroup, oom::Score};
use vz_sys::sync::lock;

/// Guest-made connections that wait to be taken up.
const ACCEPTED_QUEUE: usize = 16;

/// Why the vmm could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It cannot be used.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// It did not take a request or did not answer, and runs.
    #[error("connect to guest port {port}: the vmm process did not answer within {} s", .after.as_secs())]
    Silent {
        /// The port.
        port: u32,
        /// How long it was waited for.
        after: Duration,
    },
    /// Its process cannot be watched.
    #[error("watch vmm process")]
    Process(#[source] io::Error),
}

/// How long the vmm's process may take to be reaped after its channel has closed.
const DEATH_DEADLINE: Duration = Duration::from_secs(5);
/// How long the killed process may take to be gone, with the memory of its guest.
const END_DEADLINE: Duration = Duration::from_secs(3);

/// What the sandbox is told.
#[derive(Debug)]
pub enum Notice {
    /// The VM runs.
    Launched {
        /// On which machine.
        machine: MachineKind,
        /// CPU time of the vmm until then.
        cpu_us: u64,
    },
    /// The guest connected to a port of ours.
    Accepted {
        /// The port.
        port: u32,
        /// The connection.
        stream: UnixStream,
    },
    /// The VM has ended; the last one. Where the vmm did not say why, how its process ended.
    Ended(Result<Ended, String>),
}

/// A started vmm process, before there is a runtime to listen to it.
#[derive(Debug)]
pub struct Started {
    channel: Channel,
    process: Process,
}

/// A vmm process that is listened to.
#[derive(Debug)]
pub struct Vmm {
    client: Client,
    process: AsyncFd<Process>,
    status: Mutex<Option<WaitStatus>>,
    /// Why the process counts as ended, although it is not gone.
    given_up: watch::Sender<Option<String>>,
}

/// Where the vmm process is on the host.
#[derive(Debug)]
pub struct Place<'a> {
    /// Whether it is in a user namespace of its own.
    pub user_namespace: bool,
    /// Its cgroup.
    pub cgroup: Option<&'a Cgroup>,
    /// How likely it is to be ended for want of memory.
    pub oom_score: Score,
}

/// Starts the vmm process, with log lines to `stderr`, and tells it to boot, with `files` for its network cards and
/// disks. Call it from the main thread, which the process does not outlive.
pub fn start(
    config: BootConfig,
    files: &[OwnedFd],
    place: &Place<'_>,
    stderr: Option<&File>,
) -> Result<Started, Error> {
    // Before it takes any memory, which is counted where it was taken.
    let admit = |pid: Pid| {
        place.oom_score.set(pid)?;
        place.cgroup.map_or(Ok(()), |cgroup| cgroup.add(pid.as_raw()).map_err(io::Error::other))
    };
    let spawn = Spawn {
        name: c"containerd-shim-vz-v2",
        stderr: stderr.map(AsFd::as_fd),
        user_namespace: place.user_namespace,
        admit: &admit,
    };
    let (channel, process) = spawn.boot(config, files)?;
    Ok(Started { channel, process })
}

impl Started {
    /// Its pid on the host.
    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw()
    }

    /// Makes it usable in the current tokio runtime.
    pub fn listen(self) -> Result<Vmm, Error> {
        Ok(Vmm {
            client: Client::new(self.channel)?,
            process: crate::fd::watch(self.process).map_err(Error::Process)?,
            status: Mutex::default(),
            given_up: watch::Sender::default(),
        })
    }
}

impl Vmm {
    /// Connects to a port of the guest, at most within `deadline`: a vmm that is stopped does not even refuse.
    pub async fn dial(&self, port: u32, deadline: Duration) -> Result<UnixStream, Error> {
        let dialed = tokio::time::timeout(deadline, self.client.dial(port)).await;
        Ok(dialed.map_err(|_| Error::Silent { port, after: deadline })??)
    }

    /// Ends the VM and waits until its process, and with it everything in its pid namespace, is gone.
    ///
    /// SIGKILL ends a stopped process too. One that the kernel holds in an uninterruptible wait ends as soon as the
    /// kernel lets it go, and is in the journal until then; it counts as ended, and [`Vmm::run`] says so.
    pub async fn end(&self) {
        let ended = async {
            self.process.get_ref().kill(Signal::SIGKILL)?;
            let gone = tokio::time::timeout(END_DEADLINE, self.process.readable());
            gone.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??.retain_ready();
            self.reap().map(drop)
        };
        if let Err(error) = ended.await {
            tracing::error!(%error, "end vmm");
            self.given_up.send_replace(Some(format!("the vmm process was killed and is not gone: {error}")));
        }
    }

    /// How the process ended, however often and by whomever it is asked: the kernel says it once only.
    fn reap(&self) -> io::Result<WaitStatus> {
        let mut status = lock(&self.status);
        if let Some(status) = *status {
            return Ok(status);
        }
        let now = self.process.get_ref().try_wait()?;
        if now != WaitStatus::StillAlive {
            *status = Some(now);
        }
        Ok(now)
    }

    /// Waits until the process can be reaped. That is a moment after its channel has closed and, where a debugger
    /// follows it, after its pidfd is readable too: the debugger is told first. SIGCHLD comes with the last of these.
    async fn reaped(&self) -> io::Result<WaitStatus> {
        let mut children = signal(SignalKind::child())?;
        loop {
            match self.reap()? {
                WaitStatus::StillAlive => drop(children.recv().await),
                status => return Ok(status),
            }
        }
    }

    /// Hands on what the vmm says until it has ended; [`Notice::Ended`] is always the last.
    pub async fn run(&self, notices: mpsc::Sender<Notice>) {
        let mut given_up = self.given_up.subscribe();
        let ended = loop {
            let received = tokio::select! {
                received = self.client.next() => received,
                // The sender is in self.
                why = async { given_up.wait_for(Option::is_some).await.ok().and_then(|why| why.clone()) } => {
                    break why.map(Err);
                }
            };
            match received {
                Ok(Some(Said::Ended(ended))) => break Some(Ok(ended)),
                Ok(Some(said)) => {
                    if let Some(notice) = notice(said)
                        && notices.send(notice).await.is_err()
                    {
                        break None;
                    }
                }
                Ok(None) => break None,
                Err(error) => {
                    tracing::error!(error = chain(&error), "vmm channel");
                    break None;
                }
            }
        };
        self.client.close();
        let ended = match ended {
            Some(ended) => ended,
            None => Err(self.died().await),
        };
        // Nobody listens any more only where the sandbox is being taken down.
        drop(notices.send(Notice::Ended(ended)).await);
    }

    /// How the process ended that has closed its channel without a word.
    async fn died(&self) -> String {
        let status = match tokio::time::timeout(DEATH_DEADLINE, self.reaped()).await {
            Ok(status) => status,
            Err(_) => self.reap(),
        };
        match status {
            Ok(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => {
                "the vmm process was killed for a system call that its filter denies: if no guest has taken it over, this is a \
                 defect; denied_calls = \"report\" in [vmm] logs which call it is"
                    .into()
            }
            Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => {
                "the vmm process was killed (SIGKILL), by hand or for want of memory: the host's log says which".into()
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => format!("the vmm process died of {signal}"),
            Ok(WaitStatus::Exited(_, code)) => format!("the vmm process ended with exit code {code}; the log has its last words"),
            Ok(WaitStatus::StillAlive) => "the vmm process is not gone after it closed its channel, or a debugger holds it".into(),
            Ok(other) => format!("the vmm process died: {other:?}"),
            Err(error) => format!("the vmm process died, and how cannot be known: {error}"),
        }
    }
}

/// What the sandbox is told of it.
fn notice(said: Said) -> Option<Notice> {
    match said {
        Said::Launched { machine, cpu_us } => Some(Notice::Launched { machine, cpu_us }),
        Said::Accepted { port, stream: Ok(stream) } => Some(Notice::Accepted { port, stream }),
        Said::Accepted { port, stream: Err(error) } => {
            tracing::error!(error = chain(&error), port, "guest connection");
            None
        }
        Said::Ended(ended) => Some(Notice::Ended(Ok(ended))),
    }
}

/// A channel for [`Vmm::run`].
pub fn notices() -> (mpsc::Sender<Notice>, mpsc::Receiver<Notice>) {
    mpsc::channel(ACCEPTED_QUEUE)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream as StdUnixStream, sync::Arc};

    use nix::sched::CloneFlags;
    use tokio::io::AsyncReadExt;
    use vz_machine::control::{self, Event, Request};
    use vz_sys::process::Command;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const LATE: Duration = Duration::from_secs(60);

    /// A vmm process that does nothing, and the other end of its channel. `outlives_parent`, since tests are on
    /// threads.
    fn started(script: &str) -> (Started, Channel) {
        let (channel, theirs) = Channel::pair().unwrap();
        let command = Command {
            program: c"/bin/sh".into(),
            args: vec![c"sh".into(), c"-c".into(), std::ffi::CString::new(script).unwrap()],
            env: vec![c"PATH=/usr/bin:/bin".into()],
            fds: Vec::new(),
            namespaces: CloneFlags::empty(),
            outlives_parent: true,
        };
        (Started { channel, process: command.spawn().unwrap() }, theirs)
    }

    /// A vmm that is listened to, and what the sandbox is told.
    fn listened_to(script: &str) -> (Arc<Vmm>, Channel, mpsc::Receiver<Notice>) {
        let (started, theirs) = started(script);
        let vmm = Arc::new(started.listen().unwrap());
        let (notices, receiver) = notices();
        let running = vmm.clone();
        tokio::spawn(async move { running.run(notices).await });
        (vmm, theirs, receiver)
    }

    fn tell(theirs: &Channel, event: &Event, fds: &[std::os::fd::BorrowedFd<'_>]) {
        control::send(theirs, event, fds).unwrap();
    }

    /// The next request.
    async fn asked(theirs: &Channel) -> Request {
        theirs.set_nonblocking(true).unwrap();
        loop {
            match theirs.recv() {
                Ok(message) => return control::decode(&message.unwrap().bytes).unwrap(),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_vmm_that_does_not_answer_has_a_deadline() {
        let (vmm, theirs, _notices) = listened_to("exec sleep 1000");
        let error = vmm.dial(7, SOON).await.unwrap_err();
        assert!(matches!(error, Error::Silent { port: 7, .. }), "{error}");
        // An answer that comes late reaches nobody, and harms none.
        tell(&theirs, &Event::Dialed { id: 0, error: None }, &[]);
        let asking = tokio::spawn({
            let vmm = vmm.clone();
            async move { vmm.dial(8, LATE).await }
        });
        assert_eq!(asked(&theirs).await, Request::Dial { id: 0, port: 7 });
        assert_eq!(asked(&theirs).await, Request::Dial { id: 1, port: 8 });
        tell(&theirs, &Event::Dialed { id: 1, error: Some("nobody listens".into()) }, &[]);
        let error = asking.await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "connect to guest port 8: nobody listens");
        vmm.end().await;
    }

    #[tokio::test]
    async fn connections_come_with_what_they_are_for() {
        let (vmm, theirs, mut notices) = listened_to("exec sleep 1000");
        let (near, far) = StdUnixStream::pair().unwrap();
        tell(&theirs, &Event::Accepted { port: 5 }, &[near.as_fd()]);
        drop(near);
        let Some(Notice::Accepted { port: 5, mut stream }) = notices.recv().await else { panic!("not accepted") };
        io::Write::write_all(&mut &far, b"hello").unwrap();
        drop(far);
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "hello");
        // Without a connection it is nothing.
        tell(&theirs, &Event::Accepted { port: 6 }, &[]);
        vmm.end().await;
        drop(theirs);
        assert!(matches!(notices.recv().await, Some(Notice::Ended(Err(_)))));
    }

    #[tokio::test]
    async fn an_end_without_a_word_is_explained_and_answers_all_who_ask() {
        for (script, why) in [("exit 3", "ended with exit code 3"), ("kill -9 $$", "was killed (SIGKILL)")] {
            let (vmm, theirs, mut notices) = listened_to(script);
            let asking = tokio::spawn({
                let vmm = vmm.clone();
                async move { vmm.dial(7, LATE).await }
            });
            assert_eq!(asked(&theirs).await, Request::Dial { id: 0, port: 7 });
            drop(theirs);
            let Some(Notice::Ended(Err(said))) = notices.recv().await else { panic!("not ended") };
            assert!(said.contains(why), "{said}");
            assert!(matches!(asking.await.unwrap(), Err(Error::Client(client::Error::Gone))));
            assert!(notices.recv().await.is_none());
        }
    }

    #[tokio::test]
    async fn a_vmm_that_is_given_up_has_ended() {
        let (vmm, _theirs, mut notices) = listened_to("exec sleep 1000");
        vmm.given_up.send_replace(Some("it is held".into()));
        assert!(matches!(notices.recv().await, Some(Notice::Ended(Err(why))) if why == "it is held"));
        vmm.end().await;
    }
}
