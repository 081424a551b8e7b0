//! Networks as runc's users have them: CNI, nerdctl's networks, names and ports. Packets are real; nothing is left
//! behind.

use std::{fs, path::Path, time::Duration};

use vz_suite::{
    Lab, Skip, Verdict,
    command::Program,
    container::Container,
    lab::{BUSYBOX, DEBIAN, NGINX},
    poll::until,
    tests,
};

tests![
    without_networks_there_is_lo_and_it_is_up,
    the_default_network_carries_both_ways_and_names_resolve,
    ports_are_published,
    ctr_connects_by_cni,
    a_container_can_be_on_two_networks,
    addresses_names_and_servers_are_as_asked_for,
    ipv6_works,
    a_restarted_container_is_connected_again,
    network_administration_works_in_the_guest,
    localhost_of_the_guest_is_reached_from_the_hosts_side,
    late_links_reach_the_guest,
    names_follow_what_their_owner_writes,
    services_of_compose_find_each_other,
    counters_of_the_link_are_the_containers,
];

/// A network of nerdctl's; removed when dropped.
pub struct Network<'l>(&'l Lab, String);

impl<'l> Network<'l> {
    /// `nerdctl network create`.
    #[track_caller]
    pub fn create(lab: &'l Lab, flags: &[&str]) -> Self {
        let name = lab.id("net");
        lab.nerdctl(&["network", "create"]).args(flags).args([&name]).run().ok();
        Self(lab, name)
    }
}

impl Network<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.1
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        drop(self.0.nerdctl(&["network", "rm", &self.1]).start().wait_at_most(Duration::from_secs(30)));
    }
}

/// What a web server of the host's says, once it answers.
#[track_caller]
fn fetch(url: &str) -> String {
    until(url, Duration::from_secs(30), || {
        let output = Program::new("curl").args(["-sSg", "-m", "5", url]).run();
        (output.code() == 0).then(|| output.text())
    })
}

/// Subnets that no other test run uses: part of the devbox's own range.
pub fn subnet(lab: &Lab, number: u8) -> String {
    let identity = fs::read_to_string(lab.devbox().join("identity")).expect("the devbox has an identity");
    let net = identity.lines().find_map(|line| line.strip_prefix("net=")).expect("the devbox has a range").to_owned();
    format!("{net}.{number}")
}

fn without_networks_there_is_lo_and_it_is_up(lab: &Lab) -> Verdict {
    let script =
        "cat /sys/class/net/lo/operstate; ls /sys/class/net; ping -c 1 -w 5 127.0.0.1 >/dev/null && echo answers";
    let wanted = "unknown\nlo\nanswers";
    assert_eq!(lab.nerdctl_run(&["--rm", BUSYBOX, "sh", "-c", script]).run().ok(), wanted);
    assert_eq!(lab.ctr_run(&["--rm", BUSYBOX, &lab.id("lo"), "sh", "-c", script]).run().ok(), wanted);
    Ok(())
}

fn the_default_network_carries_both_ways_and_names_resolve(lab: &Lab) -> Verdict {
    let server = Container::connected(lab, "server", &[NGINX]);
    let client = Container::connected(lab, "client", &[BUSYBOX, "sleep", "1000"]);
    let address = server.address();
    // From the host, and to the host.
    assert!(fetch(&format!("http://{address}/")).contains("hello from nginx"));
    let gateway = client.sh("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'");
    client.sh(&format!("ping -c 2 -w 10 {gateway}"));
    let page = lab.dir();
    fs::write(page.path().join("page"), "from the host\n").expect("write a file");
    let script = "import http.server as h, sys\ns = h.HTTPServer((sys.argv[1], 0), h.SimpleHTTPRequestHandler)\n\
                  print(s.server_port, flush=True)\ns.serve_forever()";
    let http = Program::new("python3").args(["-c", script, &gateway]).dir(page.path()).start();
    http.expect("\n");
    let port = http.stdout().trim().to_owned();
    assert_eq!(client.sh(&format!("wget -qO- http://{gateway}:{port}/page")), "from the host");
    // From container to container, by address and by name.
    for name in [&address, &server.name] {
        assert!(client.sh(&format!("wget -qO- http://{name}/")).contains("hello from nginx"), "{name}");
        client.sh(&format!("ping -c 2 -w 10 {name}"));
    }
    Ok(())
}

