// SPDX-License-Identifier: Apache-2.0
//! What callers of [`Sandbox`](super::Sandbox) give and get.

use std::{path::PathBuf, time::SystemTime};

use oci_spec::runtime::Spec;

use crate::io::{Stdio, StdioPaths};

/// A pod to be started.
#[derive(Debug, Clone)]
pub struct SandboxRequest {
    /// The caller's namespace (containerd's), part of the identity.
    pub namespace: String,
    /// The pod's id, unique in the namespace.
    pub id: String,
    /// Bundle of the first container: its config.json tells the pod's network
    /// namespace, host name, sysctls, size and cgroup.
    pub bundle: PathBuf,
    /// The same of a pod that has no container of its own to stand for it, as
    /// with containerd's sandbox API. The bundle has no config.json then.
    pub pod: Option<PodSpec>,
    /// CLOCK_MONOTONIC in microseconds when the front end was started, the
    /// zero of the start timeline.
    pub shim_start_us: u64,
    /// Where the front end's task service is; none: it has none.
    pub task_socket: Option<PathBuf>,
}

/// What is known of a pod that no container stands for.
#[derive(Debug, Clone, Default)]
pub struct PodSpec {
    /// Its network namespace, host name, sysctls, size and cgroup.
    pub spec: Spec,
    /// Contents of files that each of its containers has, unless its
    /// specification mounts something there: absolute paths in a container,
    /// and what is in them.
    pub files: Vec<(PathBuf, String)>,
}

/// A container to be created.
#[derive(Debug)]
pub struct CreateRequest {
    /// Its id, unique in the pod.
    pub id: String,
    /// Directory of config.json.
    pub bundle: PathBuf,
    /// Mounts that make the root file system, in order; none: `root.path` of
    /// config.json.
    pub rootfs: Vec<RootfsMount>,
    /// Its first process's streams.
    pub stdio: Stdio,
}

/// One mount of a root file system, as containerd's snapshotters describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// `overlay`, `bind`, ...
    pub fs_type: String,
    /// What is mounted.
    pub source: String,
    /// Path inside the root file system; empty: the root itself.
    pub target: String,
    /// As mount(8) takes them.
    pub options: Vec<String>,
}

/// Status of a container or process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Exists and waits to be started.
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Stopped,
    /// Frozen.
    Paused,
    /// About to be frozen.
    Pausing,
}

/// State of a container's first process, or of a further one.
#[derive(Debug, Clone)]
pub struct ProcessState {
    /// The container's or the process's id.
    pub id: String,
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The process that stands for it on the host: the virtual machine's. 0
    /// for a further process that has not been started.
    pub pid: u32,
    /// Where it is in its life.
    pub status: Status,
    /// Exit code or 128 + signal; meaningful when stopped.
    pub exit_status: u32,
    /// When it ended.
    pub exited_at: Option<SystemTime>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Names of its streams.
    pub stdio: StdioPaths,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What is left of a deleted container or process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deleted {
    /// The process that stood for it on the host.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

/// What happens in a sandbox, in the order in which containerd's runtime v2
/// document wants it told: `Created`, `Started`, `Exited`, `Deleted` for each
/// process, and a container's own `Exited` after those of its further
/// processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A container was created.
    Created {
        /// Its id.
        id: String,
        /// Its bundle.
        bundle: PathBuf,
        /// Its root file system's mounts, as given.
        rootfs: Vec<RootfsMount>,
        /// Names of its streams.
        stdio: StdioPaths,
        /// Whether it has a terminal.
        terminal: bool,
        /// The process that stands for it on the host.
        pid: u32,
    },
    /// A process runs.
    Started {
        /// Its container.
        id: String,
        /// Its own id; none: the container's first process.
        exec: Option<String>,
        /// The process that stands for it on the host.
        pid: u32,
    },
    /// A further process was described, to be started later.
    ExecAdded {
        /// Its container.
        id: String,
        /// Its own id.
        exec: String,
    },
    /// A process has ended. Exactly once for each that was started, and for a
    /// container that was killed before it was.
    Exited {
        /// Its container.
        id: String,
        /// Its own id; none: the container's first process.
        exec: Option<String>,
        /// The process that stood for it on the host.
        pid: u32,
        /// Exit code, or 128 + signal.
        status: u32,
        /// When.
        at: SystemTime,
    },
    /// The guest's OOM killer ended a process of the container; comes before
    /// its exit.
    Oom {
        /// The container.
        id: String,
    },
    /// A container was frozen.
    Paused {
        /// Its id.
        id: String,
    },
    /// A container goes on.
    Resumed {
        /// Its id.
        id: String,
    },
    /// A container or process was deleted.
    Deleted {
        /// The container.
        id: String,
        /// The process's id; none: the container.
        exec: Option<String>,
        /// The process that stood for it on the host.
        pid: u32,
        /// Exit code, or 128 + signal.
        status: u32,
        /// When it ended.
        at: SystemTime,
    },
}
