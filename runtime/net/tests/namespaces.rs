//! Real network namespaces: what one has is wired, described, and made again in another. Needs root and /dev/net/tun.

use std::{
    io::{Read, Write},
    net::UdpSocket,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process::Command,
};

use vz_net::{
    Network,
    configure::Guest,
    netns::Netns,
    watch::Watch,
    wire::{Error, Wiring},
};

/// Says why nothing can be tested here.
fn unfit() -> bool {
    let unfit = !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists();
    if unfit {
        vz_tally::skip!("needs root and /dev/net/tun");
    }
    unfit
}

/// A path to a namespace, for as long as it is held.
fn path(netns: &Netns) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd()).into()
}

/// Runs a shell script in a namespace.
#[track_caller]
fn shell(netns: &Netns, script: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-ec", script]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn sync(wiring: &mut Wiring) -> Result<Network, Error> {
    let (network, refused) = wiring.sync(|_, _| Ok(()))?;
    refused.map_or(Ok(network), Err)
}

/// What `ip` says that is not different by nature: of another kind of link, with another index.
fn seen(netns: &Netns) -> String {
    shell(
        netns,
        "ip -o link show dev eth0 | grep -o -E 'mtu [0-9]+|link/ether [0-9a-f:]+|NOARP'; \
         ip -o addr show dev eth0 | sed 's/^[0-9]*: //'; ip route; ip route show table 100; ip -6 route; \
         ip neigh show nud permanent",
    )
}

#[test]
fn a_network_is_made_again_as_it_was() {
    if unfit() {
        return;
    }
    let (host, root, guest) = (Netns::create().unwrap(), Netns::create().unwrap(), Netns::create().unwrap());
    shell(
        &host,
        "ip link add eth0 type veth peer name peer
         ip link set peer up
         ip link set eth0 address 02:11:22:33:44:55 mtu 1400 up
         ip addr add 10.9.8.7/24 broadcast 10.9.8.255 dev eth0
         ip addr add 10.9.9.7/32 dev eth0
         ip addr add fd00:9::7/64 nodad dev eth0
         ip route add default via 10.9.8.1
         ip route add 10.1.0.0/16 via 10.9.8.2 metric 77 src 10.9.8.7 mtu 1300
         ip route add 10.2.0.0/16 dev eth0 scope link
         ip route add 10.3.0.0/16 via 192.0.2.1 dev eth0 onlink
         ip route add 10.4.0.0/16 via 10.9.8.4 table 100
         ip route add unreachable 10.5.0.0/16
         ip -6 route add default via fd00:9::1
         ip neigh add 10.9.8.50 lladdr 02:aa:bb:cc:dd:ee dev eth0 nud permanent",
    );
    let mut wiring = Wiring::open(host).unwrap();
    wiring.loopback_up().unwrap();
    assert_eq!(wiring.links().unwrap(), 2);
    shell(wiring.netns(), "ip link set peer down");
    assert_eq!(wiring.links().unwrap(), 1);
    let taps = wiring.make_cards(2, 2).unwrap();
    assert_eq!(taps.iter().map(|tap| tap.queues.len()).collect::<Vec<_>>(), [2, 2]);
    // A second sandbox stays out.
    let again = Netns::open(&path(wiring.netns())).unwrap();
    assert!(matches!(Wiring::open(again).unwrap().make_cards(1, 2), Err(Error::Busy)));
    shell(wiring.netns(), "ip link set peer up; sleep 0.1");
    shell(wiring.netns(), "ip link set peer down");
    let network = sync(&mut wiring).unwrap();
    assert_eq!(network.links.len(), 1);
    let text = serde_json::to_string(&network).unwrap();
    let network = serde_json::from_str(&text).unwrap();

    // The guest's cards, which find the addresses that the machine gives them.
    let mut inside = root
        .run(|| {
            let script = "for i in 0 1; do ip link add card$i address 02:76:7a:00:00:0$i type veth peer name p$i; done";
            assert!(Command::new("sh").args(["-ec", script]).status().unwrap().success());
            Guest::open(Netns::open(&path(&guest)).unwrap()).unwrap()
        })
        .unwrap();
    inside.configure(&network).unwrap();
    shell(&root, "ip link set p0 up");
    let strip =
        |text: String| [" linkdown", "nodad ", "tentative "].iter().fold(text, |text, word| text.replace(word, ""));
    assert_eq!(strip(seen(&guest)), strip(seen(wiring.netns())));
    wiring.undo().unwrap();
    assert_eq!(shell(wiring.netns(), "tc qdisc show dev eth0 ingress"), "");
}

