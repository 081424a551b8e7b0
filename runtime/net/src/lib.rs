//! Networks of sandboxes.
//!
//! On the host, a sandbox has a network namespace ([`netns`]), in which others put links: CNI plugins, nerdctl, a
//! person. Each link is wired to a TAP device ([`wire`]), whose other end is a network card of the VM, and described
//! ([`describe`]): MAC address, MTU, addresses, routes, neighbours. In the guest the same crate makes the card look
//! like the link ([`configure`]). The host's kernel keeps the link's addresses, so that clients find them there, and
//! never sees a packet.
//!
//! Everything is asked of the kernel by netlink ([`netlink`]), synchronously: each request is answered within
//! microseconds.

pub mod configure;
pub mod describe;
pub mod netlink;
pub mod netns;
mod redirect;
pub mod watch;
pub mod wire;

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a network namespace has, as the guest is to have it; `lo` is not in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its links.
    pub links: Vec<Link>,
    /// Routes that the kernel does not make by itself out of the addresses, in an order in which they can be added.
    pub routes: Vec<Route>,
    /// Static neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// The card that it is wired to, by the address that the guest's driver has found.
    pub card: Mac,
    /// Its address.
    pub mac: Mac,
    /// Its MTU.
    pub mtu: u32,
    /// Whether neighbours are looked for.
    pub arp: bool,
    /// Its addresses, the primary one first.
    pub addresses: Vec<Address>,
}

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Length of the prefix.
    pub prefix: u8,
    /// Of IPv4.
    pub broadcast: Option<std::net::Ipv4Addr>,
    /// The other end's, where the link is from point to point.
    pub peer: Option<IpAddr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Whether the kernel makes no route for the prefix.
    pub no_prefix_route: bool,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Whether it is of IPv6.
    pub v6: bool,
    /// Where to; nothing for the default route.
    pub destination: Option<IpAddr>,
    /// Length of the prefix.
    pub prefix: u8,
    /// `RTN_*`: unicast, blackhole, unreachable, prohibit, ...
    pub kind: u8,
    /// The table.
    pub table: u32,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Type of service that it is for.
    pub tos: u8,
    /// Name of the link.
    pub link: Option<String>,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// The address to send from.
    pub source: Option<IpAddr>,
    /// Priority.
    pub metric: Option<u32>,
    /// Whether the router is on the link whatever the addresses say.
    pub onlink: bool,
    /// MTU of the path.
    pub mtu: Option<u32>,
    /// Largest segment to advertise.
    pub advmss: Option<u32>,
}

/// A static neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Name of the link.
    pub link: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its MAC address.
    pub mac: Mac,
}
