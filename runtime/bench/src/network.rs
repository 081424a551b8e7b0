//! A network for the fetch of a URL: a card of the guest's, whose other end is in a network namespace of its own, where
//! one TCP port is listened to. What connects to it is connected to the URL's host from here. So the guest reaches this
//! one host, whatever this host's network and firewall are, and nothing else; the host's network is not touched.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkFlags, LinkMessage},
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use vz_machine::control::Nic;
use vz_net::{
    Address, Link, Network, describe,
    netlink::{Add, Netlink},
    netns::Netns,
    wire::{self, Wiring},
};
use vz_sys::sync::lock;

/// Addresses for documentation (RFC 5737): nobody else's.
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const PREFIX: u8 = 24;
const MTU: u32 = 1500;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace or its socket.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
    /// The card.
    #[error(transparent)]
    Wire(#[from] wire::Error),
    /// What there is in the namespace.
    #[error(transparent)]
    Describe(#[from] describe::Error),
    /// No card was made.
    #[error("the network namespace has not the card that was made")]
    NoCard,
    /// The description for the guest.
    #[error("describe network")]
    Description(#[source] serde_json::Error),
}

/// Why a URL cannot be fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no URL that can be fetched: http://HOST[:PORT]/... or https://HOST[:PORT]/...")]
pub struct NoUrl(String);

/// A URL, as the guest is to fetch it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// For the guest: a host that is an address is replaced by the one that it can reach.
    pub guest: String,
    /// For its /etc/hosts.
    pub hosts: String,
    host: String,
    port: u16,
}

impl std::str::FromStr for Url {
    type Err = NoUrl;

    fn from_str(text: &str) -> Result<Self, NoUrl> {
        let none = || NoUrl(text.to_owned());
        let (scheme, rest) = text.split_once("://").ok_or_else(none)?;
        let port = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return Err(none()),
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        // An IPv6 address is in brackets; its colons are no port's.
        let (host, named) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(none)?;
                (host, port.strip_prefix(':'))
            }
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let port = named.map_or(Ok(port), str::parse).map_err(|_| none())?;
        let is_address = host.parse::<IpAddr>().is_ok();
        let is_name = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        let plain = !text.chars().any(|c| c.is_whitespace() || c.is_control());
        if host.is_empty() || port == 0 || !(is_address || is_name) || !plain {
            return Err(none());
        }
        // The name localhost is the guest's own.
        let replaced = is_address || host == "localhost";
        let shown = if replaced { HOST.to_string() } else { host.to_owned() };
        let hosts = if replaced { String::new() } else { format!("{HOST} {host}\n") };
        Ok(Self { guest: format!("{scheme}://{shown}:{port}{path}"), hosts, host: host.to_owned(), port })
    }
}

/// The network of one VM.
#[derive(Debug)]
pub struct Wire {
    /// The guest's card.
    pub nic: Nic,
    /// Its descriptors.
    pub taps: Vec<OwnedFd>,
    /// What the agent is told.
    pub description: Vec<u8>,
    relay: JoinHandle<()>,
    failure: Failure,
}

/// Why the last connection could not be passed on.
type Failure = Arc<Mutex<Option<String>>>;

impl Wire {
    /// Makes it. In a runtime, which relays the connections.
    pub fn new(url: &Url) -> Result<Self, Error> {
        let netns = Netns::create().map_err(|e| Error::System("make network namespace", e))?;
        let mut wiring = Wiring::open(netns)?;
        let tap = wiring.make_cards(1, 1)?.pop().ok_or(Error::NoCard)?;
        let netns = wiring.netns();
        let mut netlink = netns
            .run(Netlink::open)
            .and_then(|opened| opened)
            .map_err(|e| Error::System("enter network namespace", e))?;
        let card = describe::links(&mut netlink)?.into_iter().find(|link| !link.loopback).ok_or(Error::NoCard)?;
        set_up(&mut netlink, card.index).map_err(|e| Error::System("set up network for the guest", e))?;
        let listen = || std::net::TcpListener::bind(SocketAddr::from((HOST, url.port)));
        let listener = netns
            .run(listen)
            .and_then(|bound| bound)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(TcpListener::from_std)
            .map_err(|e| Error::System("listen in network namespace", e))?;
        let failure = Failure::default();
        let relay = tokio::spawn(relay(listener, (url.host.clone(), url.port), Arc::clone(&failure)));
        let address =
            Address { ip: GUEST.into(), prefix: PREFIX, broadcast: None, peer: None, scope: 0, no_prefix_route: false };
        let link =
            Link { name: "eth0".into(), card: tap.mac, mac: tap.mac, mtu: MTU, arp: true, addresses: vec![address] };
        let network = Network { links: vec![link], ..Network::default() };
        let description = serde_json::to_vec(&network).map_err(Error::Description)?;
        Ok(Self { nic: Nic { mac: tap.mac.0, queue_pairs: 1 }, taps: tap.queues, description, relay, failure })
    }
}

impl Wire {
    /// Why a connection of the guest's could not be passed on, since this was asked last.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).take()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.relay.abort();
    }
}

/// The host's end: up, with an address, and answering for it, which a sandbox's does not.
fn set_up(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
    netlink.change(RouteNetlinkMessage::SetLink(link))?;
    let mut address = AddressMessage::default();
    address.header.family = AddressFamily::Inet;
    address.header.prefix_len = PREFIX;
    address.header.index = index;
    address.attributes = vec![AddressAttribute::Local(HOST.into()), AddressAttribute::Address(HOST.into())];
    netlink.add(RouteNetlinkMessage::NewAddress(address), Add::New)
}

/// Connects whoever comes to the target. One that cannot be is closed, which the guest's program reports.
async fn relay(listener: TcpListener, target: (String, u16), failure: Failure) {
    while let Ok((mut guest, _)) = listener.accept().await {
        let (target, failure) = (target.clone(), Arc::clone(&failure));
        tokio::spawn(async move {
            match TcpStream::connect((target.0.as_str(), target.1)).await {
                // Either side's failure is the end of both.
                Ok(mut host) => drop(tokio::io::copy_bidirectional(&mut guest, &mut host).await),
                Err(e) => {
                    let why = format!("connect to {}, port {}: {e}", target.0, target.1);
                    *lock(&failure) = Some(why);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_kept_and_leads_to_the_relay() {
        let plain = url("http://example.org/a?b=c");
        assert_eq!(plain.guest, "http://example.org:80/a?b=c");
        assert_eq!(plain.hosts, "192.0.2.1 example.org\n");
        assert_eq!((url("https://x").guest.as_str(), url("https://x").port), ("https://x:443", 443));
        assert_eq!(url("http://a.b-c:8080?x").guest, "http://a.b-c:8080?x");
    }

    #[test]
    fn an_address_is_replaced_by_the_relays() {
        for (text, host) in [
            ("http://127.0.0.1:8000/x", "127.0.0.1"),
            ("http://[::1]:8000/x", "::1"),
            ("http://localhost:8000/x", "localhost"),
        ] {
            let url = url(text);
            assert_eq!((url.guest.as_str(), url.hosts.as_str()), ("http://192.0.2.1:8000/x", ""));
            assert_eq!((url.host.as_str(), url.port), (host, 8000));
        }
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for text in [
            "",
            "example.org",
            "ftp://x/",
            "http://",
            "http:///x",
            "http://x:0/",
            "http://x:y/",
            "http://[::1",
            "http://a@b/",
            "http://x/ y",
            "http://x/\n",
        ] {
            let refused = text.parse::<Url>().unwrap_err().to_string();
            assert!(refused.contains("HOST[:PORT]"), "{refused}");
        }
    }
}
