//! The sandbox's network on the host: which namespace, how many cards, and what the guest is told of it.
//!
//! The VM boots before anybody knows its network: CNI plugins and nerdctl's hook put links into the namespace at
//! `Create`, `ctr run --cni` and some daemons between `Create` and `Start`, or later still. So the cards are there from
//! the start, on TAP devices in the namespace; links are wired to them when they are seen, and only then is the guest
//! told.
//!
//! A namespace that the spec does not name has no name at all: it ends with the last process and descriptor of the
//! sandbox, and everything in it too. In one that others made, what is left on its links is in the journal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex as StdMutex, MutexGuard as StdMutexGuard},
    time::Instant,
};

use oci_spec::runtime::Spec;
use tokio::{
    io::unix::AsyncFd,
    sync::{Mutex, MutexGuard},
};
use vz_machine::control::Nic;
use vz_net::{netns::Netns, watch::Watch, wire, wire::Wiring};

use super::journal::{self, Journal, Resource};
use crate::spec;
use vz_sys::sync::lock;

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
    /// The spec asks for a network that a VM cannot have.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// What the guest is to know of it.
    #[error("describe network")]
    Describe(#[source] serde_json::Error),
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
    pub fn description(&self) -> Result<Vec<u8>, Error> {
        if *self.told == self.network {
            return Ok(Vec::new());
        }
        serde_json::to_vec(&self.network).map_err(Error::Describe)
    }

    /// The guest has been told.
    pub fn done(mut self) {
        *self.told = self.network;
    }
}

impl Network {
    /// Finds or makes the namespace that a sandbox's spec asks for, with cards for a VM with this many vCPUs.
    pub fn prepare(spec: &Spec, vcpus: u32) -> Result<(Self, Cards), Error> {
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
    pub fn check(&self, spec: &Spec) -> Result<(), Error> {
        let Some(path) = spec::netns(spec)? else { return Ok(()) };
        let netns = Netns::open(&path).map_err(|source| Error::Open { path: path.clone(), source })?;
        if self.wiring().netns().is(&netns) { Ok(()) } else { Err(Error::Other { path }) }
    }

    /// Looks at the namespace, wires what is new, and says what the guest has to know. The first link that cannot be
    /// wired, and why, is returned apart.
    pub async fn look(&self, journal: &Journal) -> Result<(News<'_>, Option<Error>), Error> {
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

    /// A watch of the namespace, once: whoever asks first has the guest follow what changes.
    pub fn watch(&self) -> Result<Option<AsyncFd<Watch>>, Error> {
        let mut watched = lock(&self.watched);
        if std::mem::replace(&mut watched, true) {
            return Ok(None);
        }
        Watch::start(self.wiring().netns()).and_then(crate::fd::watch).map(Some).map_err(Error::Watch)
    }

    /// Calls `work` with the namespace.
    pub fn with_netns<T>(&self, work: impl FnOnce(&Netns) -> T) -> T {
        work(self.wiring().netns())
    }

    fn wiring(&self) -> StdMutexGuard<'_, Wiring> {
        lock(&self.wiring)
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
