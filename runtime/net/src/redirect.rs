//! Redirecting a link's packets by traffic control (tc): what comes in through one leaves through the other.

use std::io;

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
        TcFilterMatchAll, TcFilterMatchAllOption, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
        TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
    },
};

use crate::netlink::{Add, Netlink};

/// The qdisc `ingress` has this handle and parent, always.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
const INGRESS_PARENT: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };
/// `ETH_P_ALL`, in network byte order, and priority 1: the two halves of a filter's `info`.
const EVERYTHING: u32 = (1 << 16) | (0x0003_u16.to_be() as u32);

/// Redirects all that comes in through the link with index `from` to leave through the one with index `to`; all or
/// nothing. Fails with `AlreadyExists` where somebody else redirects what comes in there.
pub fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    netlink.add(RouteNetlinkMessage::NewQueueDiscipline(qdisc(from)), Add::New)?;
    let filter = |kind, options| RouteNetlinkMessage::NewTrafficFilter(filter(from, kind, options));
    let added = match netlink.add(filter(TcFilterMatchAll::KIND, matchall(to)), Add::New) {
        // A kernel without that classifier: one that looks at a byte, and takes it whatever it is.
        Err(e) if e.kind() == io::ErrorKind::NotFound => netlink.add(filter(TcFilterU32::KIND, u32(to)), Add::New),
        other => other,
    };
    if added.is_err() {
        // What failed is said; that it cannot be taken back either adds nothing.
        drop(undo(netlink, from));
    }
    added
}

/// Ends what [`redirect`] has begun for the link with index `from`. No link, or nothing there, is no error.
pub fn undo(netlink: &mut Netlink, from: u32) -> io::Result<()> {
    match netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc(from))) {
        Err(e) if matches!(e.raw_os_error(), Some(nix::libc::ENODEV | nix::libc::ENOENT | nix::libc::EINVAL)) => Ok(()),
        other => other,
    }
}

fn message(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.family = AddressFamily::Unspec;
    message.header.index = index.cast_signed();
    message
}

fn qdisc(index: u32) -> TcMessage {
    let mut qdisc = message(index);
    qdisc.header.handle = INGRESS;
    qdisc.header.parent = INGRESS_PARENT;
    qdisc.attributes.push(TcAttribute::Kind("ingress".into()));
    qdisc
}

fn filter(index: u32, kind: &str, options: TcOption) -> TcMessage {
    let mut filter = message(index);
    filter.header.parent = INGRESS;
    filter.header.info = EVERYTHING;
    filter.attributes.push(TcAttribute::Kind(kind.into()));
    filter.attributes.push(TcAttribute::Options(match options {
        TcOption::U32(action) => vec![TcOption::U32(TcFilterU32Option::Selector(any())), TcOption::U32(action)],
        other => vec![other],
    }));
    filter
}

fn matchall(to: u32) -> TcOption {
    TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![steal(to)]))
}

fn u32(to: u32) -> TcOption {
    TcOption::U32(TcFilterU32Option::Action(vec![steal(to)]))
}

/// One key whose mask is empty.
fn any() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

/// The action `mirred egress redirect`.
fn steal(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}
