// SPDX-License-Identifier: Apache-2.0
//! Interfaces, addresses, routes and neighbours of the guest, over one route
//! netlink socket. The kernel answers each request at once, so the socket
//! blocks.

pub mod message;
mod route;

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_agent_protocol::agent;
use nix::errno::Errno;

use crate::error::{AgentError, Context, Result};
use crate::sys::socket;
use message::{attributes, messages, u32_at, Builder};
use route::route_message;

// Kinds, flags and attributes of the kernel's uapi headers.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const RTM_NEWRULE: u16 = 32;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const REPLACE: u16 = 0x100;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const EXCLUSIVE: u16 = 0x200;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_PERMANENT: u32 = 0x80;
/// MAX_ADDR_LEN of the kernel.
const LONGEST_HARDWARE_ADDRESS: usize = 32;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
const IPV4: u8 = libc::AF_INET as u8;
const IPV6: u8 = libc::AF_INET6 as u8;
/// Length of `struct fib_rule_hdr`.
const RULE_FIXED: usize = 12;
/// Length of `struct ifinfomsg`.
const LINK_FIXED: usize = 16;

/// An interface as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// A route netlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket.
    ///
    /// # Errors
    /// When the kernel has no network.
    pub fn open() -> Result<Self> {
        Ok(Self {
            socket: socket::netlink_route().step(|| "open netlink socket")?,
            sequence: 0,
        })
    }

    /// Sends a request and waits for its acknowledgement.
    fn request(&mut self, builder: Builder) -> nix::Result<()> {
        self.exchange(builder, |_| {})
    }

    /// Sends a request and passes on what comes before its end.
    fn exchange(&mut self, builder: Builder, mut each: impl FnMut(&[u8])) -> nix::Result<()> {
        self.sequence += 1;
        let sequence = self.sequence;
        socket::send(self.socket.as_fd(), &builder.finish(sequence))?;
        // The largest datagram that the kernel makes for a dump.
        let mut buffer = vec![0; 32 * 1024];
        loop {
            let count = match socket::receive(self.socket.as_fd(), &mut buffer) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for message in messages(&buffer[..count]).filter(|m| m.sequence == sequence) {
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        // 0 acknowledges; else a negative errno.
                        let code = u32_at(message.body, 0).ok_or(Errno::EPROTO)? as i32;
                        return match code {
                            0 => Ok(()),
                            code => Err(Errno::from_raw(-code)),
                        };
                    }
                    _ => each(message.body),
                }
            }
        }
    }

    fn links(&mut self) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let dump = Builder::new(RTM_GETLINK, REQUEST | DUMP, &[0; LINK_FIXED]);
        self.exchange(dump, |body| links.extend(parse_link(body)))
            .step(|| "list interfaces")?;
        Ok(links)
    }

    fn index_of(&mut self, name: &str) -> Result<u32> {
        self.links()?
            .into_iter()
            .find(|link| link.name == name)
            .map(|link| link.index)
            .ok_or_else(|| AgentError::Invalid(format!("device: no interface {name:?}")))
    }

    /// Sets `lo` up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn loopback_up(&mut self) -> Result<()> {
        let index = self.index_of("lo")?;
        self.request(Builder::new(
            RTM_NEWLINK,
            REQUEST | ACK,
            &link_fixed(index, IFF_UP, IFF_UP),
        ))
        .step(|| "set lo up")
    }

    /// Finds an interface by its hardware address, names it, gives it its MTU
    /// and addresses, and sets it up.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] when there is none or a field makes no sense.
    pub fn set_interface(&mut self, wanted: &agent::Interface) -> Result<()> {
        let name = &wanted.name;
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '\0']) {
            return Err(AgentError::Invalid(format!(
                "interfaces: bad name {name:?}"
            )));
        }
        let link = self
            .links()?
            .into_iter()
            .find(|link| link.mac == wanted.mac && !link.mac.is_empty())
            .ok_or_else(|| {
                AgentError::Invalid(format!(
                    "interfaces: none has the address {:02x?}",
                    wanted.mac
                ))
            })?;
        // A new name needs the interface down, which it is at first.
        let mut change = Builder::new(RTM_NEWLINK, REQUEST | ACK, &link_fixed(link.index, 0, 0));
        if link.name != *name {
            change.attribute(IFLA_IFNAME, &c_string(name));
        }
        if wanted.mtu != 0 {
            change.attribute(IFLA_MTU, &wanted.mtu.to_ne_bytes());
        }
        self.request(change)
            .step(|| format!("name interface {} {name}", link.name))?;
        for address in &wanted.addresses {
            self.add_address(link.index, address, name)?;
        }
        let flags = IFF_UP | wanted.raw_flags & IFF_NOARP;
        self.request(Builder::new(
            RTM_NEWLINK,
            REQUEST | ACK,
            &link_fixed(link.index, flags, IFF_UP | IFF_NOARP),
        ))
        .step(|| format!("set {name} up"))
    }

    fn add_address(&mut self, index: u32, address: &agent::IpAddress, name: &str) -> Result<()> {
        let message = address_message(index, address)?;
        self.request(message)
            .step(|| format!("add address to {name}"))
    }

    /// Adds a route, or replaces the one to the same destination.
    ///
    /// # Errors
    /// As for [`Self::set_interface`].
    pub fn add_route(&mut self, route: &agent::Route) -> Result<()> {
        let index = match route.device.as_str() {
            "" => None,
            device => Some(self.index_of(device)?),
        };
        let hops = route
            .hops
            .iter()
            .map(|hop| self.index_of(&hop.device))
            .collect::<Result<Vec<_>>>()?;
        let message = route_message(route, index, &hops)?;
        self.request(message).step(|| {
            let destination = route.destination.as_ref();
            let address = destination.map_or(&[][..], |to| &to.address);
            let prefix = destination.map_or(0, |to| to.prefix_len);
            format!("add route to {address:?}/{prefix}")
        })
    }

    /// Adds a policy rule; one that is there already is enough.
    ///
    /// # Errors
    /// As for [`Self::set_interface`].
    pub fn add_rule(&mut self, rule: &agent::Rule) -> Result<()> {
        let message = rule_message(rule)?;
        match self.request(message) {
            Err(Errno::EEXIST) => Ok(()),
            other => other.step(|| "add policy rule"),
        }
    }

    /// Adds or replaces a neighbour.
    ///
    /// # Errors
    /// As for [`Self::set_interface`].
    pub fn add_neighbour(&mut self, neighbour: &agent::Neighbour) -> Result<()> {
        let index = self.index_of(&neighbour.device)?;
        let message = neighbour_message(neighbour, index)?;
        self.request(message)
            .step(|| format!("add neighbour on {}", neighbour.device))
    }
}

