//! Connections of the host to what listens on the containers' loopback addresses.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream as StdTcpStream},
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_vsock::VsockStream;
use vz_net::netns::Netns;
use vz_proto::{Forward, ForwardReply, NETNS_PATH, frame};

use super::vsock::Listener;
use crate::text;

/// For a connection to say where to.
const GREETING: Duration = Duration::from_secs(5);
/// Connections at the same time; more wait.
const MOST: usize = 256;

/// Takes connections for ever.
pub async fn serve(listener: Listener) {
    let places = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => drop(tokio::spawn(async move {
                if let Err(e) = forward(stream).await {
                    tracing::debug!("forwarded connection: {}", text::chain(&e));
                }
                drop(place);
            })),
            Err(e) => {
                // Out of descriptors, perhaps, some of which others will close.
                tracing::error!("accept connection to forward: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn forward(mut host: VsockStream) -> Result<(), frame::Error> {
    let silent = || frame::Error::Io(io::ErrorKind::TimedOut.into());
    let Some(asked) = timeout(GREETING, frame::read::<Forward>(&mut host)).await.map_err(|_| silent())?? else {
        return Ok(());
    };
    let connected = connect(&asked).await;
    let failed = |e: &io::Error| e.raw_os_error().unwrap_or(nix::libc::EINVAL).unsigned_abs();
    let errno = connected.as_ref().err().map_or(0, failed);
    frame::write(&mut host, &ForwardReply { errno, ..Default::default() }).await?;
    if let Ok(mut guest) = connected {
        tokio::io::copy_bidirectional(&mut host, &mut guest).await?;
    }
    Ok(())
}

async fn connect(asked: &Forward) -> io::Result<TcpStream> {
    let invalid = || io::Error::from_raw_os_error(nix::libc::EINVAL);
    let v4 = <[u8; 4]>::try_from(asked.address.as_slice()).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(asked.address.as_slice()).map(IpAddr::from);
    let address = v4.or_else(|_| v6()).map_err(|_| invalid())?;
    let port = u16::try_from(asked.port).map_err(|_| invalid())?;
    if !address.is_loopback() {
        return Err(invalid());
    }
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // A socket stays in the namespace that it was made in.
    let netns = Netns::open(Path::new(NETNS_PATH))?;
    let socket: OwnedFd = netns.run(|| socket(family, SockType::Stream, flags, None))??;
    TcpSocket::from_std_stream(StdTcpStream::from(socket)).connect(SocketAddr::new(address, port)).await
}
