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
use vz_sys::{
    error::chain,
    sk_lookup::{self, Steering},
};

use super::{Guest, vmm};

/// Connections at the same time; more wait.
const MOST: usize = 256;
/// How long the guest may take to say whether somebody listens; a client would not wait for longer than that either.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a listener that has run out of something waits.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a connection was not forwarded.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The client's socket.
    #[error("forward connection")]
    Socket(#[source] io::Error),
    /// The guest cannot be reached.
    #[error(transparent)]
    Dial(#[from] vmm::Error),
    /// The guest did not say in time whether somebody listens.
    #[error("forward connection: the guest did not answer within {} s", ANSWER.as_secs())]
    Silent,
    /// What the guest said.
    #[error("forward connection")]
    Answer(#[from] frame::Error),
}

/// The listener for all ports.
#[derive(Debug)]
pub struct Forwarding {
    listener: TcpListener,
    _steering: Steering,
}

impl Forwarding {
    /// Starts to take the connections to the loopback addresses of a network namespace.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        // Of both families; its own port is of no importance.
        let listener = netns.run(|| StdTcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)))??;
        let steering = sk_lookup::loopback(netns.as_fd(), listener.as_fd())?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)?, _steering: steering })
    }

    /// Forwards connections until the sandbox is gone.
    pub async fn serve(self, guest: Weak<Guest>) {
        let places = Arc::new(Semaphore::new(MOST));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let accepted = self.listener.accept().await;
            let Some(guest) = guest.upgrade() else { return };
            match accepted {
                Ok((stream, _)) => drop(tokio::spawn(async move {
                    if let Err(error) = forward(stream, guest).await {
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

async fn forward(mut client: TcpStream, guest: Arc<Guest>) -> Result<(), Error> {
    // What a client gets where nobody listens: a reset instead of an end of file.
    client.set_zero_linger().map_err(Error::Socket)?;
    let dialled: SocketAddr = client.local_addr().map_err(Error::Socket)?;
    let mut stream = guest.vmm.dial(FORWARD_PORT, ANSWER).await?;
    drop(guest);
    let address = match dialled.ip().to_canonical() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let request = Forward { address, port: dialled.port().into(), ..Default::default() };
    let asked = async {
        frame::write(&mut stream, &request).await?;
        frame::read::<ForwardReply>(&mut stream).await
    };
    let reply = timeout(ANSWER, asked).await.map_err(|_| Error::Silent)??;
    match reply.map(|reply| reply.errno) {
        Some(0) => {}
        errno => {
            tracing::debug!(port = dialled.port(), ?errno, "guest refuses a connection");
            return Ok(());
        }
    }
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &NO_LINGER)
        .map_err(|e| Error::Socket(e.into()))?;
    tokio::io::copy_bidirectional(&mut client, &mut stream).await.map_err(Error::Socket)?;
    Ok(())
}

/// Restores the default of close(2): unsent data is still delivered.
const NO_LINGER: libc::linger = libc::linger { l_onoff: 0, l_linger: 0 };
