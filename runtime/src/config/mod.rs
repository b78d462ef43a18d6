// SPDX-License-Identifier: Apache-2.0
//! The configuration: TOML, `/etc/bulkhead/config.toml` or what
//! `BULKHEAD_CONFIG` names, then `config.d/*.toml` beside it in the order of
//! their names. A later file overrides single keys of an earlier one.

mod file;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_ksm_throttler::group::Name;
use serde::Deserialize;

use self::file::File;

/// Where the configuration is unless told otherwise. It need not exist.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// The environment variable that names another file, which must exist.
pub const ENVIRONMENT: &str = "BULKHEAD_CONFIG";

/// Directory of further files, beside the configuration.
const DROP_IN_DIR: &str = "config.d";

/// Bounds of `hypervisor.vcpus`.
pub const VCPUS: std::ops::RangeInclusive<u64> = 1..=64;

/// Bounds of `hypervisor.memory_mib`, MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 48..=1_048_576;

/// Everything that can be configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// `[hypervisor]`.
    pub hypervisor: Hypervisor,
    /// `[agent]`.
    pub agent: Agent,
    /// `[runtime]`.
    pub runtime: Runtime,
}

/// `[hypervisor]`: the virtual machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// The VMM's binary.
    pub path: PathBuf,
    /// The guest kernel: an uncompressed ELF image with a PVH note.
    pub kernel: PathBuf,
    /// The guest image: EROFS, its size a multiple of 2 MiB.
    pub image: PathBuf,
    /// Virtual processors where nothing else says how many.
    pub vcpus: u8,
    /// Guest memory in MiB where nothing else says how much.
    pub memory_mib: u32,
    /// Whether the host may back all of it by transparent huge pages: a little
    /// faster, at the price of 2 MiB for every page that the guest touches.
    pub huge_pages: bool,
    /// Whether the guest tells which memory it does not use, so that the host
    /// has it back (virtio-balloon).
    pub free_page_reporting: bool,
    /// The pods among which the host may merge identical pages of memory (KSM);
    /// none: no pod's memory is merged unless its annotation says so.
    pub merge_group: Option<Name>,
    /// Further groups that a pod's annotation may name.
    pub allowed_merge_groups: Vec<Name>,
    /// Appended to the guest's command line.
    pub kernel_params: String,
}

/// `[agent]`: talking to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// How long the guest may take until its agent calls, in milliseconds.
    pub ready_timeout_ms: u64,
    /// How long the agent may take to answer, in milliseconds.
    pub rpc_timeout_ms: u64,
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
    /// id follows; empty: only the end is kept in memory, for the error when a
    /// guest dies.
    pub guest_console: String,
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
            huge_pages: false,
            free_page_reporting: true,
            merge_group: None,
            allowed_merge_groups: Vec::new(),
            kernel_params: String::new(),
        }
    }
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            ready_timeout_ms: 30_000,
            rpc_timeout_ms: 10_000,
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
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            state_dir: "/run/bulkhead".into(),
            log_level: LogLevel::Info,
            guest_console: String::new(),
        }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or directory cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file is not TOML, or a value has the wrong type; the source tells
    /// line, column and key.
    #[error("{}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// There is no such key.
    #[error("{}: unknown key {key:?}{}", path.display(), hint(nearest))]
    UnknownKey {
        /// In which file.
        path: PathBuf,
        /// With its section.
        key: String,
        /// A known key that is spelled alike.
        nearest: Option<String>,
    },
    /// A value is out of its range.
    #[error("{}: {key}: {problem}", path.display())]
    BadValue {
        /// In which file.
        path: PathBuf,
        /// With its section.
        key: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

fn hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map_or_else(String::new, |key| format!(" (did you mean {key:?}?)"))
}

impl Config {
    /// Reads the configuration: `explicit`, else what `BULKHEAD_CONFIG`
    /// names, else [`DEFAULT_PATH`] where it exists; then the drop-ins.
    ///
    /// # Errors
    /// Each names the file, and the key where there is one.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        let named = explicit.map(PathBuf::from).or_else(|| {
            std::env::var_os(ENVIRONMENT)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        });
        let required = named.is_some();
        let path = named.unwrap_or_else(|| DEFAULT_PATH.into());
        Self::load_from(&path, required)
    }

    fn load_from(path: &Path, required: bool) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        match File::read(path) {
            Ok(file) => file.apply(&mut config),
            Err(ConfigError::Read { source, .. })
                if !required && source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        for path in drop_ins(path)? {
            File::read(&path)?.apply(&mut config);
        }
        Ok(config)
    }
}

/// The files of `config.d` beside `path`, in order.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let dir = path.with_file_name(DROP_IN_DIR);
    let read = |source| ConfigError::Read {
        path: dir.clone(),
        source,
    };
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
