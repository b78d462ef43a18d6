// SPDX-License-Identifier: Apache-2.0
//! The guest's figures, from /proc: memory, load, pressure, disks, interfaces.

use std::fs;

use bulkhead_agent_protocol::agent;

use crate::cgroup::stats::network_stats;

/// A sector as /proc/diskstats counts, whatever the disk's own are.
const SECTOR: u64 = 512;
/// What has pressure files.
const RESOURCES: [&str; 3] = ["cpu", "io", "memory"];
/// Lines of /proc/meminfo that are told.
const MEMORY: [&str; 16] = [
    "MemTotal",
    "MemFree",
    "MemAvailable",
    "Buffers",
    "Cached",
    "SwapTotal",
    "SwapFree",
    "Dirty",
    "Writeback",
    "AnonPages",
    "Shmem",
    "SReclaimable",
    "SUnreclaim",
    "KernelStack",
    "PageTables",
    "Percpu",
];

/// Reads what there is. What the kernel does not tell is left out.
pub fn collect() -> agent::StatsGuestReply {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut reply = agent::StatsGuestReply {
        memory: memory(&file("/proc/meminfo")),
        disks: disks(&file("/proc/diskstats")),
        network: network_stats(&file("/proc/net/dev")),
        ..Default::default()
    };
    (reply.load_thousandths, reply.threads) = load(&file("/proc/loadavg"));
    for resource in RESOURCES {
        let text = file(&format!("/proc/pressure/{resource}"));
        reply.pressure.extend(pressure(resource, &text));
    }
    reply
}

fn memory(text: &str) -> Vec<agent::MemoryFigure> {
    text.lines()
        .filter_map(|line| {
            let (name, rest) = line.split_once(':')?;
            let kib: u64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
            MEMORY.contains(&name).then(|| agent::MemoryFigure {
                name: name.into(),
                bytes: kib.saturating_mul(1024),
                ..Default::default()
            })
        })
        .collect()
}

/// The three averages in thousandths, and how many threads there are.
fn load(text: &str) -> (Vec<u32>, u32) {
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let averages = fields.iter().take(3).filter_map(|field| {
        let value: f64 = field.parse().ok()?;
        Some((value * 1000.0) as u32)
    });
    let threads = fields.get(3).and_then(|field| field.split_once('/'));
    let threads = threads.and_then(|(_, all)| all.parse().ok());
    (averages.collect(), threads.unwrap_or(0))
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and `full` likewise.
fn pressure(resource: &str, text: &str) -> Option<agent::Pressure> {
    let total = |kind: &str| {
        let line = text.lines().find(|line| line.starts_with(kind))?;
        let total = line.split_ascii_whitespace().last()?;
        total.strip_prefix("total=")?.parse::<u64>().ok()
    };
    Some(agent::Pressure {
        resource: resource.into(),
        some_usec: total("some")?,
        full_usec: total("full").unwrap_or(0),
        ..Default::default()
    })
}

/// Disks that were used at all. A partition counts to its disk as well.
fn disks(text: &str) -> Vec<agent::DiskStat> {
    text.lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
            let stat = agent::DiskStat {
                name: (*fields.get(2)?).into(),
                reads: number(3)?,
                read_bytes: number(5)?.saturating_mul(SECTOR),
                writes: number(7)?,
                written_bytes: number(9)?.saturating_mul(SECTOR),
                busy_ms: number(12)?,
                ..Default::default()
            };
            (stat.reads + stat.writes > 0).then_some(stat)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let found =
            memory("MemTotal:         248044 kB\nHugePages_Total:       0\nMemFree: x kB\n");
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].bytes),
            ("MemTotal", 248_044 << 10)
        );
        assert_eq!(
            load("0.52 1.00 12.25 2/61 99\n"),
            (vec![520, 1000, 12_250], 61)
        );
        assert_eq!(load(""), (vec![], 0));
        let text = "some avg10=1.00 avg60=0.10 avg300=0.00 total=75\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let found = pressure("io", text).unwrap();
        assert_eq!((found.some_usec, found.full_usec), (75, 7));
        assert!(pressure("io", "").is_none());
        let text = " 259 0 pmem0 10 0 80 1 0 0 0 0 0 2 1 0 0 0 0 0 0\n 254 0 vda 1 0 8 1 2 0 16 5 0 7 9\n 7 0 loop0 0 0 0 0 0 0 0 0 0 0 0\n";
        let found = disks(text);
        assert_eq!(found.len(), 2);
        assert_eq!(
            (
                found[1].read_bytes,
                found[1].written_bytes,
                found[1].busy_ms
            ),
            (4096, 8192, 7)
        );
    }

    #[test]
    fn this_machine_has_memory() {
        let all = collect();
        let total = all.memory.iter().find(|each| each.name == "MemTotal");
        assert!(total.unwrap().bytes > 1 << 20, "{all:?}");
        assert_eq!(all.load_thousandths.len(), 3);
    }
}