fn ports_are_published(lab: &Lab) -> Verdict {
    let server = Container::connected(lab, "server", &["-p", "127.0.0.1:18080:80", NGINX]);
    assert!(fetch("http://127.0.0.1:18080/").contains("hello from nginx"));
    let echo = Container::connected(lab, "echo", &["-p", "18081:80/udp", DEBIAN, "python3", "-c", UDP_ECHO]);
    let gateway = echo.sh("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'");
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind a socket");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("set a timeout");
    until("an answer by UDP", Duration::from_secs(30), || {
        socket.send_to(b"ping", (gateway.as_str(), 18081)).expect("send a packet");
        let mut answer = [0; 16];
        socket.recv(&mut answer).is_ok_and(|length| answer[..length] == *b"gnip").then_some(())
    });
    drop(server);
    Ok(())
}

/// Answers each packet with its bytes in reverse.
const UDP_ECHO: &str = "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 80))
while True:
    data, peer = s.recvfrom(2000)
    s.sendto(data[::-1], peer)
";

/// Where ctr looks for CNI's configuration and plugins, which no flag of it changes.
struct HostCni;

impl HostCni {
    fn install(lab: &Lab) -> Result<Self, Skip> {
        if Path::new("/etc/cni/net.d").exists() || Path::new("/opt/cni/bin").exists() {
            return Err(Skip("this host has a CNI configuration of its own".into()));
        }
        fs::create_dir_all("/etc/cni/net.d").and_then(|()| fs::create_dir_all("/opt/cni")).expect("make directories");
        let config = lab.devbox().join("cni/pods/10-vz-devbox.conflist");
        fs::copy(config, "/etc/cni/net.d/10-vzt.conflist").expect("copy the configuration");
        let plugins =
            lab.env().iter().rev().find(|(name, _)| name == "PATH").and_then(|(_, path)| path.split(':').next());
        std::os::unix::fs::symlink(plugins.expect("a search path"), "/opt/cni/bin").expect("link the plugins");
        Ok(Self)
    }
}

impl Drop for HostCni {
    fn drop(&mut self) {
        drop(fs::remove_file("/opt/cni/bin"));
        drop(fs::remove_dir("/opt/cni"));
        drop(fs::remove_dir_all("/etc/cni"));
    }
}

fn ctr_connects_by_cni(lab: &Lab) -> Verdict {
    let _cni = HostCni::install(lab)?;
    let script = "gateway=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'); ip -4 -o addr show eth0; \
                  ping -c 2 -w 10 $gateway >/dev/null && echo answers";
    let id = lab.id("cni");
    let said = lab.ctr_run(&["--rm", "--cni", BUSYBOX, &id, "sh", "-c", script]).run().ok();
    assert!(said.contains(&format!("inet {}", subnet(lab, 0))) && said.ends_with("answers"), "{said}");
    drop_masquerading(&id);
    Ok(())
}

/// Takes away what `ctr run --cni` leaves, with runc too: it names no namespace when it has its plugins take the
/// network down, and without one they do not look for the container's masquerading.
fn drop_masquerading(id: &str) {
    let script = r#"
        iptables -t nat -S | grep -F "default-$1\\\"" | sed 's/^-A/-D/' | while IFS= read -r rule; do
            eval "iptables -t nat $rule"; echo "$rule"
        done | sed -n 's/^-D \(CNI-[0-9a-f]*\) .*/\1/p' | sort -u | while read -r chain; do
            iptables -t nat -F "$chain"; iptables -t nat -X "$chain"
        done"#;
    Program::new("bash").args(["-c", script, "bash", id]).run().ok();
}

fn a_container_can_be_on_two_networks(lab: &Lab) -> Verdict {
    let (first, second) = (subnet(lab, 130), subnet(lab, 131));
    let one = Network::create(lab, &["--subnet", &format!("{first}.0/24")]);
    let two = Network::create(lab, &["--subnet", &format!("{second}.0/24")]);
    let both = Container::connected(lab, "both", &["--net", &one.1, "--net", &two.1, BUSYBOX, "sleep", "1000"]);
    let links = both.sh("ip -4 -o addr | awk '$2 != \"lo\" { print $2, $4 }' | sort");
    let links: Vec<_> = links.lines().collect();
    assert!(links.len() == 2 && links[0].starts_with("eth0 ") && links[1].starts_with("eth1 "), "{links:?}");
    for prefix in [&first, &second] {
        assert!(links.iter().any(|link| link.contains(&format!(" {prefix}."))), "{links:?}");
        both.sh(&format!("ping -c 2 -w 10 {prefix}.1"));
    }
    drop(both);
    Ok(())
}

