// SPDX-License-Identifier: Apache-2.0
//! A container's figures in the form that containerd, its CRI plugin and
//! CRI-O read: those of a host with cgroup v2, which the guest is.

use bulkhead_agent_protocol::agent;
use bulkhead_shim_protocol::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use protobuf::MessageField;

/// The figures as the agent gives them, for containerd.
pub fn metrics(stats: agent::StatsReply) -> Metrics {
    let io = stats.io.into_iter().map(io).collect();
    Metrics {
        pids: convert(stats.pids, pids),
        cpu: convert(stats.cpu, cpu),
        memory: convert(stats.memory, memory),
        io: MessageField::some(IOStat {
            usage: io,
            ..Default::default()
        }),
        memory_events: convert(stats.memory_events, memory_events),
        network: stats.network.into_iter().map(network).collect(),
        ..Default::default()
    }
}

fn convert<A, B>(field: MessageField<A>, with: impl FnOnce(A) -> B) -> MessageField<B> {
    MessageField::from_option(field.into_option().map(with))
}

fn pids(stat: agent::PidsStat) -> PidsStat {
    PidsStat {
        current: stat.current,
        limit: stat.limit,
        ..Default::default()
    }
}

fn cpu(stat: agent::CpuStat) -> CPUStat {
    CPUStat {
        usage_usec: stat.usage_usec,
        user_usec: stat.user_usec,
        system_usec: stat.system_usec,
        nr_periods: stat.nr_periods,
        nr_throttled: stat.nr_throttled,
        throttled_usec: stat.throttled_usec,
        ..Default::default()
    }
}

fn memory(stat: agent::MemoryStat) -> MemoryStat {
    // Lines that the guest's kernel does not have are zero, as they are where
    // containerd reads them itself.
    let line = |name: &str| stat.stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: line("anon"),
        file: line("file"),
        kernel_stack: line("kernel_stack"),
        slab: line("slab"),
        sock: line("sock"),
        shmem: line("shmem"),
        file_mapped: line("file_mapped"),
        file_dirty: line("file_dirty"),
        file_writeback: line("file_writeback"),
        anon_thp: line("anon_thp"),
        inactive_anon: line("inactive_anon"),
        active_anon: line("active_anon"),
        inactive_file: line("inactive_file"),
        active_file: line("active_file"),
        unevictable: line("unevictable"),
        slab_reclaimable: line("slab_reclaimable"),
        slab_unreclaimable: line("slab_unreclaimable"),
        pgfault: line("pgfault"),
        pgmajfault: line("pgmajfault"),
        workingset_refault: line("workingset_refault"),
        workingset_activate: line("workingset_activate"),
        workingset_nodereclaim: line("workingset_nodereclaim"),
        pgrefill: line("pgrefill"),
        pgscan: line("pgscan"),
        pgsteal: line("pgsteal"),
        pgactivate: line("pgactivate"),
        pgdeactivate: line("pgdeactivate"),
        pglazyfree: line("pglazyfree"),
        pglazyfreed: line("pglazyfreed"),
        thp_fault_alloc: line("thp_fault_alloc"),
        thp_collapse_alloc: line("thp_collapse_alloc"),
        workingset_refault_anon: line("workingset_refault_anon"),
        workingset_refault_file: line("workingset_refault_file"),
        workingset_activate_anon: line("workingset_activate_anon"),
        workingset_activate_file: line("workingset_activate_file"),
        usage: stat.usage,
        usage_limit: stat.usage_limit,
        swap_usage: stat.swap_usage,
        swap_limit: stat.swap_limit,
        max_usage: stat.max_usage,
        ..Default::default()
    }
}

fn io(stat: agent::IoStat) -> IOEntry {
    IOEntry {
        major: stat.major,
        minor: stat.minor,
        rbytes: stat.rbytes,
        wbytes: stat.wbytes,
        rios: stat.rios,
        wios: stat.wios,
        ..Default::default()
    }
}

fn memory_events(stat: agent::MemoryEvents) -> MemoryEvents {
    MemoryEvents {
        low: stat.low,
        high: stat.high,
        max: stat.max,
        oom: stat.oom,
        oom_kill: stat.oom_kill,
        ..Default::default()
    }
}

fn network(stat: agent::NetworkStat) -> NetworkStat {
    NetworkStat {
        name: stat.name,
        rx_bytes: stat.rx_bytes,
        rx_packets: stat.rx_packets,
        rx_errors: stat.rx_errors,
        rx_dropped: stat.rx_dropped,
        tx_bytes: stat.tx_bytes,
        tx_packets: stat.tx_packets,
        tx_errors: stat.tx_errors,
        tx_dropped: stat.tx_dropped,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_shim_protocol::Named;

    use super::*;

    #[test]
    fn every_figure_arrives() {
        let stats = agent::StatsReply {
            pids: MessageField::some(agent::PidsStat {
                current: 3,
                limit: u64::MAX,
                ..Default::default()
            }),
            cpu: MessageField::some(agent::CpuStat {
                usage_usec: 30,
                user_usec: 10,
                system_usec: 20,
                nr_throttled: 4,
                ..Default::default()
            }),
            memory: MessageField::some(agent::MemoryStat {
                usage: 100,
                usage_limit: 200,
                max_usage: 150,
                stat: [
                    ("anon".into(), 60),
                    ("inactive_file".into(), 7),
                    ("workingset_refault_file".into(), 5),
                    ("not_known_to_containerd".into(), 1),
                ]
                .into(),
                ..Default::default()
            }),
            io: vec![agent::IoStat {
                major: 254,
                minor: 1,
                rbytes: 4096,
                wios: 2,
                ..Default::default()
            }],
            memory_events: MessageField::some(agent::MemoryEvents {
                oom_kill: 1,
                ..Default::default()
            }),
            network: vec![agent::NetworkStat {
                name: "eth0".into(),
                rx_bytes: 9,
                tx_dropped: 8,
                ..Default::default()
            }],
            ..Default::default()
        };
        let metrics = metrics(stats);
        assert_eq!(metrics.pids.current, 3);
        assert_eq!(metrics.pids.limit, u64::MAX);
        assert_eq!(metrics.cpu.usage_usec, 30);
        assert_eq!(metrics.cpu.user_usec, 10);
        assert_eq!(metrics.cpu.system_usec, 20);
        assert_eq!(metrics.cpu.nr_throttled, 4);
        assert_eq!(metrics.memory.usage, 100);
        assert_eq!(metrics.memory.usage_limit, 200);
        assert_eq!(metrics.memory.max_usage, 150);
        assert_eq!(metrics.memory.anon, 60);
        assert_eq!(metrics.memory.inactive_file, 7);
        assert_eq!(metrics.memory.workingset_refault_file, 5);
        assert_eq!(metrics.memory.file, 0);
        assert_eq!(metrics.io.usage[0].major, 254);
        assert_eq!(metrics.io.usage[0].rbytes, 4096);
        assert_eq!(metrics.io.usage[0].wios, 2);
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(metrics.network[0].name, "eth0");
        assert_eq!(metrics.network[0].rx_bytes, 9);
        assert_eq!(metrics.network[0].tx_dropped, 8);
        assert_eq!(
            metrics.to_any().unwrap().type_url,
            "io.containerd.cgroups.v2.Metrics"
        );
    }

    #[test]
    fn what_the_agent_does_not_tell_is_not_made_up() {
        let metrics = metrics(agent::StatsReply::default());
        assert!(metrics.memory.is_none());
        assert!(metrics.cpu.is_none());
        assert!(metrics.network.is_empty());
    }
}
