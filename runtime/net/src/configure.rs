//! The guest's side: its cards, made to look like the links that they are wired to.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteVia},
};

use crate::{
    Address, Link, Mac, Neighbour, Network, Route, describe,
    describe::Found,
    netlink::{Add, Netlink},
    netns::Netns,
};

/// Why the guest's network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of the two namespaces.
    #[error("enter network namespace")]
    Enter(#[source] io::Error),
    /// What there is.
    #[error(transparent)]
    Describe(#[from] describe::Error),
    /// The VM has no such card.
    #[error("no network card with address {card} for link {link}")]
    NoCard {
        /// The card.
        card: Mac,
        /// The link.
        link: String,
    },
    /// A card could not be moved or set up.
    #[error("{action} link {link}")]
    Link {
        /// What was tried.
        action: &'static str,
        /// The link.
        link: String,
        /// Why not.
        source: io::Error,
    },
    /// An address.
    #[error("add address {address}/{prefix} to link {link}")]
    Address {
        /// The address.
        address: IpAddr,
        /// Its prefix.
        prefix: u8,
        /// The link.
        link: String,
        /// Why not.
        source: io::Error,
    },
    /// A route.
    #[error("add route to {destination}")]
    Route {
        /// Where to.
        destination: String,
        /// Why not.
        source: io::Error,
    },
    /// A neighbour.
    #[error("add neighbour {ip} of link {link}")]
    Neighbour {
        /// Its address.
        ip: IpAddr,
        /// The link.
        link: String,
        /// Why not.
        source: io::Error,
    },
}

/// The namespaces of the guest: that in which its drivers put cards, and that of the containers.
#[derive(Debug)]
pub struct Guest {
    root_netns: Netns,
    netns: Netns,
    root: Netlink,
    inside: Netlink,
}

impl Guest {
    /// Cards are in the calling thread's namespace; containers are in `netns`.
    pub fn open(netns: Netns) -> Result<Self, Error> {
        let inside = netns.run(Netlink::open).and_then(|opened| opened).map_err(Error::Enter)?;
        Ok(Self {
            root_netns: Netns::current().map_err(Error::Enter)?,
            root: Netlink::open().map_err(Error::Enter)?,
            netns,
            inside,
        })
    }

    /// Gives the containers these links, addresses, routes and neighbours. Once more with others: what has been added
    /// is added, and a link that has gone is taken away; what containers have made themselves stays.
    pub fn configure(&mut self, network: &Network) -> Result<(), Error> {
        let wanted = |found: &Found| network.links.iter().any(|link| is(found, link.card));
        for link in describe::links(&mut self.inside)?.iter().filter(|found| is_card(found) && !wanted(found)) {
            let failed = |source| Error::Link { action: "take away", link: link.name.clone(), source };
            let message = set(link.index, |to| to.push(LinkAttribute::NetNsFd(self.root_netns.as_fd().as_raw_fd())));
            self.inside.change(message).map_err(failed)?;
        }
        let mut indices = Vec::new();
        for link in &network.links {
            indices.push((self.link(link)?, link.name.clone()));
        }
        let index = |name: &str| indices.iter().find(|(_, known)| known == name).map(|(index, _)| *index);
        for route in &network.routes {
            let over = route.link.as_deref().and_then(index);
            self.inside.add(route_message(route, over), Add::Replace).map_err(|source| Error::Route {
                destination: route.destination.map_or("everywhere".into(), |ip| format!("{ip}/{}", route.prefix)),
                source,
            })?;
        }
        for neighbour in &network.neighbours {
            let Some(index) = index(&neighbour.link) else { continue };
            self.inside.add(neighbour_message(neighbour, index), Add::Replace).map_err(|source| Error::Neighbour {
                ip: neighbour.ip,
                link: neighbour.link.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Sets a link up: its index.
    fn link(&mut self, link: &Link) -> Result<u32, Error> {
        let failed = |action| move |source| Error::Link { action, link: link.name.clone(), source };
        let index = match find(&mut self.inside, link.card)? {
            Some(found) => found.index,
            None => {
                let no_card = || Error::NoCard { card: link.card, link: link.name.clone() };
                let card = find(&mut self.root, link.card)?.ok_or_else(no_card)?;
                let message = set(card.index, |to| {
                    to.push(LinkAttribute::NetNsFd(self.netns.as_fd().as_raw_fd()));
                    to.push(LinkAttribute::IfName(link.name.clone()));
                });
                self.root.change(message).map_err(failed("move"))?;
                find(&mut self.inside, link.card)?.ok_or_else(no_card)?.index
            }
        };
        // Its addresses are all that it is to have, the link-local one too.
        let message = set(index, |to| {
            to.push(LinkAttribute::Address(link.mac.0.to_vec()));
            to.push(LinkAttribute::Mtu(link.mtu));
            let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
            to.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]));
        });
        self.inside.change(message).map_err(failed("set up"))?;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
        message.header.flags = if link.arp { LinkFlags::Up } else { LinkFlags::Up | LinkFlags::Noarp };
        self.inside.change(RouteNetlinkMessage::SetLink(message)).map_err(failed("set up"))?;
        for address in &link.addresses {
            self.inside.add(address_message(address, index), Add::Replace).map_err(|source| Error::Address {
                address: address.ip,
                prefix: address.prefix,
                link: link.name.clone(),
                source,
            })?;
        }
        Ok(index)
    }
}

/// Whether a link is this card. Its driver has found that address, whatever it was set to later.
fn is(found: &Found, card: Mac) -> bool {
    found.permanent.or(found.mac) == Some(card)
}

/// Whether a link is a card of ours.
fn is_card(found: &Found) -> bool {
    found.kind.is_none() && found.permanent.is_some_and(|mac| mac.0.starts_with(&crate::wire::CARD))
}

fn find(netlink: &mut Netlink, card: Mac) -> Result<Option<Found>, Error> {
    Ok(describe::links(netlink)?.into_iter().find(|found| is(found, card)))
}

fn set(index: u32, change: impl FnOnce(&mut Vec<LinkAttribute>)) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    change(&mut message.attributes);
    RouteNetlinkMessage::SetLink(message)
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn address_message(address: &Address, index: u32) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let attributes = &mut message.attributes;
    attributes.push(AddressAttribute::Local(address.ip));
    attributes.push(AddressAttribute::Address(address.peer.unwrap_or(address.ip)));
    attributes.extend(address.broadcast.map(AddressAttribute::Broadcast));
    // Whoever gave the address out has seen to it that nobody else has it.
    let mut flags = AddressFlags::Permanent;
    flags.set(AddressFlags::Nodad, address.ip.is_ipv6());
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    attributes.push(AddressAttribute::Flags(flags));
    RouteNetlinkMessage::NewAddress(message)
}

fn route_message(route: &Route, over: Option<u32>) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = if route.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    header.destination_prefix_length = route.prefix;
    header.tos = route.tos;
    // Larger numbers are in the attribute only.
    header.table = u8::try_from(route.table).unwrap_or(0);
    header.protocol = route.protocol.into();
    header.scope = route.scope.into();
    header.kind = route.kind.into();
    header.flags.set(RouteFlags::Onlink, route.onlink);
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    attributes.extend(route.destination.map(|ip| RouteAttribute::Destination(route_address(ip))));
    attributes.extend(route.gateway.map(|gateway| match gateway {
        IpAddr::V6(ip) if !route.v6 => RouteAttribute::Via(RouteVia::Inet6(ip)),
        ip => RouteAttribute::Gateway(route_address(ip)),
    }));
    attributes.extend(route.source.map(|ip| RouteAttribute::PrefSource(route_address(ip))));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(over.map(RouteAttribute::Oif));
    let metrics: Vec<_> =
        route.mtu.map(RouteMetric::Mtu).into_iter().chain(route.advmss.map(RouteMetric::Advmss)).collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    RouteNetlinkMessage::NewRoute(message)
}

fn route_address(ip: IpAddr) -> RouteAddress {
    ip.into()
}

fn neighbour_message(neighbour: &Neighbour, index: u32) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(match neighbour.ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        }),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.0.to_vec()),
    ];
    RouteNetlinkMessage::NewNeighbour(message)
}
