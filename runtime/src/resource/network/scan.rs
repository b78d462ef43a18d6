// SPDX-License-Identifier: Apache-2.0
//! Reads what a pod's network namespace holds, as the guest is to have it.

use std::{collections::HashMap, net::IpAddr};

use bulkhead_agent_protocol::agent;
use futures_util::TryStreamExt;
use rtnetlink::{
    packet_core::Emitable,
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteNextHop, RouteProtocol,
            RouteScope, RouteType, RouteVia,
        },
        rule::{RuleAttribute, RuleFlags, RuleMessage},
        AddressFamily,
    },
    IpVersion, RouteMessageBuilder,
};

use super::{
    netlink::{failed, Netlink},
    NetworkError,
};

/// `IFF_NOARP`.
const NO_ARP: u32 = 1 << 7;

/// An interface to give to the guest.
#[derive(Debug)]
pub struct Link {
    /// Index in the namespace.
    pub index: u32,
    /// Name in the namespace, and in the guest.
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u32,
    /// The agent's part.
    pub guest: agent::Interface,
}

/// What the namespace holds.
#[derive(Debug, Default)]
pub struct Scan {
    /// Interfaces that can be given to the guest, by index.
    pub links: Vec<Link>,
    /// Their routes.
    pub routes: Vec<agent::Route>,
    /// Policy rules besides the kernel's own.
    pub rules: Vec<agent::Rule>,
    /// Their permanent neighbours.
    pub neighbours: Vec<agent::Neighbour>,
}

/// Reads links, addresses, routes and neighbours.
pub async fn scan(netlink: &Netlink) -> Result<Scan, NetworkError> {
    let mut links: Vec<Link> = netlink
        .links()
        .await?
        .iter()
        .filter_map(usable_link)
        .collect();
    links.sort_by_key(|link| link.index);
    if links.is_empty() {
        return Ok(Scan::default());
    }
    let mut addresses = netlink.handle.address().get().execute();
    while let Some(message) = addresses
        .try_next()
        .await
        .map_err(failed("addresses could not be listed"))?
    {
        let Some(link) = links.iter_mut().find(|l| l.index == message.header.index) else {
            continue;
        };
        // The guest makes its own link-local addresses from the same MAC.
        if message.header.scope == AddressScope::Link
            && message.header.family == AddressFamily::Inet6
        {
            continue;
        }
        // On a point-to-point link the address is the peer's and the local
        // one stands apart.
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let address = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        if let Some(ip) = local.or(address) {
            link.guest.addresses.push(agent::IpAddress {
                address: octets(ip),
                prefix_len: u32::from(message.header.prefix_len),
                ..Default::default()
            });
        }
    }
    let names: HashMap<u32, String> = links
        .iter()
        .map(|link| (link.index, link.name.clone()))
        .collect();
    let mut routes = Vec::new();
    for message in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let mut stream = netlink.handle.route().get(message).execute();
        while let Some(route) = stream
            .try_next()
            .await
            .map_err(failed("routes could not be listed"))?
        {
            routes.extend(guest_route(&route, &names));
        }
    }
    // A gateway must be reachable before a route can use it.
    routes.sort_by_key(|route| !route.gateway.is_empty() || !route.hops.is_empty());
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut stream = netlink.handle.rule().get(version).execute();
        while let Some(rule) = stream
            .try_next()
            .await
            .map_err(failed("policy rules could not be listed"))?
        {
            rules.extend(guest_rule(rule));
        }
    }
    let mut neighbours = Vec::new();
    let mut stream = netlink.handle.neighbours().get().execute();
    while let Some(message) = stream
        .try_next()
        .await
        .map_err(failed("neighbours could not be listed"))?
    {
        let Some(device) = names.get(&message.header.ifindex) else {
            continue;
        };
        if message.header.state != NeighbourState::Permanent {
            continue;
        }
        let mut neighbour = agent::Neighbour {
            device: device.clone(),
            state: u32::from(u16::from(message.header.state)),
            flags: u32::from(message.header.flags.bits()),
            ..Default::default()
        };
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    neighbour.address = ip.octets().to_vec();
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    neighbour.address = ip.octets().to_vec();
                }
                NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac = mac.clone(),
                _ => {}
            }
        }
        if !neighbour.address.is_empty() && !neighbour.mac.is_empty() {
            neighbours.push(neighbour);
        }
    }
    Ok(Scan {
        links,
        routes,
        rules,
        neighbours,
    })
}

