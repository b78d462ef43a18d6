// SPDX-License-Identifier: Apache-2.0
//! The configuration: TOML, `/etc/bulkhead/config.toml` or what
//! `BULKHEAD_CONFIG` names, then `config.d/*.toml` beside it in the order of
//! their names. A later file overrides single keys of an earlier one.

mod field;
mod file;
mod keys;
mod sections;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};

use toml::Table;

pub(crate) use self::file::nearest;
pub use self::keys::{Key, KEYS};
pub use self::sections::*;

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
    /// `[shim]`.
    pub shim: Shim,
    /// `[ksm]`.
    pub ksm: Ksm,
    /// `[debug]`.
    pub debug: Debug,
}

impl Config {
    /// Where the KSM throttler listens.
    pub fn ksm_socket(&self) -> PathBuf {
        match self.ksm.socket.as_str() {
            "" => self.runtime.state_dir.join("ksm.sock"),
            path => path.into(),
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
        key: String,
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
        Loaded::load(explicit).map(|loaded| loaded.config)
    }

    /// Overrides what a TOML table says that a client has sent; `from` names it
    /// in errors.
    ///
    /// # Errors
    /// As of a file.
    pub fn apply(&mut self, from: &str, table: &Table) -> Result<(), ConfigError> {
        file::apply_table(self, Path::new(from), table).map(drop)
    }
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nothing says otherwise.
    Default,
    /// This file says so.
    File(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A configuration with its origins.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// What is in force.
    pub config: Config,
    /// The files that were read, in their order.
    pub files: Vec<PathBuf>,
    origins: BTreeMap<&'static str, PathBuf>,
}

impl Loaded {
    /// Reads the configuration as [`Config::load`] does.
    ///
    /// # Errors
    /// As [`Config::load`].
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
        let mut loaded = Self::default();
        match loaded.add(path) {
            Err(ConfigError::Read { source, .. })
                if !required && source.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        for path in drop_ins(path)? {
            loaded.add(&path)?;
        }
        Ok(loaded)
    }

    fn add(&mut self, path: &Path) -> Result<(), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        for key in file::apply(&mut self.config, path, &text)? {
            self.origins.insert(key.name, path.into());
        }
        self.files.push(path.into());
        Ok(())
    }

    /// Where a key's value comes from.
    pub fn origin(&self, key: &Key) -> Origin {
        match self.origins.get(key.name) {
            Some(path) => Origin::File(path.clone()),
            None => Origin::Default,
        }
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
