//! vsock connections.
//!
//! tokio has no type for them. Its `UnixStream` does what any connected stream socket needs (read, write, half-close,
//! readiness), and never looks at the address family, so connections are that.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect as connect_to, getpeername, listen, socket,
};
use tokio::{io::unix::AsyncFd, net::UnixStream};

use super::readiness;

/// Connects to a port of the host. Waits for the host's answer, which takes no longer than the host's event loop.
pub fn connect(port: u32) -> io::Result<UnixStream> {
    let socket = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect_to(socket.as_raw_fd(), &VsockAddr::new(vz_proto::HOST_CID, port))?;
    stream(socket)
}

/// Makes a connected socket ready for tokio.
pub fn stream(socket: OwnedFd) -> io::Result<UnixStream> {
    let stream = StdStream::from(socket);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Takes the host's connections to a port.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on a port of the guest.
    pub fn bind(port: u32) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
        bind(socket.as_raw_fd(), &VsockAddr::new(nix::libc::VMADDR_CID_ANY, port))?;
        listen(&socket, Backlog::MAXCONN)?;
        Ok(Self(readiness::register(socket)?))
    }

    /// The next connection, which is the host's.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let mut ready = self.0.readable().await?;
            match vz_sys::socket::accept(&self.0) {
                Ok(socket) => {
                    let peer: VsockAddr = getpeername(socket.as_raw_fd())?;
                    if peer.cid() == vz_proto::HOST_CID {
                        return stream(socket);
                    }
                    tracing::warn!(cid = peer.cid(), "refused a stream that is not the host's");
                }
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => ready.clear_ready(),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(e),
                },
            }
        }
    }
}
