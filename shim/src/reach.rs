//! What listens on the guest's loopback addresses, reached on those of the network namespace on the host.
//!
//! Clients of a pod dial there: a port forward of the kubelet, somebody with `nsenter`. Nothing is known of the guest's
//! listeners in advance, and nothing asks for them: one listener gets the connections to all ports, see
//! [`vz_sys::sk_lookup`], and each becomes a connection over vsock to the port that was dialled.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr, TcpListener as StdTcpListener},
    os::fd::AsFd,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use vz_net::netns::Netns;
use vz_proto::{FORWARD_PORT, Forward, ForwardReply, frame};
use vz_sys::sk_lookup::{self, Steering};

use crate::{
    error::{Error as RequestError, chain},
    sandbox::Sandbox,
};

/// Connections at the same time; more wait.
const MOST: usize = 256;
/// How long the guest may take to say whether somebody listens; a client would not wait for longer than that either.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a listener that has run out of something waits.
const PAUSE: Duration = Duration::from_millis(100);

/// The listener for all ports.
#[derive(Debug)]
pub struct Reach {
    listener: TcpListener,
    _steering: Steering,
}

impl Reach {
    /// Starts to take the connections to the loopback addresses of a network namespace.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        // Of both families; its own port is of no importance.
        let listener = netns.run(|| StdTcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
        let steering = sk_lookup::loopback(netns.as_fd(), listener.as_fd())?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)?, _steering: steering })
    }

    /// Forwards connections until the sandbox is gone.
    pub async fn serve(self, sandbox: Weak<Sandbox>) {
        let places = Arc::new(Semaphore::new(MOST));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = self.listener.accept().await;
            let Some(sandbox) = sandbox.upgrade() else { return };
            match accepted {
                Ok((stream, _)) => drop(tokio::spawn(async move {
                    if let Err(error) = forward(stream, sandbox).await {
                        tracing::debug!(error = chain(&error), "forwarded connection");
                    }
                    drop(place);
                })),
                Err(error) => {
                    tracing::warn!(%error, "accept connection to the guest");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

async fn forward(mut client: TcpStream, sandbox: Arc<Sandbox>) -> Result<(), RequestError> {
    let failed =
        |source: Box<dyn std::error::Error + Send + Sync>| RequestError::Message { what: "forward connection", source };
    // What a client gets where nobody listens: a reset instead of an end of file.
    client.set_zero_linger().map_err(|e| failed(e.into()))?;
    let dialled: SocketAddr = client.local_addr().map_err(|e| failed(e.into()))?;
    let mut guest = sandbox.vmm.dial(FORWARD_PORT, ANSWER).await?;
    drop(sandbox);
    let address = match dialled.ip().to_canonical() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let request = Forward { address, port: dialled.port().into(), ..Default::default() };
    let asked = async {
        frame::write(&mut guest, &request).await?;
        frame::read(&mut guest).await
    };
    let reply: Option<ForwardReply> = timeout(ANSWER, asked)
        .await
        .map_err(|elapsed| failed(elapsed.into()))?
        .map_err(|e: frame::Error| failed(e.into()))?;
    match reply.map(|reply| reply.errno) {
        Some(0) => {}
        errno => {
            tracing::debug!(port = dialled.port(), ?errno, "guest refuses a connection");
            return Ok(());
        }
    }
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &NO_LINGER)
        .map_err(|e| failed(e.into()))?;
    tokio::io::copy_bidirectional(&mut client, &mut guest).await.map_err(|e| failed(e.into()))?;
    Ok(())
}

/// What was sent is sent on after the end, as is the default.
const NO_LINGER: libc::linger = libc::linger { l_onoff: 0, l_linger: 0 };
