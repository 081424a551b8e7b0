//! Tells the guest of its network: before a container starts, and whenever the namespace changes.

use std::sync::{Arc, Weak};

use tokio::io::unix::AsyncFd;
use vz_net::watch::Watch;

use super::{Error, Guest, forward::Forwarding};
use crate::{
    complaint::Complaint,
    host::{self, Host, network::News},
};

/// Brings the guest up to date, which it must be before a container starts.
pub async fn update(host: &Host, guest: &Guest) -> Result<(), Error> {
    let news = host.network.news(&host.journal).await.map_err(host::Error::from)?;
    tell(guest, news).await
}

/// Tells the guest of all that changes from now on, and takes connections to it, until the sandbox is gone. Once is
/// enough.
pub fn start(host: &Arc<Host>, guest: &Arc<Guest>) -> Result<(), Error> {
    let Some(watch) = host.network.watch().map_err(host::Error::from)? else { return Ok(()) };
    tokio::spawn(follow(watch, Arc::downgrade(host), Arc::downgrade(guest)));
    match host.network.with_netns(Forwarding::open) {
        Ok(forwarding) => drop(tokio::spawn(forwarding.serve(Arc::downgrade(guest)))),
        // All else works without.
        Err(error) => tracing::warn!(%error, "ports of the guest's localhost cannot be reached from the host"),
    }
    Ok(())
}

async fn tell(guest: &Guest, news: News<'_>) -> Result<(), Error> {
    let network = news.description().map_err(host::Error::from)?;
    if !network.is_empty() {
        guest.agent.update_network(network).await?;
    }
    news.done();
    Ok(())
}

async fn follow(watch: AsyncFd<Watch>, host: Weak<Host>, guest: Weak<Guest>) {
    let mut complaint = Complaint::default();
    loop {
        let mut ready = match watch.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "watch network"),
        };
        match watch.get_ref().take() {
            Ok(_) => ready.clear_ready(),
            Err(error) => return tracing::error!(%error, "watch network"),
        }
        let (Some(host), Some(guest)) = (host.upgrade(), guest.upgrade()) else { return };
        let refuse = |error| Error::from(host::Error::from(error));
        let done = match host.network.look(&host.journal).await {
            Ok((news, refused)) => tell(&guest, news).await.and(refused.map_or(Ok(()), |e| Err(refuse(e)))),
            Err(error) => Err(refuse(error)),
        };
        match done {
            Ok(()) | Err(Error::Ended(_)) => {}
            Err(error) => {
                if let Some(error) = complaint.about(&error) {
                    tracing::warn!(error, "network has changed, and the guest's has not");
                }
            }
        }
    }
}
