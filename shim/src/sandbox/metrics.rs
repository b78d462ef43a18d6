// SPDX-License-Identifier: Apache-2.0
//! A pod's figures: the sums of its containers'.

use bulkhead_shim_protocol::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protobuf::MessageField;

/// What containerd's CRI plugin reads of a pod, summed up. The network is the
/// pod's own, so every container's figures tell it.
pub fn sum(containers: Vec<Metrics>) -> Metrics {
    let mut pids = PidsStat::new();
    let mut cpu = CPUStat::new();
    let mut memory = MemoryStat::new();
    let mut network = Vec::new();
    for one in containers {
        pids.current = pids.current.saturating_add(one.pids.current);
        cpu.usage_usec = cpu.usage_usec.saturating_add(one.cpu.usage_usec);
        cpu.user_usec = cpu.user_usec.saturating_add(one.cpu.user_usec);
        cpu.system_usec = cpu.system_usec.saturating_add(one.cpu.system_usec);
        let of = &one.memory;
        for (sum, value) in [
            (&mut memory.usage, of.usage),
            (&mut memory.anon, of.anon),
            (&mut memory.file, of.file),
            (&mut memory.inactive_file, of.inactive_file),
            (&mut memory.active_file, of.active_file),
            (&mut memory.inactive_anon, of.inactive_anon),
            (&mut memory.active_anon, of.active_anon),
            (&mut memory.pgfault, of.pgfault),
            (&mut memory.pgmajfault, of.pgmajfault),
        ] {
            *sum = sum.saturating_add(value);
        }
        if network.is_empty() {
            network = one.network;
        }
    }
    Metrics {
        pids: MessageField::some(pids),
        cpu: MessageField::some(cpu),
        memory: MessageField::some(memory),
        network,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_shim_protocol::metrics::NetworkStat;

    use super::*;

    #[test]
    fn containers_add_up_and_the_network_counts_once() {
        let one = Metrics {
            pids: MessageField::some(PidsStat {
                current: 2,
                ..Default::default()
            }),
            memory: MessageField::some(MemoryStat {
                usage: u64::MAX,
                anon: 3,
                ..Default::default()
            }),
            network: vec![NetworkStat::new()],
            ..Default::default()
        };
        let pod = sum(vec![one.clone(), one]);
        assert_eq!((pod.pids.current, pod.memory.anon), (4, 6));
        assert_eq!(pod.memory.usage, u64::MAX);
        assert_eq!(pod.network.len(), 1);
        assert_eq!(sum(Vec::new()).cpu.usage_usec, 0);
    }
}
