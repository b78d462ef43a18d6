// SPDX-License-Identifier: Apache-2.0
//! A pod as it is told to an operator.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{clock::Utc, sandbox::Status};

/// A pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// containerd's namespace, or what stands for it.
    pub namespace: String,
    /// Its id.
    pub sandbox: String,
    /// The process that runs it: the shim, or `bulkhead run`.
    pub pid: u32,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Why the virtual machine has ended; none: it runs.
    pub ended: Option<String>,
    /// When each step of its start was done.
    pub start: Start,
    /// Its containers, by id.
    pub containers: Vec<ContainerState>,
}

/// The start's timeline: milliseconds since the front end was started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// The VMM's program runs.
    pub vmm_start_ms: Option<f64>,
    /// The guest kernel's first instruction.
    pub kernel_entry_ms: Option<f64>,
    /// The guest's agent has called.
    pub agent_ready_ms: Option<f64>,
    /// The guest is set up.
    pub sandbox_ready_ms: Option<f64>,
    /// The first container's program runs.
    pub container_started_ms: Option<f64>,
    /// It has written its first byte, or has ended.
    pub first_output_ms: Option<f64>,
}

impl Start {
    /// The steps in their order, by name.
    pub fn steps(&self) -> [(&'static str, Option<f64>); 6] {
        [
            ("vmm_start", self.vmm_start_ms),
            ("kernel_entry", self.kernel_entry_ms),
            ("agent_ready", self.agent_ready_ms),
            ("sandbox_ready", self.sandbox_ready_ms),
            ("container_started", self.container_started_ms),
            ("first_output", self.first_output_ms),
        ]
    }
}

/// A container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub id: String,
    /// `creating`, `created`, `running`, `paused`, `pausing`, `stopped` or
    /// `deleting`.
    pub status: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Exit code, or 128 + signal, once it is stopped.
    pub exit_status: Option<u32>,
    /// When it ended: RFC 3339, UTC.
    pub exited_at: Option<String>,
    /// Its further processes, by id.
    pub execs: Vec<ExecState>,
}

/// A further process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecState {
    /// Its id.
    pub id: String,
    /// `created`, `running` or `stopped`.
    pub status: String,
    /// Exit code, or 128 + signal, once it is stopped.
    pub exit_status: Option<u32>,
}

/// A status as it is told.
pub(crate) fn status(status: Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Running => "running",
        Status::Stopped => "stopped",
        Status::Paused => "paused",
        Status::Pausing => "pausing",
    }
}

/// A time as it is told.
pub(crate) fn time(at: std::time::SystemTime) -> String {
    Utc(at).to_string()
}
