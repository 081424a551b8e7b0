//! vsock connections: those that the server makes to the host, and those that the host makes. Nobody else may.

use std::io;

use nix::sys::socket::{Backlog, listen};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

/// Connects to a port of the host. Waits for the host's answer, which takes no longer than the host's event loop.
pub async fn connect(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect(VsockAddr::new(vz_proto::HOST_CID, port)).await
}

/// Takes the host's connections to a port.
#[derive(Debug)]
pub struct Listener(VsockListener);

impl Listener {
    /// Listens on a port of the guest.
    pub fn bind(port: u32) -> io::Result<Self> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        // It lets 128 connections wait, and then has the kernel refuse them.
        listen(&listener, Backlog::MAXCONN)?;
        Ok(Self(listener))
    }

    /// The next connection, which is the host's.
    pub async fn accept(&self) -> io::Result<VsockStream> {
        loop {
            match self.0.accept().await {
                Ok((stream, peer)) if peer.cid() == vz_proto::HOST_CID => return Ok(stream),
                Ok((_, peer)) => tracing::warn!(cid = peer.cid(), "refused a stream that is not the host's"),
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(e),
            }
        }
    }
}