/// The request for an address of the interface `index`.
fn address_message(index: u32, address: &agent::IpAddress) -> Result<Builder> {
    let family = family_of(&address.address, "interfaces.addresses")?;
    let prefix = prefix_of(address, "interfaces.addresses")?;
    let mut fixed = vec![family, prefix, 0, 0];
    fixed.extend(index.to_ne_bytes());
    let mut message = Builder::new(RTM_NEWADDR, REQUEST | ACK | CREATE | REPLACE, &fixed);
    message
        .attribute(IFA_LOCAL, &address.address)
        .attribute(IFA_ADDRESS, &address.address);
    if let Ok(octets) = <[u8; 4]>::try_from(address.address.as_slice()) {
        if prefix < 31 {
            let broadcast = u32::from_be_bytes(octets) | u32::MAX >> prefix;
            message.attribute(IFA_BROADCAST, &broadcast.to_be_bytes());
        }
    } else {
        // The host's network has the address for the pod alone; nobody
        // should wait for the detection of duplicates.
        let flags = IFA_F_NODAD | IFA_F_PERMANENT;
        message.attribute(IFA_FLAGS, &flags.to_ne_bytes());
    }
    Ok(message)
}

/// The request for a policy rule.
fn rule_message(rule: &agent::Rule) -> Result<Builder> {
    let wrong = || AgentError::Invalid("rules: not a rule of IPv4 or IPv6".into());
    let (fixed, rest) = rule
        .message
        .split_at_checked(RULE_FIXED)
        .ok_or_else(wrong)?;
    if ![IPV4, IPV6].contains(&fixed[0]) {
        return Err(wrong());
    }
    let flags = REQUEST | ACK | CREATE | EXCLUSIVE;
    let mut message = Builder::new(RTM_NEWRULE, flags, fixed);
    for (kind, value) in attributes(rest) {
        message.attribute(kind, value);
    }
    Ok(message)
}

