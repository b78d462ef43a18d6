// SPDX-License-Identifier: Apache-2.0
//! Against the kernel, in a network namespace of a thread each.

use super::*;

use std::process::Command;
use std::thread;

use nix::sched::{unshare, CloneFlags};

/// Runs `body` on a thread with a network namespace of its own, which the
/// programs that it starts have too; `false` from it fails the test.
fn in_namespace(body: impl FnOnce() -> Result<bool> + Send + 'static) {
    let outcome = thread::spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => Some(body()),
        Err(_) => None,
    })
    .join()
    .unwrap();
    match outcome {
        Some(outcome) => assert!(outcome.unwrap()),
        None => println!("SKIPPED: network namespaces are not allowed here"),
    }
}

/// What `ip` says; the tests' only other source of truth.
fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().expect("iproute2");
    assert!(output.status.success(), "ip {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x2a];

fn interface() -> agent::Interface {
    let address = |bytes: &[u8], prefix_len| agent::IpAddress {
        address: bytes.to_vec(),
        prefix_len,
        ..Default::default()
    };
    agent::Interface {
        mac: MAC.to_vec(),
        name: "eth0".into(),
        mtu: 1400,
        addresses: vec![
            address(&[10, 1, 2, 3], 24),
            address(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3], 64),
        ],
        ..Default::default()
    }
}

#[test]
fn loopback() {
    in_namespace(|| {
        Netlink::open()?.loopback_up()?;
        Ok(ip(&["-o", "addr", "show", "lo"]).contains("127.0.0.1/8"))
    });
}

