// SPDX-License-Identifier: Apache-2.0
//! The configuration's sections, and what holds where no file says anything.

use std::{path::PathBuf, time::Duration};

use bulkhead_ksm_throttler::group::Name;
use bulkhead_vmm_api::Pages;
use serde::Deserialize;

use crate::fault;

/// `[hypervisor]`: the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// The VMM's binary.
    pub path: PathBuf,
    /// The guest kernel: an ELF image with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// The guest image: EROFS, its size a multiple of 2 MiB.
    pub image: PathBuf,
    /// Virtual processors where nothing else says how many.
    pub vcpus: u8,
    /// Guest memory in MiB where nothing else says how much.
    pub memory_mib: u32,
    /// Most virtual processors.
    pub max_vcpus: u8,
    /// Most guest memory, MiB.
    pub max_memory_mib: u32,
    /// Virtual processors beyond those that a pod starts with, for when its
    /// limits are raised.
    pub extra_vcpus: u8,
    /// Guest memory beyond what a pod starts with, for when its limits are
    /// raised, MiB.
    pub extra_memory_mib: u32,
    /// What the guest's kernel and agent need beside the containers, MiB.
    pub overhead_mib: u32,
    /// Which of the host's pages it is in.
    pub pages: Pages,
    /// Whether the guest tells which memory it does not use, so that the host
    /// has it back (virtio-balloon).
    pub free_page_reporting: bool,
    /// Guest addresses by which containers have the files of shared directories
    /// from the host's page cache instead of copies of their own (the DAX window
    /// of virtio-fs), MiB.
    pub dax_mib: u32,
    /// Whether what containers lock in shared directories is locked on the host.
    pub host_locks: bool,
    /// Whether the host's kernel moves packets between pods and their taps
    /// (/dev/vhost-net), instead of the jailed VMM.
    pub vhost_net: bool,
    /// The pods among which the host may merge identical pages of memory (KSM);
    /// none: no pod's memory is merged unless its annotation says so.
    pub merge_group: Option<Name>,
    /// Further groups that a pod's annotation may name.
    pub allowed_merge_groups: Vec<Name>,
    /// Appended to the guest's command line.
    pub kernel_params: String,
    /// How long the VMM may take to stop before it is killed, in milliseconds.
    pub stop_timeout_ms: u64,
}

/// `[agent]`: talking to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// How long the guest may take until its agent calls, in milliseconds.
    pub ready_timeout_ms: u64,
    /// How long the agent may take to answer, in milliseconds.
    pub rpc_timeout_ms: u64,
    /// By how much longer making or taking apart something may take: it
    /// touches many files of an image for the first time.
    pub long_call_factor: u32,
    /// How long the guest may take to open a stream, in milliseconds.
    pub stream_timeout_ms: u64,
    /// How often the agent is asked whether it is there, in milliseconds; 0:
    /// never.
    pub health_interval_ms: u64,
    /// How many such questions in a row may stay without an answer.
    pub health_failures: u32,
    /// The host's static program with which commands are run in the guest
    /// itself; empty: never.
    pub debug_shell: String,
}

/// `[runtime]`: the host's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Where sandboxes keep their state. On a tmpfs; Unix sockets are made
    /// below it, so the path is to be short.
    pub state_dir: PathBuf,
    /// What is logged.
    pub log_level: LogLevel,
    /// Prefix of the files that guests' consoles are written to, the sandbox's
    /// id follows, 16 MiB of each at most; empty: only the end is kept in memory,
    /// for the error when a guest dies.
    pub guest_console: String,
    /// How much of that end is kept, KiB.
    pub console_kept_kib: usize,
    /// How much of the front end's log is kept beside the pod's state, KiB.
    pub log_kept_kib: u64,
    /// How many events are kept.
    pub events_kept: usize,
    /// How many directories of a pod's volumes are watched for changes of the
    /// host's.
    pub watched_directories: usize,
    /// A collector of OpenTelemetry spans; empty: none. Read from the host's
    /// configuration.
    pub otlp_endpoint: String,
    /// Whether there is a socket for the operator.
    pub operator_socket: bool,
    /// Names of the annotations that a pod may set.
    pub allowed_annotations: Vec<String>,
    /// Whether a pod's front end is in the pod's cgroup, as its VMM is.
    pub sandbox_cgroup_only: bool,
    /// The cgroup below which it has one of its own otherwise.
    pub overhead_cgroup: String,
    /// How long output may take to be taken before its container or process is
    /// deleted, in milliseconds.
    pub output_timeout_ms: u64,
    /// How long a killed container may take to be gone, in milliseconds.
    pub kill_timeout_ms: u64,
    /// How long a container's end waits for those of its further processes, in
    /// milliseconds.
    pub execs_timeout_ms: u64,
}

