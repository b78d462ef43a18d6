// SPDX-License-Identifier: Apache-2.0
//! Why KSM cannot be looked at or steered. Every message names the path, and
//! the remedy where there is one.

use std::{io, path::PathBuf};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum KsmError {
    /// The kernel has no KSM, or /sys is not there.
    #[error(
        "this kernel has no page merging: {} does not exist; run a kernel built with CONFIG_KSM=y, and mount sysfs on /sys",
        path.display()
    )]
    Missing {
        /// KSM's directory.
        path: PathBuf,
    },
    /// A setting cannot be changed.
    #[error(
        "{} is not writable; run as root, and where /sys can be written (in a container: a privileged one)",
        path.display()
    )]
    NotWritable {
        /// The setting's file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file does not say what it should.
    #[error("{} says {text:?}, which is not understood", path.display())]
    Unexpected {
        /// Which.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// A setting did not take a value.
    #[error("{} does not take {value:?}", path.display())]
    Write {
        /// The setting's file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel's merging thread is not to be seen, so its processor time
    /// cannot be bounded.
    #[error(
        "no process named ksmd in {}; run in the host's PID namespace, with /proc mounted without hidepid",
        proc.display()
    )]
    NoKsmd {
        /// Where processes were looked for.
        proc: PathBuf,
    },
    /// The file with the values found cannot be used.
    #[error(
        "{} is damaged ({problem}); set {} as you want it, then remove the file",
        path.display(), ksm.display()
    )]
    BadState {
        /// The file.
        path: PathBuf,
        /// KSM's directory.
        ksm: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The file with the values found cannot be kept.
    #[error("{} cannot be written, and without it a crash would lose the settings found", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another daemon runs.
    #[error("another bulkhead-ksm-throttler runs: it holds {}; stop that one first", path.display())]
    Running {
        /// The lock's file.
        path: PathBuf,
    },
    /// A socket cannot be set up.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Another system call failed.
    #[error("cannot {step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
