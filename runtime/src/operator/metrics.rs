// SPDX-License-Identifier: Apache-2.0
//! Metrics in Prometheus's text format, in families.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

/// Kind of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Goes up and down.
    Gauge,
    /// Only goes up.
    Counter,
}

/// What a family is about. Its name is `bulkhead_` and this one.
#[derive(Debug)]
pub struct Family {
    /// With its unit at the end.
    pub name: &'static str,
    /// Kind.
    pub kind: Kind,
    /// One sentence without its full stop.
    pub help: &'static str,
}

macro_rules! families {
    ($($constant:ident = $name:literal, $kind:ident, $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $constant: Family = Family { name: $name, kind: Kind::$kind, help: $help };
        )+

        /// Every family, in the order in which they are told.
        pub const ALL: &[&Family] = &[$(&$constant,)+];
    };
}

families! {
    INFO = "sandbox_info", Gauge, "Always 1; the labels name the pod's processes and version";
    UP = "sandbox_up", Gauge, "Whether the pod's virtual machine runs";
    AGENT_UP = "sandbox_agent_up", Gauge, "Whether the guest's agent has answered just now";
    UNANSWERED = "sandbox_agent_unanswered_total", Counter, "Health questions that the guest's agent did not answer";
    CALLS = "sandbox_agent_calls_total", Counter, "Calls of the guest's agent by kind";
    VCPUS = "sandbox_vcpus", Gauge, "Virtual processors of the pod";
    MEMORY = "sandbox_memory_bytes", Gauge, "Guest memory of the pod";
    START = "sandbox_start_seconds", Gauge, "When a step of the pod's start was done, after the front end was started";
    EVENTS = "sandbox_events_total", Counter, "Events of the pod by kind";
    CONTAINERS = "sandbox_containers", Gauge, "Containers of the pod by status";
    GUEST_MEMORY = "guest_memory_bytes", Gauge, "Memory of the guest by line of its /proc/meminfo";
    GUEST_LOAD = "guest_load", Gauge, "Load average of the guest by minutes";
    GUEST_THREADS = "guest_threads", Gauge, "Threads of the guest, its kernel's as well";
    GUEST_PRESSURE = "guest_pressure_seconds_total", Counter, "How long some or all of the guest have waited for a resource, where its kernel keeps that (psi=1)";
    GUEST_DISK_READ = "guest_disk_read_bytes_total", Counter, "Bytes the guest has read from a disk";
    GUEST_DISK_WRITTEN = "guest_disk_written_bytes_total", Counter, "Bytes the guest has written to a disk";
    GUEST_DISK_BUSY = "guest_disk_busy_seconds_total", Counter, "How long a disk of the guest was busy";
    NET_RX_BYTES = "sandbox_network_receive_bytes_total", Counter, "Bytes received by the pod";
    NET_RX_PACKETS = "sandbox_network_receive_packets_total", Counter, "Packets received by the pod";
    NET_RX_DROPS = "sandbox_network_receive_drop_total", Counter, "Packets for the pod that were dropped";
    NET_TX_BYTES = "sandbox_network_transmit_bytes_total", Counter, "Bytes sent by the pod";
    NET_TX_PACKETS = "sandbox_network_transmit_packets_total", Counter, "Packets sent by the pod";
    NET_TX_DROPS = "sandbox_network_transmit_drop_total", Counter, "Packets of the pod that were dropped";
    PROCESS_CPU = "process_cpu_seconds_total", Counter, "Processor time of the pod's VMM and of its front end, on the host";
    PROCESS_RSS = "process_resident_memory_bytes", Gauge, "Resident memory of the pod's VMM, with the guest's, and of its front end";
    PROCESS_FDS = "process_open_fds", Gauge, "Open descriptors of the pod's VMM and of its front end";
    CPU = "container_cpu_seconds_total", Counter, "Processor time of the container in the guest";
    THROTTLED = "container_cpu_throttled_seconds_total", Counter, "How long the container was held back by its processor quota";
    USAGE = "container_memory_usage_bytes", Gauge, "Memory of the container in the guest";
    LIMIT = "container_memory_limit_bytes", Gauge, "Memory limit of the container, where it has one";
    OOM = "container_oom_kills_total", Counter, "Processes of the container that the guest's OOM killer has ended";
    PIDS = "container_pids", Gauge, "Processes and threads of the container";
    READ = "container_io_read_bytes_total", Counter, "Bytes the container has read from block devices";
    WRITTEN = "container_io_write_bytes_total", Counter, "Bytes the container has written to block devices";
    NODE_SANDBOXES = "node_sandboxes", Gauge, "Sandboxes of this host by status";
    NODE_UNREAD = "node_unread_sandboxes", Gauge, "Sandboxes that run and did not give their metrics in time";
}