/// A rule as the guest is to have it; none for those that every kernel has.
fn guest_rule(mut rule: RuleMessage) -> Option<agent::Rule> {
    let priority = rule
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
    let table = u32::from(rule.header.table);
    let own = [(0, 255), (32766, 254), (32767, 253)];
    if own.contains(&(priority.unwrap_or(0), table)) {
        return None;
    }
    // All else is state.
    rule.header.flags &= RuleFlags::Invert;
    let mut message = vec![0; rule.buffer_len()];
    rule.emit(&mut message);
    Some(agent::Rule {
        message,
        ..Default::default()
    })
}

/// A link that the guest can have: up, Ethernet, and made for pods. Tunnels,
/// taps and the loopback stay.
fn usable_link(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return None;
    }
    let mut name = None;
    let mut mac = None;
    let mut mtu = 1500;
    let mut kind = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let name = name?;
    match kind {
        Some(
            InfoKind::Veth
            | InfoKind::MacVlan
            | InfoKind::IpVlan
            | InfoKind::Vlan
            | InfoKind::Netkit,
        ) => {}
        other => {
            tracing::info!(interface = name, kind = ?other, "interface is not given to the guest");
            return None;
        }
    }
    let mac = mac?;
    Some(Link {
        index: message.header.index,
        guest: agent::Interface {
            mac: mac.to_vec(),
            name: name.clone(),
            mtu,
            raw_flags: flags.bits() & NO_ARP,
            ..Default::default()
        },
        name,
        mac,
        mtu,
    })
}

/// A route as the guest is to have it; none for what the guest's kernel makes
/// by itself from addresses, and for other interfaces' routes.
fn guest_route(message: &RouteMessage, names: &HashMap<u32, String>) -> Option<agent::Route> {
    let header = &message.header;
    // Of the others the kernel makes what a guest needs by itself.
    let kind = match header.kind {
        RouteType::Unicast => 0,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw => {
            u8::from(header.kind).into()
        }
        _ => return None,
    };
    if header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let mut route = agent::Route {
        scope: u32::from(u8::from(header.scope)),
        table: u32::from(header.table),
        // RTNH_F_ONLINK is the only flag that is configuration, not state.
        flags: header.flags.bits() & 4,
        ipv6: header.address_family == AddressFamily::Inet6,
        kind,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = Some(agent::IpAddress {
                    address: route_octets(address)?,
                    prefix_len: u32::from(header.destination_prefix_length),
                    ..Default::default()
                })
                .into();
            }
            RouteAttribute::Gateway(address) => route.gateway = route_octets(address)?,
            RouteAttribute::PrefSource(address) => route.source = route_octets(address)?,
            RouteAttribute::Via(via) => route.gateway = via_octets(via)?,
            // lo stands in those of IPv6 that lead nowhere.
            RouteAttribute::Oif(_) if kind != 0 => {}
            RouteAttribute::Oif(index) => route.device = names.get(index)?.clone(),
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().map(|hop| next_hop(hop, names));
                route.hops = hops.collect::<Option<_>>()?;
            }
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    let local = 255;
    let leads_nowhere = route.device.is_empty() && route.hops.is_empty();
    if leads_nowhere && kind == 0 || route.table == local {
        return None;
    }
    // A router's own link-local addresses and multicast come by themselves.
    if header.scope == RouteScope::Link && route.ipv6 {
        return None;
    }
    Some(route)
}

/// One of several ways; none for other interfaces.
fn next_hop(hop: &RouteNextHop, names: &HashMap<u32, String>) -> Option<agent::NextHop> {
    let mut gateway = Vec::new();
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => gateway = route_octets(address)?,
            RouteAttribute::Via(via) => gateway = via_octets(via)?,
            _ => {}
        }
    }
    Some(agent::NextHop {
        gateway,
        device: names.get(&hop.interface_index)?.clone(),
        weight: u32::from(hop.hops) + 1,
        flags: u32::from(hop.flags.bits()) & 4,
        ..Default::default()
    })
}

fn via_octets(via: &RouteVia) -> Option<Vec<u8>> {
    match via {
        RouteVia::Inet(ip) => Some(ip.octets().to_vec()),
        RouteVia::Inet6(ip) => Some(ip.octets().to_vec()),
        _ => None,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn route_octets(address: &RouteAddress) -> Option<Vec<u8>> {
    match address {
        RouteAddress::Inet(ip) => Some(ip.octets().to_vec()),
        RouteAddress::Inet6(ip) => Some(ip.octets().to_vec()),
        _ => None,
    }
}
