// SPDX-License-Identifier: Apache-2.0
//! Attaches a real veth in a real network namespace.

use std::{path::PathBuf, process::Command};

use super::*;

fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command}: {} {said}",
        output.status
    );
}

fn output(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub struct Namespace {
    name: String,
}

impl Namespace {
    pub fn new(test: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: {test}: needs root");
            return None;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            println!("SKIPPED: {test}: needs iproute2");
            return None;
        }
        let name = format!("bh-{test}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        Some(Self { name })
    }

    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/var/run/netns/{}", self.name))
    }

    pub fn ip(&self, args: &str) {
        run(&format!("ip -n {} {args}", self.name));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("bulkhead-net-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
fn a_veth_is_attached_and_given_back() {
    let Some(namespace) = Namespace::new("attach") else {
        return;
    };
    // As a pod has it: the other end lies elsewhere.
    let Some(outside) = Namespace::new("attachpeer") else {
        return;
    };
    namespace.ip(&format!(
        "link add eth0 type veth peer name peer0 netns {}",
        outside.name
    ));
    namespace.ip("link set eth0 address 02:00:00:00:00:11 mtu 1400");
    namespace.ip("addr add 10.11.0.2/24 dev eth0");
    namespace.ip("-6 addr add fd00:11::2/64 dev eth0 nodad");
    outside.ip("link set peer0 up");
    namespace.ip("link set eth0 up");
    namespace.ip("route add default via 10.11.0.1 dev eth0");
    namespace.ip("-6 route add default via fd00:11::1 dev eth0");
    namespace.ip("route add 10.99.0.0/16 dev eth0 scope link");
    namespace.ip("neigh add 10.11.0.7 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");

    let dir = scratch("attach");
    let journal = Journal::create(&dir).unwrap();
    let network = attach(&namespace.path(), &journal).unwrap();

    assert_eq!(network.nics.len(), 1);
    let nic = &network.nics[0];
    assert_eq!(nic.mac, [2, 0, 0, 0, 0, 0x11]);
    assert_eq!(nic.mtu, 1400);
    assert_eq!(network.guest.interfaces[0].name, "eth0");
    let addresses: Vec<_> = network.guest.interfaces[0]
        .addresses
        .iter()
        .map(|a| (a.address.len(), a.prefix_len))
        .collect();
    assert_eq!(addresses, [(4, 24), (16, 64)]);
    // Link route first, then the two default routes.
    assert_eq!(network.guest.routes[0].destination.prefix_len, 16);
    let gateways: Vec<_> = network.guest.routes[1..]
        .iter()
        .map(|r| (r.ipv6, r.gateway.len(), r.destination.is_none()))
        .collect();
    assert_eq!(gateways, [(false, 4, true), (true, 16, true)]);
    assert_eq!(network.guest.neighbours.len(), 1);
    assert_eq!(network.guest.neighbours[0].address, [10, 11, 0, 7]);

    let filters = output(&format!(
        "tc -n {} filter show dev eth0 ingress",
        namespace.name
    ));
    assert!(filters.contains("bhtap0"), "{filters}");
    let filters = output(&format!(
        "tc -n {} filter show dev bhtap0 ingress",
        namespace.name
    ));
    assert!(filters.contains("eth0"), "{filters}");

    drop(network);
    Journal::release_all(&dir).unwrap();
    let links = output(&format!("ip -n {} link", namespace.name));
    assert!(!links.contains("bhtap0"), "{links}");
    let qdiscs = output(&format!("tc -n {} qdisc show dev eth0", namespace.name));
    assert!(!qdiscs.contains("ingress"), "{qdiscs}");
    Journal::release_all(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn every_kind_of_route_and_rule_is_read() {
    let Some(namespace) = Namespace::new("routes") else {
        return;
    };
    namespace.ip("link add eth0 type veth peer name peer0");
    namespace.ip("link add eth1 type veth peer name peer1");
    for (device, net) in [("eth0", 21), ("eth1", 22)] {
        namespace.ip(&format!("addr add 10.{net}.0.2/24 dev {device}"));
        namespace.ip(&format!("-6 addr add fd00:{net}::2/64 dev {device} nodad"));
        namespace.ip(&format!("link set {device} up"));
    }
    for route in [
        "10.30.0.0/16 nexthop via 10.21.0.1 dev eth0 weight 3 nexthop via 10.22.0.1 dev eth1",
        "10.31.0.0/16 via 192.0.2.1 dev eth0 onlink metric 77",
        "10.32.0.0/16 via 10.22.0.1 dev eth1 table 1000",
        "10.33.0.0/16 via inet6 fd00:21::1 dev eth0",
        "blackhole 10.34.0.0/16",
    ] {
        namespace.ip(&format!("route add {route}"));
    }
    namespace.ip("-6 route add unreachable fd00:34::/64 table 1000");
    namespace.ip(
        "-6 route add fd00:30::/64 nexthop via fd00:21::1 dev eth0 nexthop via fd00:22::1 dev eth1",
    );
    namespace.ip("rule add pref 100 from 10.22.0.0/24 iif eth1 fwmark 0x10/0xff lookup 1000");
    namespace.ip("-6 rule add pref 101 not to fd00:35::/64 prohibit");

    let scan = within(&namespace.path(), |netlink| async move {
        scan::scan(&netlink).await
    })
    .unwrap();
    let find = |third: &[u8]| {
        let mut found = scan.routes.iter();
        let to = |route: &&agent::Route| route.destination.address.starts_with(third);
        found.find(to).unwrap()
    };
    let many = find(&[10, 30]);
    let hops: Vec<_> = many
        .hops
        .iter()
        .map(|hop| (hop.gateway.clone(), hop.device.as_str(), hop.weight))
        .collect();
    assert_eq!(
        hops,
        [
            (vec![10, 21, 0, 1], "eth0", 3),
            (vec![10, 22, 0, 1], "eth1", 1)
        ]
    );
    assert_eq!((find(&[10, 31]).flags, find(&[10, 31]).metric), (4, 77));
    assert_eq!(find(&[10, 32]).table, 1000);
    assert_eq!(find(&[10, 33]).gateway.len(), 16);
    assert_eq!(
        (find(&[10, 34]).kind, find(&[10, 34]).device.as_str()),
        (6, "")
    );
    assert_eq!(find(&[0xfd, 0, 0, 0x34]).kind, 7);
    assert_eq!(find(&[0xfd, 0, 0, 0x30]).hops.len(), 2);
    assert_eq!(scan.rules.len(), 2);
    // Families of the two; what is in them is the agent's tests' to show.
    assert_eq!(
        scan.rules
            .iter()
            .map(|rule| rule.message[0])
            .collect::<Vec<_>>(),
        [libc::AF_INET as u8, libc::AF_INET6 as u8]
    );
}

#[test]
fn packets_pass_between_the_interface_and_the_tap() {
    use std::{
        io::{Read, Write},
        net::UdpSocket,
        time::{Duration, Instant},
    };
    let Some(namespace) = Namespace::new("packets") else {
        return;
    };
    // The peer lives in a second namespace, so that nothing is local.
    let Some(outside) = Namespace::new("outside") else {
        return;
    };
    namespace.ip(&format!(
        "link add eth0 type veth peer name peer0 netns {}",
        outside.name
    ));
    namespace.ip("addr add 10.12.0.2/24 dev eth0");
    namespace.ip("link set eth0 up");
    outside.ip("addr add 10.12.0.1/24 dev peer0");
    outside.ip("link set peer0 up");
    outside.ip("neigh add 10.12.0.2 lladdr 02:00:00:00:00:99 dev peer0 nud permanent");

    let dir = scratch("packets");
    let journal = Journal::create(&dir).unwrap();
    let mut network = attach(&namespace.path(), &journal).unwrap();
    let mut tap = File::from(network.nics.remove(0).tap);

    // From outside to the tap: the guest would receive it.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            setns(
                File::open(outside.path()).unwrap(),
                CloneFlags::CLONE_NEWNET,
            )
            .unwrap();
            let socket = UdpSocket::bind("10.12.0.1:0").unwrap();
            socket.send_to(b"to the guest", "10.12.0.2:9").unwrap();
        });
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut frame = [0_u8; 2048];
    let found = loop {
        match tap.read(&mut frame) {
            Ok(length) if frame[..length].windows(12).any(|w| w == b"to the guest") => break true,
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        if Instant::now() > deadline {
            break false;
        }
    };
    assert!(found, "the packet did not reach the tap");

    // And back: a frame written to the tap leaves by the interface.
    let rx = |text: &str| -> u64 {
        text.lines()
            .find_map(|line| line.trim().strip_prefix("peer0:").map(str::to_owned))
            .and_then(|line| line.split_whitespace().nth(1).unwrap().parse().ok())
            .unwrap()
    };
    let show = || output(&format!("ip netns exec {} cat /proc/net/dev", outside.name));
    let start = rx(&show());
    let mut out = vec![0_u8; 10];
    out.extend([0xff; 6]);
    out.extend([2, 0, 0, 0, 0, 0x99]);
    out.extend([0x08, 0x06]);
    out.extend([0; 46]);
    assert_eq!(tap.write(&out).unwrap(), out.len());
    let deadline = Instant::now() + Duration::from_secs(5);
    while rx(&show()) == start {
        assert!(Instant::now() < deadline, "the frame did not leave");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(tap);
    Journal::release_all(&dir).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_namespace_without_interfaces_gives_nothing() {
    let Some(namespace) = Namespace::new("empty") else {
        return;
    };
    let dir = scratch("empty");
    let journal = Journal::create(&dir).unwrap();
    let network = attach(&namespace.path(), &journal).unwrap();
    assert!(network.nics.is_empty());
    assert!(network.guest.routes.is_empty());
    assert!(Journal::entries(&dir).unwrap().is_empty());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn the_hosts_own_namespace_is_refused() {
    let dir = scratch("own");
    let journal = Journal::create(&dir).unwrap();
    let error = attach(Path::new("/proc/self/ns/net"), &journal).unwrap_err();
    assert!(matches!(error, NetworkError::HostNetwork { .. }));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn releasing_in_a_namespace_that_is_gone_is_success() {
    let gone = Path::new("/var/run/netns/bulkhead-never-was");
    remove_tap(gone, "bhtap0").unwrap();
    remove_redirect(gone, "eth0").unwrap();
}

#[test]
fn what_has_come_to_a_namespaces_path_since_is_left_alone() {
    let Some(namespace) = Namespace::new("since") else {
        return;
    };
    namespace.ip("link add bhtap0 type veth peer name bhpeer0");
    let there = || output(&format!("ip -n {} link", namespace.name)).contains("bhtap0");
    let tap = |id| Resource::Tap {
        netns: namespace.path(),
        namespace: id,
        name: "bhtap0".into(),
    };
    let other = NamespaceId::of(Path::new("/"));
    assert!(other.is_some());
    tap(other).release().unwrap();
    assert!(there(), "it belongs to somebody else");
    tap(NamespaceId::of(&namespace.path())).release().unwrap();
    assert!(!there());
}