/// `[shim]`: towards containerd. Read from the host's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shim {
    /// How long a shim stays that nobody has ever called, in milliseconds.
    pub uncalled_timeout_ms: u64,
    /// How long the guest may take to list processes, in milliseconds.
    pub pids_timeout_ms: u64,
    /// Events that wait at most.
    pub event_queue: usize,
    /// How long containerd may take to take one, in milliseconds.
    pub event_timeout_ms: u64,
    /// How long a shim that ends waits for the last ones, in milliseconds.
    pub last_events_timeout_ms: u64,
}

/// `[ksm]`: page merging.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ksm {
    /// The daemon's socket; empty: the one in the state directory.
    pub socket: String,
}

/// `[debug]`: for tests of this program.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Debug {
    /// The step of a pod's start that fails; empty: none.
    pub fail_at: String,
    /// The step of a pod's start at which the process dies; empty: none.
    pub crash_at: String,
}

impl Debug {
    /// The step that is to go wrong, and how.
    pub fn fault(&self) -> fault::Fault {
        // Both were checked: what is no step is empty.
        fault::Fault {
            fail: self.fail_at.parse().ok(),
            crash: self.crash_at.parse().ok(),
        }
    }
}

impl Default for Shim {
    fn default() -> Self {
        Self {
            uncalled_timeout_ms: 120_000,
            pids_timeout_ms: 2000,
            event_queue: 2048,
            event_timeout_ms: 5000,
            last_events_timeout_ms: 2000,
        }
    }
}

/// `runtime.log_level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What went wrong.
    Error,
    /// And what may be wrong.
    Warn,
    /// And what happened.
    Info,
    /// And why.
    Debug,
    /// And everything else.
    Trace,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self {
            path: "/usr/local/bin/bulkhead-vmm".into(),
            kernel: "/usr/local/share/bulkhead/vmlinux".into(),
            image: "/usr/local/share/bulkhead/rootfs.erofs".into(),
            vcpus: 1,
            memory_mib: 256,
            max_vcpus: 64,
            max_memory_mib: 1_048_576,
            extra_vcpus: 0,
            extra_memory_mib: 0,
            overhead_mib: 64,
            pages: Pages::Small,
            free_page_reporting: true,
            dax_mib: 0,
            host_locks: false,
            vhost_net: false,
            merge_group: None,
            allowed_merge_groups: Vec::new(),
            kernel_params: String::new(),
            stop_timeout_ms: 2000,
        }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            ready_timeout_ms: 30_000,
            rpc_timeout_ms: 10_000,
            long_call_factor: 3,
            stream_timeout_ms: 10_000,
            health_interval_ms: 10_000,
            health_failures: 3,
            debug_shell: String::new(),
        }
    }
}

impl Agent {
    /// How long the guest may take until its agent calls.
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_millis(self.ready_timeout_ms)
    }

    /// How long the agent may take to answer.
    pub fn rpc_timeout(&self) -> Duration {
        Duration::from_millis(self.rpc_timeout_ms)
    }

    /// How long the guest may take to open a stream.
    pub fn stream_timeout(&self) -> Duration {
        Duration::from_millis(self.stream_timeout_ms)
    }
}

impl Hypervisor {
    /// How long the VMM may take to stop.
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_millis(self.stop_timeout_ms)
    }
}

impl Runtime {
    /// How long output may take to be taken.
    pub fn output_timeout(&self) -> Duration {
        Duration::from_millis(self.output_timeout_ms)
    }

    /// How long a killed container may take to be gone.
    pub fn kill_timeout(&self) -> Duration {
        Duration::from_millis(self.kill_timeout_ms)
    }

    /// How long a container's end waits for those of its further processes.
    pub fn execs_timeout(&self) -> Duration {
        Duration::from_millis(self.execs_timeout_ms)
    }
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            state_dir: "/run/bulkhead".into(),
            log_level: LogLevel::Info,
            guest_console: String::new(),
            console_kept_kib: 8,
            log_kept_kib: 256,
            events_kept: 200,
            watched_directories: 1024,
            otlp_endpoint: String::new(),
            operator_socket: true,
            allowed_annotations: ["memory_mib", "vcpus"]
                .map(|key| format!("io.bulkhead.hypervisor.{key}"))
                .into(),
            sandbox_cgroup_only: true,
            overhead_cgroup: "/bulkhead_overhead".into(),
            output_timeout_ms: 10_000,
            kill_timeout_ms: 10_000,
            execs_timeout_ms: 2000,
        }
    }
}
