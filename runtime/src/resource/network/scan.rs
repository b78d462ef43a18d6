// SPDX-License-Identifier: Apache-2.0
//! Reads what a pod's network namespace holds, as the guest is to have it.

use std::{collections::HashMap, net::IpAddr};

use bulkhead_agent_protocol::agent;
use futures_util::TryStreamExt;
use rtnetlink::{
    packet_route::{
        address::{AddressAttribute, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
            RouteScope, RouteType,
        },
        AddressFamily,
    },
    RouteMessageBuilder,
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
    routes.sort_by_key(|route| !route.gateway.is_empty());
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
        neighbours,
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
    if header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let mut route = agent::Route {
        scope: u32::from(u8::from(header.scope)),
        table: u32::from(header.table),
        // RTNH_F_ONLINK is the only flag that is configuration, not state.
        flags: header.flags.bits() & 4,
        ipv6: header.address_family == AddressFamily::Inet6,
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
            RouteAttribute::Oif(index) => route.device = names.get(index)?.clone(),
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
    let main = u32::from(RouteHeader::RT_TABLE_MAIN);
    if route.device.is_empty() || route.table != main {
        return None;
    }
    // A router's own link-local addresses and multicast come by themselves.
    if header.scope == RouteScope::Link && route.ipv6 {
        return None;
    }
    Some(route)
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
