//! The host's side: a network namespace, the cards of a VM, and which link each is wired to.

use std::{
    fs::OpenOptions,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
};
use nix::libc::O_NONBLOCK;
use vz_sys::tap;

use crate::{
    Link, Mac, Network,
    describe::{self, Found},
    netlink::Netlink,
    netns::Netns,
    redirect,
};

/// How TAP devices are called, with a number behind. Clients that look at a container's links from the host (`nerdctl
/// stats`, `nerdctl inspect`) pass over those whose names begin with `lo`, and take the first other one for the
/// container's.
const TAP: &str = "lovz";
/// Kinds of links whose packets can be redirected, where they are Ethernet.
const KINDS: [&str; 7] = ["veth", "macvlan", "macvtap", "ipvlan", "vlan", "dummy", "tun"];
/// What the addresses of our cards begin with: locally administered, as is everything that nobody was sold.
pub(crate) const CARD: [u8; 3] = [0x02, b'v', b'z'];
/// The kernel makes `lo` first in every network namespace.
const LOOPBACK: u32 = 1;

/// Why a sandbox's network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace.
    #[error("enter network namespace")]
    Enter(#[source] io::Error),
    /// Somebody's TAP devices are there.
    #[error(
        "the network namespace is used by another sandbox: containers of two VMs cannot share a network; \
         connect both to one network instead"
    )]
    Busy,
    /// A TAP device.
    #[error("make tap device {name}")]
    Tap {
        /// Its name.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A link cannot be connected to a VM.
    #[error("link {name} ({kind}) cannot be connected to a VM: use veth, macvlan, ipvlan or vlan links")]
    Kind {
        /// The link.
        name: String,
        /// Its kind.
        kind: String,
    },
    /// There are more links than the VM has cards.
    #[error(
        "no network card is left for link {name}: the VM was started with {cards}; \
         name the networks when the container is created"
    )]
    Cards {
        /// The link.
        name: String,
        /// How many there are.
        cards: usize,
    },
    /// A link's packets could not be redirected.
    #[error("redirect packets of link {name}")]
    Redirect {
        /// The link.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A setting of a link.
    #[error("set up link {name}")]
    Set {
        /// The link.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// What there is.
    #[error(transparent)]
    Describe(#[from] describe::Error),
}

/// A network card of the VM, as the host has it.
#[derive(Debug)]
struct Card {
    /// Which address the guest's driver finds.
    mac: Mac,
    /// The TAP device's index.
    tap: u32,
    /// The TAP device's name.
    name: String,
    /// The link that it is wired to in both directions: index and name.
    link: Option<(u32, String)>,
    /// Links and TAP devices with a redirection of a wiring that failed or whose link has gone. It must be taken away
    /// before the card can be wired again.
    stale: Vec<(u32, String)>,
}

impl Card {
    fn is_free(&self) -> bool {
        self.link.is_none() && self.stale.is_empty()
    }

    /// Takes stale redirections away; what could not be taken stays on the list.
    fn clean(&mut self, netlink: &mut Netlink) -> Result<(), Error> {
        while let Some((index, name)) = self.stale.last() {
            redirect::undo(netlink, *index).map_err(|source| Error::Redirect { name: name.clone(), source })?;
            self.stale.pop();
        }
        Ok(())
    }
}

/// A sandbox's network on the host.
#[derive(Debug)]
pub struct Wiring {
    netns: Netns,
    netlink: Netlink,
    cards: Vec<Card>,
}

/// A TAP device for the machine.
#[derive(Debug)]
pub struct Tap {
    /// The address for the guest's driver to find.
    pub mac: Mac,
    /// A descriptor for each queue pair.
    pub queues: Vec<OwnedFd>,
}

impl Wiring {
    /// Looks into a network namespace: nothing is made yet.
    pub fn open(netns: Netns) -> Result<Self, Error> {
        let netlink = netns.run(Netlink::open).and_then(|opened| opened).map_err(Error::Enter)?;
        Ok(Self { netns, netlink, cards: Vec::new() })
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// How many links there are to be wired.
    pub fn links(&mut self) -> Result<usize, Error> {
        Ok(wanted(describe::links(&mut self.netlink)?).count())
    }

    /// Sets `lo` up.
    pub fn loopback_up(&mut self) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = LOOPBACK;
        set_flags(&mut message, LinkFlags::Up, LinkFlags::Up);
        self.set("lo", message)
    }

    /// Makes this many cards, with TAP devices that end when their descriptors are closed.
    pub fn make_cards(&mut self, count: usize, queue_pairs: u16) -> Result<Vec<Tap>, Error> {
        let mut taps = Vec::new();
        for number in (0..=u8::MAX).take(count) {
            let name = format!("{TAP}{number}");
            let [a, b, c] = CARD;
            let mac = Mac([a, b, c, 0, 0, number]);
            let made = self.netns.run(|| create_tap(&name, queue_pairs)).and_then(|made| made);
            let queues = made.map_err(|source| match source.kind() {
                io::ErrorKind::ResourceBusy => Error::Busy,
                _ => Error::Tap { name: name.clone(), source },
            })?;
            let tap = describe::links(&mut self.netlink)?.into_iter().find(|link| link.name == name);
            let tap = tap.ok_or_else(|| Error::Tap { name: name.clone(), source: io::ErrorKind::NotFound.into() })?;
            // The host's kernel has nothing to say on the guest's link.
            let mut message = LinkMessage::default();
            message.header.index = tap.index;
            let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
            message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]));
            set_flags(&mut message, LinkFlags::Noarp, LinkFlags::Noarp);
            self.set(&name, message)?;
            self.cards.push(Card { mac, tap: tap.index, name, link: None, stale: Vec::new() });
            taps.push(Tap { mac, queues });
        }
        Ok(taps)
    }

    /// Wires links that have appeared to cards, takes cards from links that have gone, and describes what there is now.
    ///
    /// A link is wired in both directions or in none. What could not be undone of a failed attempt is undone first, and
    /// then the link is tried again.
    ///
    /// `before` is told of a link, by index and name, that is about to be wired, and can keep it from that. The first
    /// link that cannot be wired, and why, comes with the description, in which it is not.
    pub fn sync<E: From<Error>>(
        &mut self,
        mut before: impl FnMut(u32, &str) -> Result<(), E>,
    ) -> Result<(Network, Option<E>), E> {
        let found = describe::links(&mut self.netlink).map_err(Error::from)?;
        let mut refused = None;
        for card in &mut self.cards {
            if let Some((index, _)) = &card.link
                && !found.iter().any(|link| link.index == *index)
            {
                // Its qdisc has gone with it.
                card.link = None;
                card.stale.push((card.tap, card.name.clone()));
            }
            if let Err(error) = card.clean(&mut self.netlink) {
                refused = refused.or(Some(error.into()));
            }
        }
        let mut network = Network::default();
        let mut names = Vec::new();
        for link in wanted(found) {
            let wired = can_be_wired(&link).map_err(E::from).and_then(|mac| {
                let card = match self.card_of(&link) {
                    Some(card) => card,
                    None => {
                        before(link.index, &link.name)?;
                        self.wire(&link)?
                    }
                };
                Ok((card, mac))
            });
            match wired {
                Ok((card, mac)) => {
                    let Found { index, name, mtu, arp, addresses, .. } = link;
                    names.push((index, name.clone()));
                    network.links.push(Link { name, card, mac, mtu, arp, addresses });
                }
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        network.routes = describe::routes(&mut self.netlink, &names).map_err(Error::from)?;
        network.neighbours = describe::neighbours(&mut self.netlink, &names).map_err(Error::from)?;
        Ok((network, refused))
    }

    fn card_of(&self, link: &Found) -> Option<Mac> {
        let is = |card: &&Card| card.link.as_ref().is_some_and(|(index, _)| *index == link.index);
        self.cards.iter().find(is).map(|card| card.mac)
    }

    fn wire(&mut self, link: &Found) -> Result<Mac, Error> {
        let cards = self.cards.len();
        let free = self.cards.iter().position(Card::is_free);
        let Some(card) = free.and_then(|at| self.cards.get_mut(at)) else {
            return Err(Error::Cards { name: link.name.clone(), cards });
        };
        let failed = |source| Error::Redirect { name: link.name.clone(), source };
        let mut message = LinkMessage::default();
        message.header.index = card.tap;
        message.attributes.push(LinkAttribute::Mtu(link.mtu));
        set_flags(&mut message, LinkFlags::Up, LinkFlags::Up);
        self.netlink
            .change(RouteNetlinkMessage::SetLink(message))
            .map_err(|source| Error::Set { name: card.name.clone(), source })?;
        redirect::redirect(&mut self.netlink, link.index, card.tap).map_err(failed)?;
        if let Err(error) = redirect::redirect(&mut self.netlink, card.tap, link.index) {
            card.stale.push((link.index, link.name.clone()));
            if let Err(error) = card.clean(&mut self.netlink) {
                tracing::warn!(error = vz_sys::error::chain(&error), "half of a wiring stays until the next look");
            }
            return Err(failed(error));
        }
        card.link = Some((link.index, link.name.clone()));
        Ok(card.mac)
    }

    /// Takes the redirections from the links, whose indices and names are returned. The TAP devices are the machine's.
    pub fn undo(&mut self) -> Result<Vec<(u32, String)>, Error> {
        let mut links = Vec::new();
        let mut failed = None;
        for card in &mut self.cards {
            links.extend(card.link.clone());
            card.stale.extend(card.link.take());
            if let Err(error) = card.clean(&mut self.netlink) {
                failed = failed.or(Some(error));
            }
        }
        failed.map_or(Ok(links), Err)
    }

    fn set(&mut self, name: &str, message: LinkMessage) -> Result<(), Error> {
        let done = self.netlink.change(RouteNetlinkMessage::SetLink(message));
        done.map_err(|source| Error::Set { name: name.to_owned(), source })
    }
}

/// Makes a TAP device in the calling thread's namespace: a descriptor for each queue. Frames have a virtio-net header.
fn create_tap(name: &str, queues: u16) -> io::Result<Vec<OwnedFd>> {
    let flags = tap::TAP | tap::NO_PI | tap::VNET_HDR | if queues > 1 { tap::MULTI_QUEUE } else { 0 };
    let open = |flags| {
        let tun = OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open("/dev/net/tun")?;
        tap::attach(&tun, name, flags)?;
        Ok(tun.into())
    };
    (0..queues).map(|queue| open(if queue == 0 { flags | tap::EXCLUSIVE } else { flags })).collect()
}

/// Takes the redirection from a link that another process has wired. It may be gone, or its name another's by now.
pub fn take_back(netns: &Netns, index: u32, name: &str) -> Result<(), Error> {
    let mut netlink = netns.run(Netlink::open).and_then(|opened| opened).map_err(Error::Enter)?;
    if describe::links(&mut netlink)?.iter().any(|link| link.index == index && link.name == name) {
        redirect::undo(&mut netlink, index).map_err(|source| Error::Redirect { name: name.to_owned(), source })?;
    }
    Ok(())
}

fn set_flags(message: &mut LinkMessage, which: LinkFlags, value: LinkFlags) {
    message.header.flags = value;
    message.header.change_mask = which;
}

/// The links that a guest is to have. One that is down and has no address is not ready, or one that the kernel puts
/// into every namespace (`tunl0`, `sit0`).
fn wanted(found: Vec<Found>) -> impl Iterator<Item = Found> {
    let ready = |link: &Found| link.up || !link.addresses.is_empty();
    found.into_iter().filter(move |link| !link.loopback && !is_tap(link) && ready(link))
}

/// The address of a link that can be wired.
fn can_be_wired(link: &Found) -> Result<Mac, Error> {
    let known = link.kind.as_deref().is_some_and(|kind| KINDS.contains(&kind));
    link.mac.filter(|_| known).ok_or_else(|| Error::Kind {
        name: link.name.clone(),
        kind: link.kind.clone().unwrap_or_else(|| "hardware".into()),
    })
}

fn is_tap(link: &Found) -> bool {
    link.kind.as_deref() == Some("tun") && link.name.starts_with(TAP)
}