/// Text that is being put together, family by family.
#[derive(Debug, Default)]
pub struct Metrics {
    samples: BTreeMap<&'static str, String>,
    common: String,
}

impl Metrics {
    /// Each sample has these labels first.
    pub fn labelled(labels: &[(&str, &str)]) -> Self {
        Self {
            samples: BTreeMap::new(),
            common: pairs(labels),
        }
    }

    /// Adds a sample.
    pub fn add(&mut self, family: &Family, labels: &[(&str, &str)], value: f64) {
        let own = pairs(labels);
        let comma = match self.common.is_empty() || own.is_empty() {
            true => "",
            false => ",",
        };
        let text = self.samples.entry(family.name).or_default();
        let labels = format!("{}{comma}{own}", self.common);
        // Writing to a string does not fail.
        let _ = match labels.is_empty() {
            true => writeln!(text, "bulkhead_{} {value}", family.name),
            false => writeln!(text, "bulkhead_{}{{{labels}}} {value}", family.name),
        };
    }

    /// Adds the samples of another text, as [`Metrics`] has written it. What
    /// is not of a family known here is left out.
    pub fn merge(&mut self, text: &str) {
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some(name) = line.split(['{', ' ']).next() else {
                continue;
            };
            let name = name.strip_prefix("bulkhead_").unwrap_or_default();
            if let Some(family) = ALL.iter().find(|family| family.name == name) {
                let text = self.samples.entry(family.name).or_default();
                text.push_str(line);
                text.push('\n');
            }
        }
    }
}

fn pairs(labels: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
        .collect();
    pairs.join(",")
}

/// As the format wants it: a value is on one line, and ends at its quote.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for family in ALL {
            let Some(samples) = self.samples.get(family.name) else {
                continue;
            };
            let kind = match family.kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
            };
            let (name, help) = (family.name, family.help);
            writeln!(f, "# HELP bulkhead_{name} {help}.")?;
            writeln!(f, "# TYPE bulkhead_{name} {kind}")?;
            f.write_str(samples)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_prometheus_wants_them() {
        for family in ALL {
            assert_eq!(
                family.name.ends_with("_total"),
                family.kind == Kind::Counter,
                "{}",
                family.name
            );
            assert!(family
                .name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b == b'_'));
            assert!(!family.help.ends_with('.'));
            assert_eq!(
                ALL.iter().filter(|other| other.name == family.name).count(),
                1
            );
        }
    }

    #[test]
    fn families_are_told_once_with_all_their_samples() {
        let pod = |name: &str| {
            let mut metrics = Metrics::labelled(&[("namespace", "k8s.io"), ("sandbox", name)]);
            metrics.add(&UP, &[], 1.0);
            metrics.add(&CPU, &[("container", "c")], 1.5);
            metrics.to_string()
        };
        let mut node = Metrics::default();
        node.merge(&pod("a"));
        node.merge(&pod("b"));
        node.merge("bulkhead_unheard_of 1\nother 2\n");
        node.add(&NODE_UNREAD, &[], 0.0);
        assert_eq!(
            node.to_string(),
            "# HELP bulkhead_sandbox_up Whether the pod's virtual machine runs.\n\
             # TYPE bulkhead_sandbox_up gauge\n\
             bulkhead_sandbox_up{namespace=\"k8s.io\",sandbox=\"a\"} 1\n\
             bulkhead_sandbox_up{namespace=\"k8s.io\",sandbox=\"b\"} 1\n\
             # HELP bulkhead_container_cpu_seconds_total Processor time of the container in the guest.\n\
             # TYPE bulkhead_container_cpu_seconds_total counter\n\
             bulkhead_container_cpu_seconds_total{namespace=\"k8s.io\",sandbox=\"a\",container=\"c\"} 1.5\n\
             bulkhead_container_cpu_seconds_total{namespace=\"k8s.io\",sandbox=\"b\",container=\"c\"} 1.5\n\
             # HELP bulkhead_node_unread_sandboxes Sandboxes that run and did not give their metrics in time.\n\
             # TYPE bulkhead_node_unread_sandboxes gauge\n\
             bulkhead_node_unread_sandboxes 0\n"
        );
    }

    #[test]
    fn a_label_cannot_forge_a_line() {
        let mut metrics = Metrics::default();
        metrics.add(&UP, &[("x", "a\"} 1\nb\\")], 1.0);
        let text = metrics.to_string();
        assert!(text.ends_with("{x=\"a\\\"} 1\\nb\\\\\"} 1\n"), "{text}");
    }
}
