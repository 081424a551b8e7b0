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
        let found = match &given {
            Some(_) => Some(wiring.links()?),
            None => {
                wiring.loopback_up()?;
                None
            }
        };
        let (count, queue_pairs) = shape(found, networks, vcpus);
        let mut cards = Cards::default();
        for tap in wiring.make_cards(count, queue_pairs)? {
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

/// How many cards a VM with so many vCPUs has, and queue pairs for each: `found` links are in a namespace that others
/// made; into a new one a client wants to put those of so many `networks`, where it says.
fn shape(found: Option<usize>, networks: Option<usize>, vcpus: u32) -> (usize, u16) {
    // Whoever does not say may attach one later, as `ctr run --cni` does.
    let cards = found.or(networks).unwrap_or(1).min(MOST_CARDS);
    (cards, u16::try_from(vcpus.clamp(1, MOST_QUEUE_PAIRS)).unwrap_or(1))
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

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd};

    use serde_json::json;

    use super::*;

    /// A spec with this network namespace; a new one for an empty path.
    fn spec(netns: &str) -> Spec {
        let namespaces = json!([{ "type": "network", "path": netns }]);
        serde_json::from_value(json!({ "ociVersion": "1.2.0", "linux": { "namespaces": namespaces } })).unwrap()
    }

    /// Where a namespace that has no name can be opened.
    fn path_of(netns: &Netns) -> String {
        format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd())
    }

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            vz_tally::skip!("not root");
        }
        root
    }

    #[test]
    fn a_vm_has_cards_for_the_links_that_are_there_or_will_be() {
        let cards = |found, networks| shape(found, networks, 1).0;
        assert_eq!(cards(None, None), 1);
        assert_eq!(cards(None, Some(0)), 0);
        assert_eq!(cards(None, Some(2)), 2);
        // What is there counts, whatever was said.
        assert_eq!(cards(Some(0), Some(3)), 0);
        assert_eq!(cards(Some(3), None), 3);
        assert_eq!((cards(Some(100), None), cards(None, Some(100))), (MOST_CARDS, MOST_CARDS));
    }

    #[test]
    fn a_card_has_a_queue_pair_for_each_vcpu_up_to_a_limit() {
        let pairs = |vcpus| shape(None, None, vcpus).1;
        assert_eq!([0, 1, 2, 4, 5, u32::MAX].map(pairs), [1, 1, 2, 4, 4, 4]);
    }

    #[test]
    fn a_namespace_that_a_vm_cannot_have_is_refused_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [dir.path().join("none"), file, "/proc/self/ns/mnt".into()] {
            let error = find(&path).unwrap_err();
            assert!(matches!(&error, Error::Open { path: named, .. } if *named == path), "{error}");
        }
        let own = Path::new("/proc/thread-self/ns/net");
        assert!(matches!(find(own), Err(Error::Host { path }) if path == own));
        let linked = dir.path().join("link");
        std::os::unix::fs::symlink(own, &linked).unwrap();
        assert!(matches!(find(&linked), Err(Error::Host { .. })));
    }

    #[test]
    fn a_namespace_of_a_process_is_somebodys_and_one_with_a_name_is_not() {
        if !is_root() {
            return;
        }
        let other = Netns::create().unwrap();
        let path = path_of(&other);
        assert!(matches!(find(Path::new(&path)), Err(Error::Container { .. })));
        let dir = tempfile::tempdir().unwrap();
        let named = dir.path().join("name");
        std::os::unix::fs::symlink(&path, &named).unwrap();
        assert!(find(&named).unwrap().is(&other));
    }

    #[test]
    fn containers_of_a_sandbox_share_its_network() {
        if !is_root() {
            return;
        }
        let (network, cards) = Network::make(None, Some(0), 1).unwrap();
        assert!(cards.nics.is_empty() && cards.taps.is_empty());
        network.check(&spec("")).unwrap();
        let own = network.with_netns(path_of);
        network.check(&spec(&own)).unwrap();
        let other = Netns::create().unwrap();
        let other = path_of(&other);
        assert!(matches!(network.check(&spec(&other)), Err(Error::Other { path }) if path == Path::new(&other)));
        assert!(matches!(network.check(&spec("/none")), Err(Error::Open { path, .. }) if path == Path::new("/none")));
        let hosts = serde_json::from_value(json!({ "ociVersion": "1.2.0", "linux": {} })).unwrap();
        assert!(matches!(network.check(&hosts), Err(Error::Spec(_))));
    }

    #[tokio::test]
    async fn the_guest_is_told_what_it_does_not_know_and_once() {
        let told = Mutex::default();
        let news = async |mtu| News {
            told: told.lock().await,
            network: vz_net::Network {
                links: vec![vz_net::Link {
                    name: "eth0".into(),
                    card: vz_net::Mac([2; 6]),
                    mac: vz_net::Mac([4; 6]),
                    mtu,
                    arp: true,
                    addresses: Vec::new(),
                }],
                ..Default::default()
            },
        };
        let first = news(1500).await;
        let described: vz_net::Network = serde_json::from_slice(&first.description().unwrap()).unwrap();
        assert_eq!(described, first.network);
        // A guest that could not be told is told again.
        drop(first);
        let again = news(1500).await;
        assert!(!again.description().unwrap().is_empty());
        again.done();
        assert!(news(1500).await.description().unwrap().is_empty());
        assert!(!news(9000).await.description().unwrap().is_empty());
    }

    #[test]
    fn what_is_put_on_a_link_of_others_is_written_down_by_its_index_and_name() {
        let Resource::Redirect { netns, index, link } = redirect(Path::new("/run/netns/x"), 7, "eth0") else {
            panic!("another resource")
        };
        assert_eq!((netns.as_path(), index, link.as_str()), (Path::new("/run/netns/x"), 7, "eth0"));
    }
}