#[test]
fn an_interface_with_addresses_routes_and_neighbours() {
    in_namespace(|| {
        ip(&[
            "link",
            "add",
            "v0",
            "address",
            "02:00:00:00:00:2a",
            "type",
            "veth",
            "peer",
            "name",
            "v1",
        ]);
        ip(&["link", "set", "v1", "up"]);
        let mut netlink = Netlink::open()?;
        netlink.set_interface(&interface())?;
        netlink.add_route(&agent::Route {
            gateway: vec![10, 1, 2, 1],
            device: "eth0".into(),
            metric: 7,
            mtu: 1300,
            ..Default::default()
        })?;
        netlink.add_route(&agent::Route {
            destination: Some(agent::IpAddress {
                address: vec![192, 168, 9, 0],
                prefix_len: 24,
                ..Default::default()
            })
            .into(),
            device: "eth0".into(),
            scope: 253,
            source: vec![10, 1, 2, 3],
            ..Default::default()
        })?;
        netlink.add_route(&agent::Route {
            gateway: vec![0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            device: "eth0".into(),
            ipv6: true,
            ..Default::default()
        })?;
        netlink.add_neighbour(&agent::Neighbour {
            address: vec![10, 1, 2, 1],
            device: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            state: 0x80,
            ..Default::default()
        })?;
        let link = ip(&["-o", "link", "show", "eth0"]);
        let addresses = ip(&["-o", "addr", "show", "eth0"]);
        let routes = ip(&["route"]);
        let routes6 = ip(&["-6", "route"]);
        let neighbours = ip(&["neigh"]);
        for (what, text, wanted) in [
            ("mtu", &link, "mtu 1400"),
            ("up", &link, ",UP"),
            ("IPv4", &addresses, "10.1.2.3/24 brd 10.1.2.255"),
            ("IPv6", &addresses, "fd00::3/64"),
            ("default", &routes, "default via 10.1.2.1 dev eth0"),
            ("metric", &routes, "metric 7 mtu 1300"),
            ("link route", &routes, "192.168.9.0/24 dev eth0"),
            ("source", &routes, "scope link src 10.1.2.3"),
            ("IPv6 default", &routes6, "default via fd00::1 dev eth0"),
            (
                "neighbour",
                &neighbours,
                "10.1.2.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT",
            ),
        ] {
            if !text.contains(wanted) {
                println!("{what}: {wanted:?} not in {text:?}");
                return Ok(false);
            }
        }
        // A tentative address would not be usable at once.
        let ours = addresses.lines().find(|line| line.contains("fd00::3"));
        Ok(ours.is_some_and(|line| !line.contains("tentative")))
    });
}

#[test]
fn routes_by_several_ways_and_policy_rules() {
    in_namespace(|| {
        for (name, peer, address) in [
            ("eth0", "v0", "02:00:00:00:00:2a"),
            ("eth1", "v1", "02:00:00:00:00:2b"),
        ] {
            ip(&[
                "link", "add", name, "address", address, "type", "veth", "peer", "name", peer,
            ]);
            ip(&["link", "set", name, "up"]);
        }
        ip(&["addr", "add", "10.1.2.3/24", "dev", "eth0"]);
        ip(&["addr", "add", "10.1.3.3/24", "dev", "eth1"]);
        let to = |third: u8| {
            Some(agent::IpAddress {
                address: vec![10, 9, third, 0],
                prefix_len: 24,
                ..Default::default()
            })
            .into()
        };
        let hop = |third: u8, device: &str, weight, flags| agent::NextHop {
            gateway: vec![10, 1, third, 1],
            device: device.into(),
            weight,
            flags,
            ..Default::default()
        };
        let mut netlink = Netlink::open()?;
        netlink.add_route(&agent::Route {
            destination: to(1),
            // The second is reached without a route to it.
            hops: vec![hop(2, "eth0", 1, 0), hop(99, "eth1", 7, 4)],
            metric: 5,
            ..Default::default()
        })?;
        netlink.add_route(&agent::Route {
            destination: to(2),
            kind: 8,
            table: 1000,
            ..Default::default()
        })?;
        netlink.add_route(&agent::Route {
            destination: to(3),
            gateway: [&[0xfe, 0x80][..], &[0; 13], &[1]].concat(),
            device: "eth0".into(),
            ..Default::default()
        })?;
        // from 10.1.3.0/24 iif eth1 lookup 1000, priority 100.
        let mut rule = Builder::bare();
        rule.attribute(2, &[10, 1, 3, 0])
            .attribute(3, b"eth1\0")
            .attribute(6, &100u32.to_ne_bytes())
            .attribute(15, &1000u32.to_ne_bytes());
        let fixed = [IPV4, 0, 24, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        let rule = agent::Rule {
            message: [&fixed[..], &rule.attributes_only()].concat(),
            ..Default::default()
        };
        netlink.add_rule(&rule)?;
        // Once is enough.
        netlink.add_rule(&rule)?;
        let routes = ip(&["route", "show", "table", "all"]);
        let rules = ip(&["rule"]);
        for (what, text, wanted) in [
            ("several ways", &routes, "10.9.1.0/24 proto static metric 5"),
            (
                "first way",
                &routes,
                "nexthop via 10.1.2.1 dev eth0 weight 1",
            ),
            (
                "second way",
                &routes,
                "nexthop via 10.1.99.1 dev eth1 weight 7 onlink",
            ),
            ("nowhere", &routes, "prohibit 10.9.2.0/24 table 1000"),
            (
                "other family",
                &routes,
                "10.9.3.0/24 via inet6 fe80::1 dev eth0",
            ),
            (
                "rule",
                &rules,
                "100:\tfrom 10.1.3.0/24 iif eth1 lookup 1000",
            ),
        ] {
            if !text.contains(wanted) {
                println!("{what}: {wanted:?} not in {text:?}");
                return Ok(false);
            }
        }
        Ok(rules.matches("1000").count() == 1)
    });
}

#[test]
fn errors_are_the_requests_or_the_kernels() {
    in_namespace(|| {
        let mut netlink = Netlink::open()?;
        let unknown = netlink.set_interface(&interface());
        let no_gateway = netlink.add_route(&agent::Route {
            gateway: vec![10, 1, 2, 1],
            ..Default::default()
        });
        let mixed = netlink.add_route(&agent::Route {
            gateway: vec![10, 1, 2, 1],
            ipv6: true,
            ..Default::default()
        });
        for bad in [&[][..], &[0; 11], &[99; 12]] {
            let rule = agent::Rule {
                message: bad.into(),
                ..Default::default()
            };
            assert!(matches!(
                netlink.add_rule(&rule),
                Err(AgentError::Invalid(_))
            ));
        }
        Ok(matches!(unknown, Err(AgentError::Invalid(_)))
            && matches!(
                no_gateway,
                Err(AgentError::Step {
                    errno: Errno::ENETUNREACH,
                    ..
                })
            )
            && matches!(mixed, Err(AgentError::Invalid(_))))
    });
}