fn addresses_names_and_servers_are_as_asked_for(lab: &Lab) -> Verdict {
    let prefix = subnet(lab, 132);
    let net = Network::create(lab, &["--subnet", &format!("{prefix}.0/24")]);
    let address = format!("{prefix}.77");
    let args = [
        "--net",
        &net.1,
        "--ip",
        &address,
        "--stop-timeout",
        "1",
        "--mac-address",
        "02:42:ac:11:00:4d",
        "--dns",
        "192.0.2.53",
        "--dns-search",
        "a.test",
        "--dns-search",
        "b.test",
        "--dns-option",
        "ndots:2",
        "--dns-option",
        "timeout:3",
        "--add-host",
        "db:192.0.2.9",
        "--hostname",
        "asked",
        BUSYBOX,
        "sleep",
        "1000",
    ];
    let container = Container::connected(lab, "asked", &args);
    assert_eq!(container.sh("hostname; cat /etc/hostname"), "asked\nasked");
    assert_eq!(container.sh("cat /sys/class/net/eth0/address"), "02:42:ac:11:00:4d");
    assert!(container.sh("ip -4 -o addr show eth0").contains(&format!("inet {address}/24")));
    let resolv = container.sh("cat /etc/resolv.conf");
    for line in ["nameserver 192.0.2.53", "search a.test b.test", "options ndots:2 timeout:3"] {
        assert!(resolv.lines().any(|found| found == line), "{line}: {resolv}");
    }
    let hosts = container.sh("cat /etc/hosts");
    assert!(hosts.lines().any(|line| line.split_whitespace().eq(["192.0.2.9", "db"])), "{hosts}");
    drop(container);
    Ok(())
}

fn ipv6_works(lab: &Lab) -> Verdict {
    let prefix = subnet(lab, 133);
    let net = Network::create(lab, &["--ipv6", "--subnet", &format!("{prefix}.0/24"), "--subnet", "fd76:7a74:1::/64"]);
    let server = Container::connected(lab, "six", &["--net", &net.1, DEBIAN, "python3", "-c", HTTP6]);
    let client = Container::connected(lab, "client", &["--net", &net.1, BUSYBOX, "sleep", "1000"]);
    let address = server.inspect(".NetworkSettings.GlobalIPv6Address");
    assert!(address.starts_with("fd76:7a74:1:"), "{address}");
    // Nothing is tentative: the first packet can go out at once.
    assert_eq!(server.sh("ip -6 addr show tentative"), "");
    assert_eq!(fetch(&format!("http://[{address}]:8000/")), "six");
    assert_eq!(client.sh(&format!("wget -qO- 'http://[{address}]:8000/'")), "six");
    client.sh(&format!("ping -6 -c 2 -w 10 {address}"));
    client.sh("ping -6 -c 2 -w 10 fd76:7a74:1::1");
    drop((server, client));
    Ok(())
}

const HTTP6: &str = "
import http.server, socket
class Server(http.server.HTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'six')
Server(('::', 8000), Handler).serve_forever()
";

fn a_restarted_container_is_connected_again(lab: &Lab) -> Verdict {
    let prefix = subnet(lab, 134);
    let net = Network::create(lab, &["--subnet", &format!("{prefix}.0/24")]);
    let fixed = Container::connected(
        lab,
        "fixed",
        &[
            "--net",
            &net.1,
            "--ip",
            &format!("{prefix}.9"),
            "--stop-timeout",
            "1",
            "--mac-address",
            "02:42:ac:11:00:4e",
            BUSYBOX,
            "sleep",
            "1000",
        ],
    );
    let any = Container::connected(lab, "any", &["--net", &net.1, "--stop-timeout", "1", BUSYBOX, "sleep", "1000"]);
    for action in ["stop", "start", "restart", "kill", "start"] {
        fixed.nerdctl(action).ok();
    }
    assert_eq!(fixed.sh("cat /sys/class/net/eth0/address"), "02:42:ac:11:00:4e");
    assert_eq!(fixed.address(), format!("{prefix}.9"));
    any.nerdctl("restart").ok();
    let address = any.address();
    assert!(any.sh("ip -4 -o addr show eth0").contains(&format!("inet {address}/24")));
    fixed.sh(&format!("ping -c 2 -w 10 {address} && ping -c 2 -w 10 {}", any.name));
    drop((fixed, any));
    Ok(())
}