/// The request for a neighbour at the interface `index`.
fn neighbour_message(neighbour: &agent::Neighbour, index: u32) -> Result<Builder> {
    let family = family_of(&neighbour.address, "neighbours.address")?;
    let narrow =
        |value: u32, field: &str| AgentError::Invalid(format!("neighbours.{field}: {value}"));
    let state = u16::try_from(neighbour.state).map_err(|_| narrow(neighbour.state, "state"))?;
    let flags = u8::try_from(neighbour.flags).map_err(|_| narrow(neighbour.flags, "flags"))?;
    let mut fixed = vec![family, 0, 0, 0];
    fixed.extend(index.to_ne_bytes());
    fixed.extend(state.to_ne_bytes());
    fixed.extend([flags, 0]);
    let mut message = Builder::new(RTM_NEWNEIGH, REQUEST | ACK | CREATE | REPLACE, &fixed);
    message.attribute(NDA_DST, &neighbour.address);
    if neighbour.mac.len() > LONGEST_HARDWARE_ADDRESS {
        return Err(AgentError::Invalid(format!(
            "neighbours.mac: {} bytes are no address",
            neighbour.mac.len()
        )));
    }
    if !neighbour.mac.is_empty() {
        message.attribute(NDA_LLADDR, &neighbour.mac);
    }
    Ok(message)
}

/// `struct ifinfomsg`: family, type, index, flags, which flags to change.
fn link_fixed(index: u32, flags: u32, change: u32) -> [u8; LINK_FIXED] {
    let mut fixed = [0; LINK_FIXED];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&change.to_ne_bytes());
    fixed
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut link = Link {
        index: u32_at(body, 4)?,
        name: String::new(),
        mac: Vec::new(),
    };
    for (kind, value) in attributes(body.get(LINK_FIXED..)?) {
        match kind {
            IFLA_IFNAME => {
                let name = value.strip_suffix(b"\0").unwrap_or(value);
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            IFLA_ADDRESS => link.mac = value.to_vec(),
            _ => {}
        }
    }
    Some(link)
}

fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn family_of(address: &[u8], field: &str) -> Result<u8> {
    match address.len() {
        4 => Ok(IPV4),
        16 => Ok(IPV6),
        len => Err(AgentError::Invalid(format!(
            "{field}: {len} bytes are no address"
        ))),
    }
}

fn prefix_of(address: &agent::IpAddress, field: &str) -> Result<u8> {
    let most = address.address.len() as u32 * 8;
    match u8::try_from(address.prefix_len) {
        Ok(prefix) if u32::from(prefix) <= most => Ok(prefix),
        _ => Err(AgentError::Invalid(format!(
            "{field}: prefix length {}",
            address.prefix_len
        ))),
    }
}

/// For a fuzz target: the messages for a network.
#[cfg(feature = "fuzzing")]
pub fn fuzz(network: &agent::Network) {
    let addresses = network.interfaces.iter().flat_map(|i| &i.addresses);
    let addresses = addresses.map(|address| address_message(1, address));
    let hops = vec![1; 1024];
    let routes = network
        .routes
        .iter()
        .map(|r| route_message(r, Some(1), &hops[..r.hops.len().min(1024)]));
    let rules = network.rules.iter().map(rule_message);
    let neighbours = network.neighbours.iter().map(|n| neighbour_message(n, 1));
    for message in addresses
        .chain(routes)
        .chain(neighbours)
        .chain(rules)
        .flatten()
    {
        let bytes = message.finish(1);
        let received: Vec<_> = message::messages(&bytes).collect();
        assert_eq!(received.len(), 1, "one message and nothing behind it");
    }
}

/// For a fuzz target: an answer of the kernel's.
#[cfg(feature = "fuzzing")]
pub fn fuzz_answer(bytes: &[u8]) {
    for message in message::messages(bytes) {
        let _ = parse_link(message.body);
    }
}

#[cfg(test)]
mod tests;
