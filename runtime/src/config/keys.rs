// SPDX-License-Identifier: Apache-2.0
//! Every key of the configuration: its type and bounds, what it says, and
//! whether a pod's annotation can be allowed to set it.

use std::ops::RangeInclusive;

use toml::Value;

use super::{field::Field, Config, MEMORY_MIB, VCPUS};
use crate::{fault, oci::annotation_names, spans};

/// Longest accepted deadline: an hour.
const MS: RangeInclusive<u64> = 1..=3_600_000;

/// Any number that fits the key's type.
const ANY: RangeInclusive<u64> = 0..=u64::MAX;

/// One key.
pub struct Key {
    /// With its section, as in `hypervisor.vcpus`.
    pub name: &'static str,
    /// What it says, in one sentence.
    pub help: &'static str,
    /// Bounds of a number.
    pub bounds: RangeInclusive<u64>,
    /// Whether `io.bulkhead.NAME` can be allowed to pods: nothing that names
    /// files or programs of the host, or concerns others than the pod.
    pub annotation: bool,
    check: fn(&Value) -> Result<(), String>,
    get: fn(&Config) -> Value,
    set: fn(&mut Config, &Value) -> Result<(), String>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

macro_rules! keys {
    ($($section:ident . $field:ident, $bounds:expr, $check:expr, $annotation:literal, $help:literal;)+) => {
        /// All keys, in the order in which they are told.
        pub static KEYS: &[Key] = &[$(Key {
            name: concat!(stringify!($section), ".", stringify!($field)),
            help: $help,
            bounds: $bounds,
            annotation: $annotation,
            check: $check,
            get: |config| config.$section.$field.show(),
            set: |config, value| config.$section.$field.put(value),
        },)+];
    };
}

keys! {
    hypervisor.path, ANY, any, false, "The VMM's binary.";
    hypervisor.kernel, ANY, any, false, "The guest kernel: an ELF image with a PVH note, or a bzImage.";
    hypervisor.image, ANY, any, false, "The guest image: EROFS, its size a multiple of 2 MiB.";
    hypervisor.vcpus, VCPUS, any, true, "Virtual processors of a pod without a processor limit.";
    hypervisor.memory_mib, MEMORY_MIB, any, true, "Guest memory of a pod without a memory limit, in MiB.";
    hypervisor.max_vcpus, VCPUS, any, false, "Most virtual processors of a pod, whatever its limits say.";
    hypervisor.max_memory_mib, MEMORY_MIB, any, false, "Most guest memory of a pod, in MiB; one that asks for more is refused.";
    hypervisor.extra_vcpus, 0..=*VCPUS.end(), any, true, "Virtual processors that a running pod gets when its limits are raised, beyond those it starts with.";
    hypervisor.extra_memory_mib, 0..=*MEMORY_MIB.end(), any, true, "Guest memory that a running pod gets when its limits are raised, beyond what it starts with, in MiB.";
    hypervisor.overhead_mib, 16..=4096, any, false, "What the guest's kernel and agent get beside a pod's memory limit, in MiB.";
    hypervisor.pages, ANY, any, true, "What guest memory is in: small pages; transparent huge ones where the host has some, a little faster, 2 MiB for each page touched; or huge ones that the host has reserved (vm.nr_hugepages), all of them the pod's from its start to its end.";
    hypervisor.free_page_reporting, ANY, any, true, "Have the guest give back memory that it does not use.";
    hypervisor.dax_mib, 0..=16_384, any, true, "Window, in MiB, through which containers have shared files from the host's page cache instead of copies; each 64 MiB of it take 1 MiB of guest memory. 0: none.";
    hypervisor.host_locks, ANY, any, true, "Lock files of volumes on the host when containers lock them (fcntl, flock), so that other pods and the host are kept out; each lock takes a request then.";
    hypervisor.vhost_net, ANY, any, false, "Have the host's kernel move packets between pods and their taps (/dev/vhost-net), instead of the jailed VMM.";
    hypervisor.merge_group, ANY, any, true, "Pods with the same name here may share identical pages (KSM); empty: none.";
    hypervisor.allowed_merge_groups, ANY, any, false, "Further groups that a pod's annotation may choose.";
    hypervisor.kernel_params, ANY, one_line, true, "Appended to the guest's command line.";
    hypervisor.stop_timeout_ms, MS, any, false, "How long the VMM may take to stop before it is killed.";
    agent.ready_timeout_ms, MS, any, true, "How long the guest may take until its agent calls.";
    agent.rpc_timeout_ms, MS, any, true, "How long the agent may take to answer.";
    agent.long_call_factor, 1..=100, any, false, "Calls that make or take apart containers and processes may take longer by this factor.";
    agent.stream_timeout_ms, MS, any, false, "How long the guest may take to open a process's standard stream.";
    agent.health_interval_ms, 0..=3_600_000, any, true, "How often the agent is asked whether it is there; 0: never.";
    agent.health_failures, 1..=1000, any, false, "How many such questions in a row without an answer end the virtual machine.";
    agent.debug_shell, ANY, absolute, false, "A static program of the host (busybox) with which `bulkhead exec --guest` runs commands in the guest itself; empty: never.";
    runtime.state_dir, ANY, any, false, "Where sandboxes keep their state: on a tmpfs, a short path.";
    runtime.log_level, ANY, any, false, "What is logged: error, warn, info, debug or trace.";
    runtime.log_kept_kib, 0..=65_536, any, false, "How much of a shim's log is kept beside the pod, for `bulkhead logs`.";
    runtime.guest_console, ANY, absolute, false, "Prefix of the files for guests' consoles, the pod's id follows, 16 MiB of each at most; empty: the end is kept in memory.";
    runtime.console_kept_kib, 1..=1024, any, false, "How much of a guest's console is kept in memory.";
    runtime.events_kept, 0..=10_000, any, false, "How many events of a pod are kept for `bulkhead events`.";
    runtime.watched_directories, 0..=1_048_576, any, false, "How many directories of a pod's volumes are watched for changes of the host's, which are told to programs in the guest that watch them; 0: none.";
    runtime.otlp_endpoint, ANY, collector, false, "A collector of OpenTelemetry spans, OTLP over HTTP, as http://127.0.0.1:4318; empty: none.";
    runtime.operator_socket, ANY, any, false, "Answer questions about a pod (metrics, state, events) on a socket beside its state.";
    runtime.allowed_annotations, ANY, annotations, false, "The annotations that a pod may set.";
    runtime.sandbox_cgroup_only, ANY, any, false, "Whether a pod's front end is in the pod's cgroup on the host, as its VMM is.";
    runtime.overhead_cgroup, ANY, absolute, false, "Where it has a cgroup of its own otherwise: `NAMESPACE-ID` below this path.";
    runtime.output_timeout_ms, MS, any, false, "How long output may take to be taken before its container or process is deleted.";
    runtime.kill_timeout_ms, MS, any, false, "How long a killed container may take to be gone.";
    runtime.execs_timeout_ms, MS, any, false, "How long a container's end waits for those of its further processes.";
    shim.uncalled_timeout_ms, MS, any, false, "How long a shim stays that nobody has ever called.";
    shim.pids_timeout_ms, MS, any, false, "How long the guest may take to list a container's processes.";
    shim.event_queue, 16..=65_536, any, false, "Events that wait for containerd at most; the oldest goes when there are more.";
    shim.event_timeout_ms, MS, any, false, "How long containerd may take to take an event.";
    shim.last_events_timeout_ms, MS, any, false, "How long a shim that ends waits for its last events to be taken.";
    ksm.socket, ANY, absolute, false, "Where the KSM throttler listens; empty: ksm.sock in runtime.state_dir.";
    debug.fail_at, ANY, step, false, "For tests: the step of a pod's start that fails.";
    debug.crash_at, ANY, step, false, "For tests: the step of a pod's start at which the shim dies.";
}

impl Key {
    /// The key of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Its value.
    pub fn get(&self, config: &Config) -> Value {
        (self.get)(config)
    }

