//! The sandbox's network on the host: which namespace, how many cards, and what the guest is told of it.
//!
//! The VM boots before anybody knows its network: CNI plugins and nerdctl's hook put links into the namespace at `Create`,
//! `ctr run --cni` and some daemons between `Create` and `Start`, or later still. So the cards are there from the start, on
//! TAP devices in the namespace; links are wired to them when they are seen, and only then is the guest told.
//!
//! A namespace that the spec does not name has no name at all: it ends with the last process and descriptor of the sandbox,
//! and everything in it too. In one that others made, what is left on its links is in the journal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError},
    time::Instant,
};

use oci_spec::runtime::Spec;
use tokio::{
    io::unix::AsyncFd,
    sync::{Mutex, MutexGuard},
};
use vz_machine::control::Nic;
use vz_net::{netns::Netns, watch::Watch, wire, wire::Wiring};
use vz_proto::{AgentClient, UpdateNetworkRequest};

use crate::{
    container::spec,
    error::{Error as RequestError, chain},
    guest::forward::Reach,
    host::journal::{self, Journal, Resource},
    sandbox::Sandbox,
};

/// As many cards as every machine has room for.
const MOST_CARDS: usize = 4;
/// Queue pairs of a card: more do not help, since each vCPU uses one.
const MOST_QUEUE_PAIRS: u32 = 4;

/// Why a sandbox cannot have its network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace that the spec names.
    #[error("linux.namespaces: network {path}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is the host's.
    #[error(
        "linux.namespaces: network {path}: this is the host's network, which a VM cannot share: it has a network of its own; \
         connect the container to a network and publish its ports (`-p`), or run it with `--net none`"
    )]
    Host {
        /// Its path.
        path: PathBuf,
    },
    /// It is another container's.
    #[error(
        "linux.namespaces: network {path}: this is the network of another container, which a VM cannot share: it has a network \
         of its own; connect both containers to one network (`nerdctl network create`) and use the other's name"
    )]
    Container {
        /// Its path.
        path: PathBuf,
    },
    /// It is not that of the sandbox.
    #[error("linux.namespaces: network {path}: containers of one sandbox share its network, and this is another one")]
    Other {
        /// Its path.
        path: PathBuf,
    },
    /// A new one.
    #[error("make network namespace")]
    Create(#[source] io::Error),
    /// Links and cards.
    #[error(transparent)]
    Wire(#[from] wire::Error),
    /// News of it.
    #[error("watch network namespace")]
    Watch(#[source] io::Error),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] journal::Error),
}

/// The network of a sandbox.
#[derive(Debug)]
pub struct Network {
    /// Where the namespace is, where others made it.
    given: Option<PathBuf>,
    wiring: StdMutex<Wiring>,
    netns: OwnedFd,
    /// What the guest has been told.
    told: Mutex<vz_net::Network>,
    watched: StdMutex<bool>,
}

/// Network cards for the machine, and their TAP devices' descriptors, in order.
#[derive(Debug, Default)]
pub struct Cards {
    /// The cards.
    pub nics: Vec<Nic>,
    /// The descriptors.
    pub taps: Vec<OwnedFd>,
}

/// What the guest is to be told; nobody else tells it anything until this is dropped.
#[derive(Debug)]
pub struct News<'n> {
    told: MutexGuard<'n, vz_net::Network>,
    network: vz_net::Network,
}

impl News<'_> {
    /// The description as the agent takes it; empty where it knows already.
    pub fn description(&self) -> Result<Vec<u8>, RequestError> {
        if *self.told == self.network {
            return Ok(Vec::new());
        }
        let written = serde_json::to_vec(&self.network);
        written.map_err(|e| RequestError::Message { what: "describe network", source: Box::new(e) })
    }

    /// The guest has been told.
    pub fn done(mut self) {
        *self.told = self.network;
    }
}

impl Network {
    /// Finds or makes the namespace that a sandbox's spec asks for, with cards for a VM with this many vCPUs.
    pub fn prepare(spec: &Spec, vcpus: u32) -> Result<(Self, Cards), crate::error::Error> {
        let begun = Instant::now();
        let given = spec::netns(spec)?;
        let (network, cards) = Self::make(given, spec::networks(spec), vcpus)?;
        tracing::info!(cards = cards.nics.len(), took_us = micros(begun), "network is prepared");
        Ok((network, cards))
    }

    fn make(given: Option<PathBuf>, networks: Option<usize>, vcpus: u32) -> Result<(Self, Cards), Error> {
        let netns = match &given {
            Some(path) => find(path)?,
            None => Netns::create().map_err(Error::Create)?,
        };
        let held = netns.as_fd().try_clone_to_owned().map_err(Error::Create)?;
        let mut wiring = Wiring::open(netns)?;
        let count = match &given {
            Some(_) => wiring.links()?,
            None => {
                wiring.loopback_up()?;
                // Whoever does not say may attach one later, as `ctr run --cni` does.
                networks.unwrap_or(1)
            }
        };
        let queue_pairs = u16::try_from(vcpus.clamp(1, MOST_QUEUE_PAIRS)).unwrap_or(1);
        let mut cards = Cards::default();
        for tap in wiring.make_cards(count.min(MOST_CARDS), queue_pairs)? {
            cards.nics.push(Nic { mac: tap.mac.0, queue_pairs });
            cards.taps.extend(tap.queues);
        }
        let network = Self {
            given,
            wiring: StdMutex::new(wiring),
            netns: held,
            told: Mutex::default(),
            watched: StdMutex::default(),
        };
        Ok((network, cards))
    }

