// SPDX-License-Identifier: Apache-2.0
//! A container's figures, from its group's files and the guest's interfaces.

use std::fs;

use bulkhead_agent_protocol::agent;

use super::{flat_value, Cgroup};

/// Reads what there is; a controller that is absent leaves its part out.
pub fn collect(group: &Cgroup) -> agent::StatsReply {
    let file = |name: &str| group.read(name).ok();
    let mut reply = agent::StatsReply::new();
    if let Some(current) = file("pids.current") {
        reply.pids = Some(agent::PidsStat {
            current: number(&current),
            limit: file("pids.max").map_or(u64::MAX, |text| number(&text)),
            ..Default::default()
        })
        .into();
    }
    if let Some(text) = file("cpu.stat") {
        let value = |key| flat_value(&text, key).unwrap_or(0);
        reply.cpu = Some(agent::CpuStat {
            usage_usec: value("usage_usec"),
            user_usec: value("user_usec"),
            system_usec: value("system_usec"),
            nr_periods: value("nr_periods"),
            nr_throttled: value("nr_throttled"),
            throttled_usec: value("throttled_usec"),
            ..Default::default()
        })
        .into();
    }
    if let Some(current) = file("memory.current") {
        let limit = |name| file(name).map_or(u64::MAX, |text| number(&text));
        let value = |name| file(name).map_or(0, |text| number(&text));
        let stat = file("memory.stat").unwrap_or_default();
        reply.memory = Some(agent::MemoryStat {
            usage: number(&current),
            usage_limit: limit("memory.max"),
            swap_usage: value("memory.swap.current"),
            swap_limit: limit("memory.swap.max"),
            stat: stat
                .lines()
                .filter_map(|line| line.split_once(' '))
                .map(|(key, value)| (key.to_owned(), number(value)))
                .collect(),
            max_usage: value("memory.peak"),
            ..Default::default()
        })
        .into();
    }
    if let Some(text) = file("memory.events") {
        let value = |key| flat_value(&text, key).unwrap_or(0);
        reply.memory_events = Some(agent::MemoryEvents {
            low: value("low"),
            high: value("high"),
            max: value("max"),
            oom: value("oom"),
            oom_kill: value("oom_kill"),
            ..Default::default()
        })
        .into();
    }
    reply.io = io_stats(&file("io.stat").unwrap_or_default());
    reply.network = network_stats(&fs::read_to_string("/proc/net/dev").unwrap_or_default());
    reply
}

/// Processes of this group that the OOM killer ended so far.
pub fn oom_kills(group: &Cgroup) -> u64 {
    group
        .read("memory.events")
        .ok()
        .and_then(|text| flat_value(&text, "oom_kill"))
        .unwrap_or(0)
}

/// A number, or "max".
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

/// io.stat: `major:minor key=value ...` per device.
fn io_stats(text: &str) -> Vec<agent::IoStat> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (major, minor) = words.next()?.split_once(':')?;
            let mut stat = agent::IoStat {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = number(value);
                match key {
                    "rbytes" => stat.rbytes = value,
                    "wbytes" => stat.wbytes = value,
                    "rios" => stat.rios = value,
                    "wios" => stat.wios = value,
                    _ => {}
                }
            }
            Some(stat)
        })
        .collect()
}

/// /proc/net/dev: two lines of headings, then sixteen figures per interface.
pub fn network_stats(text: &str) -> Vec<agent::NetworkStat> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, figures) = line.split_once(':')?;
            let figures: Vec<u64> = figures.split_ascii_whitespace().map(number).collect();
            let name = name.trim();
            if name == "lo" || figures.len() < 12 {
                return None;
            }
            Some(agent::NetworkStat {
                name: name.to_owned(),
                rx_bytes: figures[0],
                rx_packets: figures[1],
                rx_errors: figures[2],
                rx_dropped: figures[3],
                tx_bytes: figures[8],
                tx_packets: figures[9],
                tx_errors: figures[10],
                tx_dropped: figures[11],
                ..Default::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_lines() {
        let stats = io_stats(
            "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\nbad\n",
        );
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].major, stats[0].minor), (8, 16));
        assert_eq!((stats[0].rbytes, stats[0].wios), (1_459_200, 353));
    }

    #[test]
    fn network_lines_without_loopback() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes ...\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        let stats = network_stats(text);
        assert_eq!(stats.len(), 1);
        assert_eq!(stats[0].name, "eth0");
        assert_eq!((stats[0].rx_bytes, stats[0].rx_dropped), (1, 4));
        assert_eq!((stats[0].tx_bytes, stats[0].tx_dropped), (9, 12));
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("12\n"), 12);
    }
}