fn network_administration_works_in_the_guest(lab: &Lab) -> Verdict {
    let args = ["--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW", DEBIAN, "sleep", "1000"];
    let container = Container::connected(lab, "admin", &args);
    container.sh(
        "ip link add v0 type veth peer name v1; ip link add br0 type bridge; ip link set v0 master br0; \
         ip addr add 10.254.0.1/24 dev br0; ip link set br0 up; ip link set v0 up; ip link set v1 up; \
         ip rule add from 10.254.0.0/24 table 100; ip route add default dev br0 table 100; \
         ip route show table 100 | grep -q br0; ip rule | grep -q 10.254; ip link set eth0 mtu 1300; ip addr add 10.253.0.1/32 dev eth0",
    );
    assert_eq!(container.sh("cat /sys/class/net/eth0/mtu"), "1300");
    Ok(())
}

fn localhost_of_the_guest_is_reached_from_the_hosts_side(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let script = "
import socket, threading
def serve(family, address):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.bind((address, 7000))
    s.listen()
    while True:
        c, _ = s.accept()
        data = b''
        while chunk := c.recv(65536):
            data += chunk
        c.sendall(address.encode() + b' %d' % len(data))
        c.close()
threading.Thread(target=serve, args=(socket.AF_INET6, '::1')).start()
serve(socket.AF_INET, '127.0.0.1')
";
    let container = Container::connected(lab, "local", &[DEBIAN, "python3", "-c", script]);
    let client = "
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
s.sendall(b'x' * int(sys.argv[3]))
s.shutdown(socket.SHUT_WR)
print(s.makefile().read())
";
    let dial = |address: &str, port: &str, bytes: &str| {
        container.beside(&["python3", "-c", client, address, port, bytes]).run()
    };
    until("the guest to listen", Duration::from_secs(30), || {
        (dial("127.0.0.1", "7000", "1").code() == 0).then_some(())
    });
    assert_eq!(dial("127.0.0.1", "7000", "3000000").ok(), "127.0.0.1 3000000");
    assert_eq!(dial("::1", "7000", "10").ok(), "::1 10");
    // Where nobody listens, there is no connection.
    dial("127.0.0.1", "7001", "10").fails();
    // Nothing listens on the host's own localhost.
    assert_ne!(Program::new("curl").args(["-s", "-m", "2", "http://127.0.0.1:7000/"]).run().code(), 0);
    Ok(())
}

fn late_links_reach_the_guest(lab: &Lab) -> Verdict {
    lab.vz_only()?;
    let id = lab.id("late");
    lab.ctr_run(&["-d", BUSYBOX, &id, "sleep", "1000"]).run().ok();
    let list = lab.ctr(&["task", "ls"]).run().ok();
    let pid = list.lines().find(|line| line.starts_with(&id)).and_then(|line| line.split_whitespace().nth(1));
    let pid = pid.expect("the task has a pid").to_owned();
    let beside = |script: &str| Program::new("nsenter").args(["-t", &pid, "-n", "sh", "-ec", script]).run().ok();
    let inside =
        |script: &str| lab.ctr(&["task", "exec", "--exec-id", &lab.id("exec"), &id, "sh", "-c", script]).run().text();
    beside("ip link add late0 type veth peer name far; ip addr add 192.0.2.1/24 dev late0; ip link set late0 up");
    until("the link in the guest", Duration::from_secs(10), || {
        inside("ip addr").contains("inet 192.0.2.1/24").then_some(())
    });
    beside("ip addr add 192.0.2.2/24 dev late0; ip route add 198.51.100.0/24 via 192.0.2.200");
    until("the route in the guest", Duration::from_secs(10), || {
        inside("ip route").contains("198.51.100.0/24 via 192.0.2.200").then_some(())
    });
    // A second one has no card; the first one's is free once it has gone.
    beside("ip link add more0 type veth peer name far2; ip link del late0");
    until("the link to be gone", Duration::from_secs(10), || (!inside("ip addr").contains("late0")).then_some(()));
    beside("ip link set more0 up");
    until("the other link", Duration::from_secs(10), || inside("ip addr").contains("more0").then_some(()));
    lab.ctr(&["task", "rm", "-f", &id]).run().ok();
    lab.ctr(&["containers", "rm", &id]).run().ok();
    Ok(())
}