#[test]
fn packets_go_both_ways_and_late_links_are_noticed() {
    if unfit() {
        return;
    }
    let (host, other) = (Netns::create().unwrap(), Netns::create().unwrap());
    let watch = Watch::start(&host).unwrap();
    assert!(!watch.take().unwrap());
    let mut wiring = Wiring::open(host).unwrap();
    let taps = wiring.make_cards(1, 1).unwrap();
    watch.take().unwrap();
    assert!(sync(&mut wiring).unwrap().links.is_empty());
    shell(
        wiring.netns(),
        &format!(
            "ip link add eth0 type veth peer name far netns {}; ip link set eth0 addrgenmode none up",
            path(&other).display()
        ),
    );
    shell(&other, "ip link set far addrgenmode none up");
    assert!(watch.take().unwrap());
    assert_eq!(sync(&mut wiring).unwrap().links[0].name, "eth0");
    // A frame of the guest, behind its virtio_net_hdr.
    let mut tap = std::fs::File::from(taps.into_iter().next().unwrap().queues.into_iter().next().unwrap());
    let mut frame = [0u8; 10 + 64];
    frame[10..16].fill(0xff);
    frame[16..22].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[22..24].copy_from_slice(&[0x88, 0xb5]);
    let received = || -> u64 {
        let said: serde_json::Value = serde_json::from_str(&shell(&other, "ip -s -j link show far")).unwrap();
        said[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    };
    let before = received();
    tap.write_all(&frame).unwrap();
    assert_eq!(received(), before + 1);
    // And one for it.
    shell(&other, "ip addr add 10.1.1.1/24 dev far");
    let send = || UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"x", "10.1.1.2:9"));
    other.run(send).unwrap().unwrap();
    let mut seen = false;
    let mut packet = [0u8; 2048];
    while let Ok(length) = tap.read(&mut packet) {
        seen |= packet[..length].windows(2).any(|bytes| bytes == [0x08, 0x06]);
    }
    assert!(seen, "no ARP request has arrived");
    // The link goes, its card is free for another.
    shell(wiring.netns(), "ip link del eth0");
    assert!(watch.take().unwrap());
    assert!(sync(&mut wiring).unwrap().links.is_empty());
    shell(wiring.netns(), "ip link add d0 type veth peer name e0; ip link set d0 up");
    assert_eq!(sync(&mut wiring).unwrap().links[0].name, "d0");
    shell(wiring.netns(), "ip link add d1 type veth peer name e1; ip link set d1 up");
    let error = sync(&mut wiring).unwrap_err().to_string();
    assert!(error.contains("d1"), "{error}");
    shell(wiring.netns(), "ip link del d1; ip link add br0 type bridge; ip link set br0 up");
    let error = sync(&mut wiring).unwrap_err().to_string();
    assert!(error.contains("br0 (bridge)"), "{error}");
}

#[test]
fn a_link_is_wired_in_both_directions_or_in_none() {
    if unfit() {
        return;
    }
    let mut wiring = Wiring::open(Netns::create().unwrap()).unwrap();
    let _taps = wiring.make_cards(1, 1).unwrap();
    let tap = shell(wiring.netns(), "ip -o link | grep -o 'lovz[0-9]*'");
    shell(wiring.netns(), "ip link add eth0 type veth peer name peer; ip link set eth0 up");
    let ingress = |wiring: &Wiring, dev: &str| shell(wiring.netns(), &format!("tc qdisc show dev {dev} ingress"));
    // The second direction cannot be had while somebody else redirects there.
    shell(wiring.netns(), &format!("tc qdisc add dev {tap} ingress"));
    assert!(matches!(sync(&mut wiring), Err(Error::Redirect { .. })));
    assert_eq!(ingress(&wiring, "eth0"), "", "half of a wiring is left");
    assert!(matches!(sync(&mut wiring), Err(Error::Redirect { .. })));
    shell(wiring.netns(), &format!("tc qdisc del dev {tap} ingress"));
    assert_eq!(sync(&mut wiring).unwrap().links.len(), 1);
    for dev in ["eth0", &tap] {
        let filters = shell(wiring.netns(), &format!("tc filter show dev {dev} ingress"));
        assert!(filters.contains("mirred"), "{dev}: {filters}");
    }
    // A link that goes gives its card back, and another one gets it.
    shell(wiring.netns(), "ip link del eth0; ip link add eth1 type veth peer name peer1; ip link set eth1 up");
    assert_eq!(sync(&mut wiring).unwrap().links[0].name, "eth1");
    assert_eq!(wiring.undo().unwrap().len(), 1);
    assert_eq!(ingress(&wiring, "eth1"), "");
}
