//! The same script of network commands with runc and with vz, its output compared line by line.

use std::{collections::BTreeMap, fmt::Write};

use vz_suite::{Lab, Verdict, lab::DEBIAN, tests};

use super::net::{Network, subnet};

tests![the_same_commands_say_the_same_as_with_runc];

/// Name, and what is run. `$GW` is the router.
const COMMANDS: &[(&str, &str)] = &[
    ("links", "ls /sys/class/net | sort"),
    (
        "link",
        "ip -o link show eth0 | sed 's/@if[0-9]*//' | grep -oE 'eth0: <[A-Z_,]*>|mtu [0-9]+|link/ether [0-9a-f:]+|state [A-Z]+'",
    ),
    ("link in full", "ip -o link show eth0"),
    ("loopback", "ip -o addr show lo | sed 's/^[0-9]*: //'"),
    ("mtu", "cat /sys/class/net/eth0/mtu"),
    ("mac", "cat /sys/class/net/eth0/address"),
    ("driver", "readlink /sys/class/net/eth0/device/driver >/dev/null && echo a device || echo none"),
    ("carrier", "cat /sys/class/net/eth0/carrier"),
    ("addresses", "ip -4 -o addr show dev eth0 | sed 's/^[0-9]*: //'"),
    ("IPv6 addresses", "ip -6 -o addr show dev eth0 scope global | sed 's/^[0-9]*: //; s/nodad //'"),
    ("link-local address", "ip -6 -o addr show dev eth0 scope link | sed 's/^[0-9]*: //; s/nodad //'"),
    ("tentative addresses", "ip -6 addr show tentative"),
    ("routes", "ip route show table main"),
    ("routes in other tables", "ip -4 route show table local | sed 's/ proto kernel//'"),
    ("IPv6 routes", "ip -6 route show table main"),
    ("way to the router", "ip -o route get $GW | sed 's/ uid.*//'"),
    ("way out", "ip -o route get 198.51.100.1 | sed 's/ uid.*//'"),
    ("rules", "ip rule; ip -6 rule"),
    ("static neighbours", "ip neigh show nud permanent"),
    ("names in /proc/net/dev", "tail -n +3 /proc/net/dev | awk '{print $1}' | sort"),
    ("hosts", "sed '/nerdctl/d' /etc/hosts | awk '{print $1}' | sort"),
    ("resolv.conf", "cat /etc/resolv.conf"),
    ("hostname", "hostname; cat /etc/hostname; uname -n"),
    ("own name", "getent hosts same | awk '{print $1}'"),
    ("localhost", "getent ahostsv4 localhost | head -1"),
    ("nobody listens", "connect $GW 9"),
    (
        "self by its address",
        "listen 7001 & timeout 5 sh -c 'until grep -q :1B59 /proc/net/tcp; do sleep 0.1; done'; connect 127.0.0.1 7001; wait",
    ),
    ("no way", "connect 255.255.255.255 9"),
    ("unprivileged ports", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"),
    ("forwarding", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"),
    (
        "sysctls of the link",
        "cat /proc/sys/net/ipv4/conf/eth0/rp_filter /proc/sys/net/ipv6/conf/eth0/disable_ipv6 /proc/sys/net/ipv4/conf/eth0/arp_ignore",
    ),
    (
        "keepalive",
        "cat /proc/sys/net/ipv4/tcp_keepalive_time /proc/sys/net/ipv4/tcp_syn_retries /proc/sys/net/ipv4/ip_local_port_range",
    ),
    ("somaxconn", "cat /proc/sys/net/core/somaxconn"),
    ("a sysctl of the spec", "cat /proc/sys/net/ipv4/tcp_fin_timeout"),
    ("congestion control", "cat /proc/sys/net/ipv4/tcp_congestion_control"),
    ("listeners", "ss -Htlnu"),
    ("raw socket", "try socket.AF_INET socket.SOCK_RAW 1"),
    ("packet socket", "try socket.AF_PACKET socket.SOCK_RAW 768"),
    ("ping socket", "try socket.AF_INET socket.SOCK_DGRAM 1"),
    ("netlink", "try socket.AF_NETLINK socket.SOCK_RAW 0"),
    ("sctp", "try socket.AF_INET socket.SOCK_STREAM 132"),
    (
        "multicast",
        "python3 -c \"import socket as s; x = s.socket(s.AF_INET, s.SOCK_DGRAM); x.setsockopt(s.IPPROTO_IP, s.IP_ADD_MEMBERSHIP, s.inet_aton('239.1.1.1') + s.inet_aton('0.0.0.0')); print('joined')\"",
    ),
    (
        "veth",
        "ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up && ip -br link show v0 | awk '{print $1, $2}'",
    ),
    (
        "bridge",
        "ip link add br9 type bridge && ip link set v0 master br9 && ip addr add 10.250.0.1/24 dev br9 && ip link set br9 up && ip -br -4 addr show br9 | awk '{print $1, $3}'",
    ),
    ("macvlan", "ip link add m0 link eth0 type macvlan mode bridge && ip -br link show m0 | awk '{print $1, $2}'"),
    ("namespace", "unshare -n ip -br link 2>&1 | awk '{print $1, $2}'"),
    (
        "rule and table",
        "ip rule add from 10.250.0.0/24 table 77 && ip route add default dev br9 table 77 && ip route show table 77; ip rule | wc -l",
    ),
    ("blackhole", "ip route add blackhole 203.0.113.0/24 && ip route show 203.0.113.0/24 && connect 203.0.113.1 9"),
    (
        "queueing",
        "tc qdisc add dev eth0 root handle 1: prio && tc qdisc show dev eth0 | awk '{print $2, $3}'; tc qdisc del dev eth0 root && echo gone",
    ),
    ("iptables", "iptables -A INPUT -p tcp --dport 9999 -j DROP && iptables -S INPUT"),
    (
        "iptables nat",
        "iptables -t nat -A PREROUTING -p tcp --dport 8 -j REDIRECT --to-ports 9 && iptables -t nat -S PREROUTING",
    ),
    ("ip6tables", "ip6tables -A INPUT -p tcp --dport 9999 -j REJECT && ip6tables -S INPUT"),
    (
        "nftables",
        "nft add table inet t && nft add chain inet t c '{ type filter hook input priority 0; }' && nft add rule inet t c tcp dport 7 counter drop && nft list table inet t",
    ),
    ("conntrack", "iptables -A OUTPUT -m conntrack --ctstate INVALID -j DROP && iptables -S OUTPUT"),
];

/// Where vz differs, and why: see docs/limits.md.
const DIFFERENT: &[(&str, &str)] = &[
    ("link in full", "another kind of link, index and queueing discipline"),
    ("driver", "a virtio card, not a veth"),
    ("forwarding", "the host's setting is inherited by its namespaces, not by a guest"),
    ("congestion control", "each kernel has its default"),
    ("sctp", "the guest's kernel has no SCTP, and a host need not"),
    ("queueing", "each kernel has its disciplines; the guest has prio, and a host need not"),
];

const PRELUDE: &str = r#"
connect() { python3 - "$1" "$2" <<'P'
import errno, socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 5)
    print("connected")
except OSError as e:
    print(errno.errorcode.get(e.errno, e))
P
}
listen() { timeout 5 python3 -c "import socket; s = socket.create_server(('127.0.0.1', $1)); s.accept()"; }
try() { python3 -c "
import errno, socket
try:
    socket.socket($1, $2, $3)
    print('ok')
except OSError as e:
    print(errno.errorcode[e.errno])"; }
GW=$(ip route | sed -n 's/default via \([^ ]*\).*/\1/p')
"#;

fn the_same_commands_say_the_same_as_with_runc(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    assert!(COMMANDS.len() >= 30);
    let prefix = subnet(lab, 140);
    let net = Network::create(lab, &["--ipv6", "--subnet", &format!("{prefix}.0/24"), "--subnet", "fd76:7a74:2::/64"]);
    let mut script = PRELUDE.to_owned();
    for (name, command) in COMMANDS {
        writeln!(script, "echo '== {name}'; {{ {command}; }} 2>&1").expect("write to a string");
    }
    let address = format!("{prefix}.50");
    let run = |runtime: &str| -> BTreeMap<String, String> {
        let name = lab.id("same");
        let args = [
            "run",
            "--rm",
            "--name",
            &name,
            "--runtime",
            runtime,
            "--net",
            net.name(),
            "--ip",
            &address,
            "--ip6",
            "fd76:7a74:2::50",
            "--mac-address",
            "02:42:ac:11:00:50",
            "--hostname",
            "same",
            "--dns",
            "192.0.2.53",
            "--dns-search",
            "a.test",
            "--add-host",
            "db:192.0.2.9",
            "--sysctl",
            "net.ipv4.tcp_fin_timeout=33",
            "--cap-add",
            "NET_ADMIN",
            "--cap-add",
            "NET_RAW",
            "--cap-add",
            "SYS_ADMIN",
            DEBIAN,
            "bash",
            "-c",
            &script,
        ];
        let said = lab.nerdctl(&args).deadline(180).run().text();
        let mut parts = BTreeMap::new();
        for part in said.split("== ").skip(1) {
            let (name, text) = part.split_once('\n').unwrap_or((part, ""));
            parts.insert(name.to_owned(), text.trim_end().to_owned());
        }
        parts
    };
    let (runc, vz) = (run("io.containerd.runc.v2"), run(lab.runtime()));
    drop(net);
    let mut wrong = String::new();
    for (name, _) in COMMANDS {
        let (with_runc, with_vz) = (runc.get(*name), vz.get(*name));
        let differs = with_runc != with_vz || with_runc.is_none();
        if differs && !DIFFERENT.iter().any(|(known, _)| known == name) {
            writeln!(wrong, "{name}:\n  runc: {with_runc:?}\n  vz:   {with_vz:?}").expect("write to a string");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    Ok(())
}
