// SPDX-License-Identifier: Apache-2.0
//! Messages about routes.

use bulkhead_agent_protocol::agent;

use super::message::Builder;
use super::{family_of, prefix_of, ACK, CREATE, IPV4, IPV6, REPLACE, REQUEST, RTM_NEWROUTE};
use crate::error::{AgentError, Result};

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;
const RT_TABLE_MAIN: u32 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// RTN_BLACKHOLE to RTN_THROW: routes that lead nowhere.
const RTN_NOWHERE: std::ops::RangeInclusive<u32> = 6..=9;
/// Length of `struct rtnexthop`.
const NEXT_HOP: usize = 8;
/// Far below what one message can hold.
const MOST_HOPS: usize = 256;

/// Adds where a route leads: a gateway of its family, or of the other one.
fn gateway(message: &mut Builder, address: &[u8], family: u8, field: &str) -> Result<()> {
    match (family_of(address, field)?, family) {
        (found, family) if found == family => {
            message.attribute(RTA_GATEWAY, address);
        }
        (IPV6, IPV4) => {
            let mut via = u16::from(IPV6).to_ne_bytes().to_vec();
            via.extend(address);
            message.attribute(RTA_VIA, &via);
        }
        _ => {
            return Err(AgentError::Invalid(format!(
                "{field}: not of the route's family"
            )))
        }
    }
    Ok(())
}

/// Adds the ways of a route that has several (`struct rtnexthop`s).
fn multipath(message: &mut Builder, route: &agent::Route, indices: &[u32]) -> Result<()> {
    let family = if route.ipv6 { IPV6 } else { IPV4 };
    let mut list = Vec::new();
    for (hop, index) in route.hops.iter().zip(indices) {
        let narrow = |value: Option<u32>, what: &str| {
            value
                .and_then(|value| u8::try_from(value).ok())
                .ok_or_else(|| AgentError::Invalid(format!("routes.hops.{what}: out of range")))
        };
        // The kernel counts weights from 0.
        let weight = narrow(hop.weight.checked_sub(1), "weight")?;
        let flags = narrow(Some(hop.flags), "flags")?;
        let mut inner = Builder::bare();
        if !hop.gateway.is_empty() {
            gateway(&mut inner, &hop.gateway, family, "routes.hops.gateway")?;
        }
        let inner = inner.attributes_only();
        let len = (NEXT_HOP + inner.len()) as u16;
        list.extend(len.to_ne_bytes());
        list.extend([flags, weight]);
        list.extend(index.to_ne_bytes());
        list.extend(inner);
    }
    message.attribute(RTA_MULTIPATH, &list);
    Ok(())
}

/// The request for a route by the interface `index`, or by those of its
/// `hops`.
pub fn route_message(route: &agent::Route, index: Option<u32>, hops: &[u32]) -> Result<Builder> {
    let destination = route.destination.clone().unwrap_or_default();
    let family = if route.ipv6 { IPV6 } else { IPV4 };
    let check = |address: &[u8], field: &str| match family_of(address, field)? {
        found if found == family => Ok(()),
        _ => Err(AgentError::Invalid(format!(
            "{field}: not of the route's family"
        ))),
    };
    let default = destination.address.is_empty();
    let prefix = if default {
        0
    } else {
        check(&destination.address, "routes.destination")?;
        prefix_of(&destination, "routes.destination")?
    };
    let table = if route.table == 0 {
        RT_TABLE_MAIN
    } else {
        route.table
    };
    let scope = u8::try_from(route.scope)
        .map_err(|_| AgentError::Invalid(format!("routes.scope: {}", route.scope)))?;
    let kind = match route.kind {
        0 => RTN_UNICAST,
        kind if RTN_NOWHERE.contains(&kind) => kind as u8,
        kind => return Err(AgentError::Invalid(format!("routes.kind: {kind}"))),
    };
    if route.hops.len() > MOST_HOPS {
        return Err(AgentError::Invalid("routes.hops: more than 256".into()));
    }
    let mut fixed = vec![
        family,
        prefix,
        0,
        0,
        // Tables beyond the byte go by the attribute alone.
        u8::try_from(table).unwrap_or(0),
        RTPROT_STATIC,
        scope,
        kind,
    ];
    fixed.extend(route.flags.to_ne_bytes());
    let mut message = Builder::new(RTM_NEWROUTE, REQUEST | ACK | CREATE | REPLACE, &fixed);
    message.attribute(RTA_TABLE, &table.to_ne_bytes());
    if !default {
        message.attribute(RTA_DST, &destination.address);
    }
    if !route.gateway.is_empty() {
        gateway(&mut message, &route.gateway, family, "routes.gateway")?;
    }
    if !hops.is_empty() {
        multipath(&mut message, route, hops)?;
    }
    if !route.source.is_empty() {
        check(&route.source, "routes.source")?;
        message.attribute(RTA_PREFSRC, &route.source);
    }
    if let Some(index) = index {
        message.attribute(RTA_OIF, &index.to_ne_bytes());
    }
    if route.metric != 0 {
        message.attribute(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    if route.mtu != 0 {
        message.nested(RTA_METRICS, |inner| {
            inner.attribute(RTAX_MTU, &route.mtu.to_ne_bytes());
        });
    }
    Ok(message)
}