    /// The namespace, for anchors to enter.
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Refuses a container of the sandbox that is to be in another network.
    pub fn check(&self, spec: &Spec) -> Result<(), crate::error::Error> {
        let Some(path) = spec::netns(spec)? else { return Ok(()) };
        let netns = Netns::open(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        if self.wiring().netns().is(&netns) { Ok(()) } else { Err(Error::Other { path }.into()) }
    }

    /// Looks at the namespace, wires what is new, and says what the guest has to know. The first link that cannot be
    /// wired, and why, is returned apart.
    async fn look(&self, journal: &Journal) -> Result<(News<'_>, Option<Error>), Error> {
        let told = self.told.lock().await;
        let begun = Instant::now();
        let (network, refused) = self.wiring().sync(|index, link| -> Result<(), Error> {
            if let Some(netns) = &self.given {
                journal.made(redirect(netns, index, link))?;
            }
            Ok(())
        })?;
        if *told != network {
            tracing::info!(cards = network.links.len(), took_us = micros(begun), "network is wired");
        }
        Ok((News { told, network }, refused))
    }

    /// What the guest has to know of all links, each of which must be one that it can have.
    pub async fn news(&self, journal: &Journal) -> Result<News<'_>, Error> {
        let (news, refused) = self.look(journal).await?;
        refused.map_or(Ok(news), Err)
    }

    /// Takes from the links what has been put on them.
    pub fn undo(&self, journal: &Journal) -> Result<(), Error> {
        for (index, link) in self.wiring().undo()? {
            if let Some(netns) = &self.given {
                journal.gone(redirect(netns, index, &link))?;
            }
        }
        Ok(())
    }

    /// Tells the guest of all that changes from now on, and takes connections to it, until the sandbox is gone. Once is
    /// enough.
    pub fn watch(&self, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut watched, true) {
            return Ok(());
        }
        let wiring = self.wiring();
        let watch = Watch::start(wiring.netns()).and_then(crate::fd::watch).map_err(Error::Watch)?;
        tokio::spawn(follow(watch, Arc::downgrade(sandbox)));
        match Reach::open(wiring.netns()) {
            Ok(reach) => drop(tokio::spawn(reach.serve(Arc::downgrade(sandbox)))),
            // All else works without.
            Err(error) => tracing::warn!(%error, "ports of the guest's localhost cannot be reached from the host"),
        }
        Ok(())
    }

    fn wiring(&self) -> StdMutexGuard<'_, Wiring> {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn redirect(netns: &Path, index: u32, link: &str) -> Resource {
    Resource::Redirect { netns: netns.to_owned(), index, link: link.to_owned() }
}

/// The namespace at a path of the spec, unless it is one that a VM cannot have.
fn find(path: &Path) -> Result<Netns, Error> {
    let netns = Netns::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
    let own = Netns::current().map_err(|source| Error::Open { path: path.to_owned(), source })?;
    if netns.is(&own) {
        return Err(Error::Host { path: path.to_owned() });
    }
    // A namespace that was made for somebody to join has a name; that of a process is somebody's.
    if path.starts_with("/proc") {
        return Err(Error::Container { path: path.to_owned() });
    }
    Ok(netns)
}

/// Brings the guest up to date, which it must be before a container starts.
pub async fn update(sandbox: &Sandbox) -> Result<(), RequestError> {
    let news = sandbox.network.news(&sandbox.journal).await?;
    tell(sandbox, news).await
}

async fn tell(sandbox: &Sandbox, news: News<'_>) -> Result<(), RequestError> {
    let network = news.description()?;
    if !network.is_empty() {
        let request = UpdateNetworkRequest { network, ..Default::default() };
        let call = async |agent: AgentClient, context, request| agent.update_network(context, &request).await;
        sandbox.agent.ask("update network", request, call).await?;
    }
    news.done();
    Ok(())
}

async fn follow(watch: AsyncFd<Watch>, sandbox: std::sync::Weak<Sandbox>) {
    let mut said = String::new();
    loop {
        let mut ready = match watch.readable().await {
            Ok(ready) => ready,
            Err(error) => return tracing::error!(%error, "watch network"),
        };
        match watch.get_ref().take() {
            Ok(_) => ready.clear_ready(),
            Err(error) => return tracing::error!(%error, "watch network"),
        }
        let Some(sandbox) = sandbox.upgrade() else { return };
        let done = match sandbox.network.look(&sandbox.journal).await {
            Ok((news, refused)) => tell(&sandbox, news).await.and(refused.map_or(Ok(()), |e| Err(e.into()))),
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(()) | Err(RequestError::Sandbox(_)) => {}
            Err(error) => {
                let error = chain(&error);
                // News come in bursts, and one complaint about a link is enough.
                if error != said {
                    tracing::warn!(error, "network has changed, and the guest's has not");
                    said = error;
                }
            }
        }
    }
}