    /// Sets it.
    ///
    /// # Errors
    /// What is wrong with the value, and what would be right; nothing is
    /// changed then.
    pub fn set(&self, config: &mut Config, value: &Value) -> Result<(), String> {
        if let Value::Integer(number) = value {
            let fits = u64::try_from(*number).is_ok_and(|number| self.bounds.contains(&number));
            if !fits {
                let (low, high) = (self.bounds.start(), self.bounds.end());
                return Err(format!("{number} is not within {low} to {high}"));
            }
        }
        (self.check)(value)?;
        (self.set)(config, value)
    }

    /// Sets it to what a text says.
    ///
    /// # Errors
    /// As [`Key::set`].
    pub fn set_text(&self, config: &mut Config, text: &str) -> Result<(), String> {
        let trimmed = text.trim();
        let value = match self.get(config) {
            Value::Integer(_) => Value::Integer(trimmed.parse().map_err(|_| {
                let (low, high) = (self.bounds.start(), self.bounds.end());
                format!("{text:?} is not a whole number from {low} to {high}")
            })?),
            Value::Boolean(_) => Value::Boolean(
                trimmed
                    .parse()
                    .map_err(|_| format!("{text:?} is neither true nor false"))?,
            ),
            _ => Value::String(text.into()),
        };
        self.set(config, &value)
    }
}

fn any(_: &Value) -> Result<(), String> {
    Ok(())
}

fn one_line(value: &Value) -> Result<(), String> {
    match value.as_str() {
        Some(text) if text.contains(['\n', '\0']) => Err("contains a line break or NUL".into()),
        _ => Ok(()),
    }
}

fn collector(value: &Value) -> Result<(), String> {
    match value.as_str() {
        Some(url) if !url.is_empty() => {
            let problem = "is not an address as http://127.0.0.1:4318 (https is not spoken: name a collector on this node)";
            spans::check_endpoint(url).map_err(|_| format!("{url:?} {problem}"))
        }
        _ => Ok(()),
    }
}

fn absolute(value: &Value) -> Result<(), String> {
    match value.as_str() {
        Some(text) if !text.is_empty() && !text.starts_with('/') => {
            Err(format!("{text:?} is not an absolute path"))
        }
        _ => Ok(()),
    }
}

fn step(value: &Value) -> Result<(), String> {
    match value.as_str() {
        Some(text) if !text.is_empty() => text
            .parse::<fault::Step>()
            .map(drop)
            .map_err(|error| error.to_string()),
        _ => Ok(()),
    }
}

fn annotations(value: &Value) -> Result<(), String> {
    let names = annotation_names();
    for name in value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !names.iter().any(|known| known == name) {
            return Err(format!("{name:?} is none of: {}", names.join(", ")));
        }
    }
    Ok(())
}