fn names_follow_what_their_owner_writes(lab: &Lab) -> Verdict {
    let container = Container::connected(lab, "names", &[BUSYBOX, "sleep", "1000"]);
    let paths = container.inspect("json .HostsPath");
    let hosts = paths.trim_matches('"').to_owned();
    let shows = |text: &str| {
        until(text, Duration::from_secs(10), || container.sh("cat /etc/hosts").contains(text).then_some(()));
    };
    let own = fs::read_to_string(&hosts).expect("read the hosts file");
    fs::write(&hosts, format!("{own}192.0.2.1 in-place\n")).expect("write in place");
    shows("192.0.2.1 in-place");
    if lab.is_vz() {
        // With runc the container keeps the file that is not there any more.
        let next = format!("{hosts}.next");
        fs::write(&next, format!("{own}192.0.2.2 moved\n"))
            .and_then(|()| fs::rename(&next, &hosts))
            .expect("replace the file");
        shows("192.0.2.2 moved");
        fs::write(&hosts, format!("{own}192.0.2.3 again\n")).expect("write in place");
        shows("192.0.2.3 again");
    }
    Ok(())
}

fn services_of_compose_find_each_other(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let project = lab.id("compose");
    let file = dir.path().join("compose.yaml");
    let text = format!(
        "services:\n  web:\n    image: {NGINX}\n    runtime: {runtime}\n  client:\n    image: {BUSYBOX}\n    runtime: {runtime}\n    \
         command: sleep 1000\n    depends_on: [web]\nnetworks:\n  default:\n    ipam:\n      config:\n        - subnet: {}.0/24\n",
        subnet(lab, 135),
        runtime = lab.runtime(),
    );
    fs::write(&file, text).expect("write a file");
    let compose = |args: &[&str]| {
        lab.nerdctl(&["compose", "-p", &project, "-f", &file.display().to_string()]).args(args).deadline(120).run()
    };
    let up = compose(&["up", "-d"]);
    let said = compose(&["exec", "-T", "client", "wget", "-qO-", "http://web/"]);
    let again = compose(&["restart"]);
    let then = compose(&["exec", "-T", "client", "wget", "-qO-", "http://web/"]);
    compose(&["down"]).ok();
    up.ok();
    assert!(said.ok().contains("hello from nginx"));
    again.ok();
    assert!(then.ok().contains("hello from nginx"));
    Ok(())
}

fn counters_of_the_link_are_the_containers(lab: &Lab) -> Verdict {
    let container = Container::connected(lab, "counters", &[BUSYBOX, "sleep", "1000"]);
    let gateway = container.sh("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'");
    let count = |direction: &str| -> u64 {
        let said = container.beside(&["ip", "-s", "-j", "link", "show", "eth0"]).run().ok();
        let said: serde_json::Value = serde_json::from_str(&said).expect("ip prints JSON");
        said[0]["stats64"][direction]["packets"].as_u64().expect("a number")
    };
    let (received, sent) = (count("rx"), count("tx"));
    container.sh(&format!("ping -c 20 -i 0.05 -w 20 {gateway} >/dev/null"));
    let (received, sent) = (count("rx") - received, count("tx") - sent);
    assert!((20..60).contains(&received) && (20..60).contains(&sent), "received {received}, sent {sent}");
    // What nerdctl makes of it: two numbers that are not zero.
    let stats = lab.nerdctl(&["stats", "--no-stream", "--format", "{{.NetIO}}", &container.name]).run().ok();
    assert!(stats.contains(" / ") && !stats.contains("0B"), "{stats}");
    Ok(())
}
