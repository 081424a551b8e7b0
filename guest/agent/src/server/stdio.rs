//! Bytes between the host's streams and the process's pipes or terminal.
//!
//! Pipes are spliced: the bytes never enter this process, so that one that dies loses none. Each copy goes on until its
//! source ends; what a process wrote before its end is always in its pipe by then.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{SpliceFFlags, splice},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{Shutdown, shutdown},
    unistd::{read, write},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};
use vz_sys::fd::set_nonblocking;

use super::{link::Link, readiness, state::Terminal};
use crate::protocol::{Exit, Key, Request, Stream};

/// Most bytes that are moved at once: what a pipe can hold, times some.
const CHUNK: usize = 256 * 1024;

/// One stream of a process: the connection to the host and the agent's end on the process's side.
#[derive(Debug)]
pub struct Ends {
    /// The connection.
    pub host: OwnedFd,
    /// The pipe's end.
    pub process: OwnedFd,
}

/// Prepares a descriptor for [`AsyncFd`]. Both of the process's ends of a pipe stay as they are.
pub fn asynchronous(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    set_nonblocking(&fd, true)?;
    readiness::register(fd)
}

/// Host to process, until the host half-closes or the process has closed its end.
pub async fn input(ends: Ends, link: Arc<Link>, key: Key) {
    let copied = async {
        let (host, process) = (asynchronous(ends.host)?, asynchronous(ends.process)?);
        let ended = copy(&host, &process).await;
        if matches!(&ended, Err(e) if e.kind() == io::ErrorKind::BrokenPipe) {
            // Nobody will read on: let the host know.
            let _ = shutdown_fd(&host, Shutdown::Read);
            return Ok(());
        }
        ended
    };
    finish(copied.await, &link, key, Stream::Stdin);
}

/// Process to host, until every process that has the pipe has closed it.
pub async fn output(ends: Ends, stream: Stream, link: Arc<Link>, key: Key) {
    let copied = async {
        let (process, host) = (asynchronous(ends.process)?, asynchronous(ends.host)?);
        let sent = copy(&process, &host).await;
        if sent.is_ok() {
            return shutdown_fd(&host, Shutdown::Write);
        }
        // The host does not want more: the process finds its pipe broken, as it would with the reader itself.
        sent
    };
    finish(copied.await, &link, key, stream);
}

/// Both ways between a terminal and the host, until the process has ended and every other one has closed the terminal.
///
/// A terminal that no process has open reads as EIO. Its process may open it again: systemd closes the console for a
/// while. So one end stays open here until `exit` tells of the process's end.
pub async fn terminal(
    host: OwnedFd,
    terminal: Terminal,
    mut exit: watch::Receiver<Option<Exit>>,
    link: Arc<Link>,
    key: Key,
) {
    let copied = async {
        let held = vz_sys::tty::open_slave(&*terminal)?;
        let released = async {
            // A process that is forgotten has ended.
            let _ = exit.wait_for(Option::is_some).await;
            drop(held);
            std::future::pending::<io::Result<()>>().await
        };
        let host = asynchronous(host)?;
        let typed = async {
            // The end of what is typed is not the end of the terminal.
            if let Err(e) = shuttle(&host, &terminal).await {
                tracing::debug!("terminal input: {e}");
            }
            std::future::pending::<io::Result<()>>().await
        };
        let shown = async {
            let sent = shuttle(&terminal, &host).await;
            if sent.is_err() {
                discard(&terminal).await?;
            }
            sent
        };
        let copied = tokio::select! { e = typed => e, e = released => e, shown = shown => shown };
        shutdown_fd(&host, Shutdown::Write)?;
        copied
    };
    finish(copied.await, &link, key, Stream::Stdout);
}

fn finish(copied: io::Result<()>, link: &Link, key: Key, stream: Stream) {
    if let Err(e) = copied {
        tracing::debug!(container = key.container, exec = key.exec, ?stream, "copy: {e}");
    }
    link.tell(&Request::CloseStream { key, stream });
}

