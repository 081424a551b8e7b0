//! What a network namespace has.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteVia},
};

use crate::{Address, Mac, Neighbour, Route, netlink::Netlink};

/// `RT_TABLE_LOCAL`: what the kernel keeps of its own addresses.
const TABLE_LOCAL: u32 = 255;

/// Why a namespace could not be described.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel did not say.
    #[error("list {0}")]
    List(&'static str, #[source] io::Error),
    /// Something that the description has no place for.
    #[error("route to {destination} of the network namespace has {what}, which cannot be carried into a VM")]
    Route {
        /// Its destination.
        destination: String,
        /// What it has.
        what: &'static str,
    },
}

/// A link, as the namespace has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind: `veth`, `macvlan`, ...; nothing for hardware.
    pub kind: Option<String>,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Its address, where it is Ethernet.
    pub mac: Option<Mac>,
    /// Its permanent address.
    pub permanent: Option<Mac>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether neighbours are looked for.
    pub arp: bool,
    /// Its addresses.
    pub addresses: Vec<Address>,
}

/// The links, with their addresses, by index.
pub fn links(netlink: &mut Netlink) -> Result<Vec<Found>, Error> {
    let list = |what: &'static str| move |e| Error::List(what, e);
    let messages = netlink.list(&RouteNetlinkMessage::GetLink(LinkMessage::default())).map_err(list("links"))?;
    let mut found: Vec<Found> = messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })
        .collect();
    found.sort_by_key(|link| link.index);
    let messages =
        netlink.list(&RouteNetlinkMessage::GetAddress(AddressMessage::default())).map_err(list("addresses"))?;
    for message in messages {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        let index = message.header.index;
        if let (Some(link), Some(address)) = (found.iter_mut().find(|link| link.index == index), address(message)) {
            link.addresses.push(address);
        }
    }
    Ok(found)
}

fn link(message: LinkMessage) -> Found {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let mut found = Found {
        index: message.header.index,
        name: String::new(),
        kind: None,
        loopback: flags.contains(LinkFlags::Loopback),
        mac: None,
        permanent: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        arp: !flags.contains(LinkFlags::Noarp),
        addresses: Vec::new(),
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name = name,
            LinkAttribute::Mtu(mtu) => found.mtu = mtu,
            LinkAttribute::Address(bytes) if ethernet => found.mac = mac(&bytes),
            LinkAttribute::PermAddress(bytes) if ethernet => found.permanent = mac(&bytes),
            LinkAttribute::LinkInfo(infos) => {
                found.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    found
}

fn mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

/// Nothing for addresses that the guest makes by itself.
fn address(message: AddressMessage) -> Option<Address> {
    let (mut address, mut local, mut broadcast) = (None, None, None);
    let mut flags = AddressFlags::empty();
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(ip),
            AddressAttribute::Local(ip) => local = Some(ip),
            AddressAttribute::Broadcast(ip) => broadcast = Some(ip),
            AddressAttribute::Flags(all) => flags = all,
            _ => {}
        }
    }
    // Made out of a router's advertisement, which the guest gets too.
    if message.header.family == AddressFamily::Inet6 && !flags.contains(AddressFlags::Permanent) {
        return None;
    }
    let ip = local.or(address)?;
    Some(Address {
        ip,
        prefix: message.header.prefix_len,
        broadcast,
        peer: address.filter(|peer| *peer != ip),
        scope: message.header.scope.into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
    })
}

/// The routes over these links, or over none, except for those that the kernel makes by itself.
pub fn routes(netlink: &mut Netlink, links: &[(u32, String)]) -> Result<Vec<Route>, Error> {
    let messages =
        netlink.list(&RouteNetlinkMessage::GetRoute(RouteMessage::default())).map_err(|e| Error::List("routes", e))?;
    let mut routes = Vec::new();
    for message in messages {
        if let RouteNetlinkMessage::NewRoute(message) = message
            && let Some(route) = route(message, links)?
        {
            routes.push(route);
        }
    }
    // A router must be reachable before a route over it can be added.
    routes.sort_by_key(|route| (route.gateway.is_some(), std::cmp::Reverse(route.scope)));
    Ok(routes)
}

fn route(message: RouteMessage, links: &[(u32, String)]) -> Result<Option<Route>, Error> {
    let header = message.header;
    let own = matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect);
    if own || header.flags.contains(RouteFlags::Cloned) {
        return Ok(None);
    }
    let v6 = header.address_family == AddressFamily::Inet6;
    if !v6 && header.address_family != AddressFamily::Inet {
        return Ok(None);
    }
    let mut route = Route {
        v6,
        destination: None,
        prefix: header.destination_prefix_length,
        kind: header.kind.into(),
        table: header.table.into(),
        protocol: header.protocol.into(),
        scope: header.scope.into(),
        tos: header.tos,
        link: None,
        gateway: None,
        source: None,
        metric: None,
        onlink: header.flags.contains(RouteFlags::Onlink),
        mtu: None,
        advmss: None,
    };
    let mut index = None;
    let mut foreign = None;
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => route.destination = ip(&to),
            RouteAttribute::Gateway(gateway) => route.gateway = ip(&gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => route.gateway = Some(gateway.into()),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = Some(gateway.into()),
            RouteAttribute::PrefSource(source) => route.source = ip(&source),
            RouteAttribute::Priority(metric) => route.metric = Some(metric),
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Oif(oif) => index = Some(oif),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = Some(mtu),
                        RouteMetric::Advmss(mss) => route.advmss = Some(mss),
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(_) => foreign = Some("several next hops"),
            RouteAttribute::Encap(_) => foreign = Some("an encapsulation"),
            RouteAttribute::Source(_) => foreign = Some("a source prefix"),
            _ => {}
        }
    }
    if route.table == TABLE_LOCAL {
        return Ok(None);
    }
    if let Some(index) = index {
        // Over a link that is none of the guest's.
        let Some((_, name)) = links.iter().find(|(known, _)| *known == index) else { return Ok(None) };
        route.link = Some(name.clone());
    }
    if let Some(what) = foreign {
        let destination = route.destination.map_or("everywhere".into(), |ip| format!("{ip}/{}", route.prefix));
        return Err(Error::Route { destination, what });
    }
    Ok(Some(route))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// The static neighbours on these links.
pub fn neighbours(netlink: &mut Netlink, links: &[(u32, String)]) -> Result<Vec<Neighbour>, Error> {
    let messages = netlink
        .list(&RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()))
        .map_err(|e| Error::List("neighbours", e))?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => neighbour(message, links),
            _ => None,
        })
        .collect())
}

fn neighbour(message: NeighbourMessage, links: &[(u32, String)]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (_, link) = links.iter().find(|(index, _)| *index == message.header.ifindex)?;
    let (mut found, mut hardware) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => found = Some(ip.into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => found = Some(ip.into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => hardware = mac(&bytes),
            _ => {}
        }
    }
    Some(Neighbour { link: link.clone(), ip: found?, mac: hardware? })
}