fn shutdown_fd(fd: &AsyncFd<OwnedFd>, how: Shutdown) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    match shutdown(fd.as_raw_fd(), how) {
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Splices until the source ends. One of the two is a pipe.
async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        match splice(from, None, to, None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(_) => tokio::task::consume_budget().await,
            Err(Errno::EINTR) => {}
            // Either side may be meant, so both are waited for.
            Err(Errno::EAGAIN) => {
                until_ready(to, Interest::WRITABLE).await?;
                until_ready(from, Interest::READABLE).await?;
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Waits until the descriptor can be read or written.
///
/// What is remembered of it is forgotten only where a look that came after has shown it wrong: a full pipe that is
/// emptied says so once, and one that was never full says nothing, so a readiness that is forgotten for no reason never
/// comes back.
async fn until_ready(fd: &AsyncFd<OwnedFd>, interest: Interest) -> io::Result<()> {
    let events = if interest.is_writable() { PollFlags::POLLOUT } else { PollFlags::POLLIN };
    loop {
        let mut remembered = fd.ready(interest).await?;
        if is_ready(fd, events)? {
            return Ok(());
        }
        remembered.clear_ready();
    }
}

fn is_ready(fd: &AsyncFd<OwnedFd>, events: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd.as_fd(), events)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

/// Reads and writes until the source ends: a terminal cannot be spliced into a socket.
async fn shuttle(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let len = read_some(from, &mut buffer).await?;
        let mut rest = buffer.get(..len).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        while !rest.is_empty() {
            match to.async_io(Interest::WRITABLE, |to| Ok(write(to, rest)?)).await {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

async fn read_some(from: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let end = from.async_io(Interest::READABLE, |from| Ok(read(from, buffer)?)).await;
        match end {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A terminal whose other end nobody has open any more.
            Err(e) if e.raw_os_error() == Some(nix::libc::EIO) => return Ok(0),
            end => return end,
        }
    }
}

async fn discard(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    while read_some(from, &mut buffer).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use nix::fcntl::OFlag;

    use super::*;
    use crate::server::link;

    fn key() -> Key {
        Key { container: "c".into(), exec: String::new() }
    }

    fn link() -> (Arc<Link>, vz_sys::channel::Channel) {
        let (init, server) = vz_sys::channel::Channel::pair().unwrap();
        let (link, mut reports) = link::open(server).unwrap();
        tokio::spawn(async move { while let Ok(Some(_)) = reports.next().await {} });
        (Arc::new(link), init)
    }

    #[tokio::test]
    async fn output_is_whole_and_then_ends() {
        let (link, _init) = link();
        let (mut near, host) = UnixStream::pair().unwrap();
        let (process, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let copy = sent.clone();
        let process_writes = tokio::task::spawn_blocking(move || File::from(writer).write_all(&copy).unwrap());
        let host_reads = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            near.read_to_end(&mut all).unwrap();
            all
        });
        output(Ends { host: host.into(), process }, Stream::Stdout, link, key()).await;
        process_writes.await.unwrap();
        assert!(host_reads.await.unwrap() == sent);
    }

    #[tokio::test]
    async fn a_half_close_is_the_end_of_input() {
        let (link, _init) = link();
        let (mut near, host) = UnixStream::pair().unwrap();
        let (reader, process) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        near.write_all(b"all of it").unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        input(Ends { host: host.into(), process }, link, key()).await;
        let mut got = String::new();
        File::from(reader).read_to_string(&mut got).unwrap();
        assert_eq!(got, "all of it");
    }

    /// Each byte arrives while the copy is about to sleep, and the pipe is never full.
    #[tokio::test]
    async fn single_bytes_keep_coming() {
        let (link, _init) = link();
        let (mut near, host) = UnixStream::pair().unwrap();
        let (reader, process) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let passed = tokio::task::spawn_blocking(move || {
            let mut reader = File::from(reader);
            for n in 0..20_000u32 {
                let byte = n.to_le_bytes()[0];
                near.write_all(&[byte]).unwrap();
                let mut got = [0];
                reader.read_exact(&mut got).unwrap();
                assert_eq!(got, [byte]);
            }
        });
        input(Ends { host: host.into(), process }, link, key()).await;
        passed.await.unwrap();
    }

    #[tokio::test]
    async fn a_process_is_told_that_nobody_wants_its_output() {
        let (link, _init) = link();
        let (near, host) = UnixStream::pair().unwrap();
        drop(near);
        let (process, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let writes = tokio::task::spawn_blocking(move || File::from(writer).write_all(&[7; 1_000_000]));
        output(Ends { host: host.into(), process }, Stream::Stdout, link, key()).await;
        assert_eq!(writes.await.unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    fn pair() -> (File, Terminal) {
        let master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        vz_sys::tty::unlock(&master).unwrap();
        let slave = File::from(vz_sys::tty::open_slave(&master).unwrap());
        (slave, Arc::new(asynchronous(master.into()).unwrap()))
    }

    const EXIT: Exit = Exit { status: 0, at_ns: 0, number: 0 };

    #[tokio::test]
    async fn a_terminal_carries_both_ways_until_it_is_closed() {
        let (link, _init) = link();
        let (near, host) = UnixStream::pair().unwrap();
        let (mut slave, master) = pair();
        let (ended, exit) = watch::channel(None);
        let session = tokio::task::spawn_blocking(move || {
            let mut near = near;
            near.write_all(b"hello\n").unwrap();
            let mut line = [0; 6];
            slave.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"hello\n");
            slave.write_all(b"bye").unwrap();
            ended.send_replace(Some(EXIT));
            drop(slave);
            let mut all = String::new();
            near.read_to_string(&mut all).unwrap();
            all
        });
        terminal(host.into(), master, exit, link, key()).await;
        // The echo, then the answer.
        assert_eq!(session.await.unwrap(), "hello\r\nbye");
    }

    #[tokio::test]
    async fn a_terminal_can_be_closed_and_opened_again() {
        let (link, _init) = link();
        let (mut near, host) = UnixStream::pair().unwrap();
        let (mut slave, master) = pair();
        let again = Arc::clone(&master);
        let (ended, exit) = watch::channel(None);
        let session = tokio::task::spawn_blocking(move || {
            let mut first = [0; 5];
            slave.write_all(b"first").unwrap();
            near.read_exact(&mut first).unwrap();
            drop(slave);
            // No process has the terminal open now: the master would read EIO if the copy did not hold the other end.
            let mut slave = File::from(vz_sys::tty::open_slave(&*again).unwrap());
            slave.write_all(b"second").unwrap();
            drop((slave, again));
            ended.send_replace(Some(EXIT));
            let mut rest = String::new();
            near.read_to_string(&mut rest).unwrap();
            (first, rest)
        });
        terminal(host.into(), master, exit, link, key()).await;
        assert_eq!(session.await.unwrap(), (*b"first", "second".to_owned()));
    }
}
