// SPDX-License-Identifier: Apache-2.0
//! One file of the configuration: any subset of the keys.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use bulkhead_ksm_throttler::group::{BadName, Name};
use serde::Deserialize;
use toml::Table;

use super::{Config, ConfigError, LogLevel, MEMORY_MIB, VCPUS};

/// Longest accepted deadline: an hour.
const TIMEOUT_MS: RangeInclusive<u64> = 1..=3_600_000;

/// Every key, by section.
const KNOWN: [(&str, &[&str]); 3] = [
    (
        "hypervisor",
        &[
            "path",
            "kernel",
            "image",
            "vcpus",
            "memory_mib",
            "huge_pages",
            "free_page_reporting",
            "merge_group",
            "allowed_merge_groups",
            "kernel_params",
        ],
    ),
    ("agent", &["ready_timeout_ms", "rpc_timeout_ms"]),
    ("runtime", &["state_dir", "log_level", "guest_console"]),
];

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    hypervisor: Hypervisor,
    agent: Agent,
    runtime: Runtime,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Hypervisor {
    path: Option<PathBuf>,
    kernel: Option<PathBuf>,
    image: Option<PathBuf>,
    vcpus: Option<u64>,
    memory_mib: Option<u64>,
    huge_pages: Option<bool>,
    free_page_reporting: Option<bool>,
    merge_group: Option<String>,
    allowed_merge_groups: Option<Vec<String>>,
    kernel_params: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Agent {
    ready_timeout_ms: Option<u64>,
    rpc_timeout_ms: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Runtime {
    state_dir: Option<PathBuf>,
    log_level: Option<LogLevel>,
    guest_console: Option<String>,
}

impl File {
    /// Reads and checks one file.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.into(),
            source,
        })?;
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let syntax = |source: toml::de::Error| ConfigError::Syntax {
            path: path.into(),
            source: Box::new(source),
        };
        let table: Table = text.parse().map_err(syntax)?;
        if let Some((key, nearest)) = unknown_key(&table) {
            return Err(ConfigError::UnknownKey {
                path: path.into(),
                key,
                nearest,
            });
        }
        let file: Self = toml::from_str(text).map_err(syntax)?;
        file.check()
            .map_err(|(key, problem)| ConfigError::BadValue {
                path: path.into(),
                key,
                problem,
            })?;
        Ok(file)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let paths = [
            ("hypervisor.path", &self.hypervisor.path),
            ("hypervisor.kernel", &self.hypervisor.kernel),
            ("hypervisor.image", &self.hypervisor.image),
            ("runtime.state_dir", &self.runtime.state_dir),
        ];
        for (key, value) in paths {
            if let Some(path) = value.as_ref().filter(|path| !path.is_absolute()) {
                return Err((key, format!("{path:?} is not an absolute path")));
            }
        }
        let numbers = [
            ("hypervisor.vcpus", self.hypervisor.vcpus, VCPUS),
            (
                "hypervisor.memory_mib",
                self.hypervisor.memory_mib,
                MEMORY_MIB,
            ),
            (
                "agent.ready_timeout_ms",
                self.agent.ready_timeout_ms,
                TIMEOUT_MS,
            ),
            (
                "agent.rpc_timeout_ms",
                self.agent.rpc_timeout_ms,
                TIMEOUT_MS,
            ),
        ];
        for (key, value, range) in numbers {
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let (low, high) = range.into_inner();
                return Err((key, format!("{value} is not within {low} to {high}")));
            }
        }
        let console = self.runtime.guest_console.as_deref().unwrap_or("");
        if !console.is_empty() && !console.starts_with('/') {
            let problem = format!("{console:?} is not an absolute path");
            return Err(("runtime.guest_console", problem));
        }
        let group = self.hypervisor.merge_group.as_deref();
        merge_group(group.filter(|text| !text.is_empty()))
            .map_err(|problem| ("hypervisor.merge_group", problem))?;
        for group in self.hypervisor.allowed_merge_groups.iter().flatten() {
            merge_group(Some(group))
                .map_err(|problem| ("hypervisor.allowed_merge_groups", problem))?;
        }
        let params = self.hypervisor.kernel_params.as_deref().unwrap_or("");
        if params.contains(['\n', '\0']) {
            let problem = "contains a line break or NUL".into();
            return Err(("hypervisor.kernel_params", problem));
        }
        Ok(())
    }

    /// Overrides what this file names.
    pub(super) fn apply(self, config: &mut Config) {
        fn set<T>(place: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *place = value;
            }
        }
        let to = &mut config.hypervisor;
        set(&mut to.path, self.hypervisor.path);
        set(&mut to.kernel, self.hypervisor.kernel);
        set(&mut to.image, self.hypervisor.image);
        // Within the bounds that were checked.
        set(
            &mut to.vcpus,
            self.hypervisor.vcpus.and_then(|n| n.try_into().ok()),
        );
        set(
            &mut to.memory_mib,
            self.hypervisor.memory_mib.and_then(|n| n.try_into().ok()),
        );
        set(&mut to.huge_pages, self.hypervisor.huge_pages);
        set(
            &mut to.free_page_reporting,
            self.hypervisor.free_page_reporting,
        );
        let group = self.hypervisor.merge_group;
        set(
            &mut to.merge_group,
            // Checked: what is no name is empty.
            group.map(|text| merge_group(Some(&text)).ok().flatten()),
        );
        let allowed = self.hypervisor.allowed_merge_groups;
        set(
            &mut to.allowed_merge_groups,
            allowed.map(|all| all.iter().filter_map(|text| text.parse().ok()).collect()),
        );
        set(&mut to.kernel_params, self.hypervisor.kernel_params);
        set(
            &mut config.agent.ready_timeout_ms,
            self.agent.ready_timeout_ms,
        );
        set(&mut config.agent.rpc_timeout_ms, self.agent.rpc_timeout_ms);
        set(&mut config.runtime.state_dir, self.runtime.state_dir);
        set(&mut config.runtime.log_level, self.runtime.log_level);
        set(
            &mut config.runtime.guest_console,
            self.runtime.guest_console,
        );
    }
}

fn merge_group(text: Option<&str>) -> Result<Option<Name>, String> {
    text.map(str::parse)
        .transpose()
        .map_err(|error: BadName| error.to_string())
}

/// The first key that does not exist, and one that is spelled alike.
fn unknown_key(table: &Table) -> Option<(String, Option<String>)> {
    let sections: Vec<String> = KNOWN.iter().map(|(name, _)| (*name).into()).collect();
    let keys = |section: &str, names: &[&str]| -> Vec<String> {
        names
            .iter()
            .map(|name| format!("{section}.{name}"))
            .collect()
    };
    for (section, value) in table {
        let Some((_, names)) = KNOWN.iter().find(|(name, _)| name == section) else {
            // A key of a section, written outside of it, is likely meant.
            let mut inside = KNOWN.iter().flat_map(|(name, names)| keys(name, names));
            let moved = inside.find(|key| key.ends_with(&format!(".{section}")));
            return Some((
                section.clone(),
                moved.or_else(|| nearest(section, &sections)),
            ));
        };
        let Some(inner) = value.as_table() else {
            continue; // serde says what is expected
        };
        if let Some(key) = inner.keys().find(|key| !names.contains(&key.as_str())) {
            let full = format!("{section}.{key}");
            let all: Vec<String> = KNOWN
                .iter()
                .flat_map(|(name, names)| keys(name, names))
                .collect();
            let nearest = nearest(&full, &all);
            return Some((full, nearest));
        }
    }
    None
}

/// The candidate that takes the fewest edits, when they are few.
fn nearest(word: &str, candidates: &[String]) -> Option<String> {
    candidates
        .iter()
        .map(|candidate| (distance(word, candidate), candidate))
        .min()
        .filter(|(edits, candidate)| *edits * 3 <= candidate.len())
        .map(|(_, candidate)| candidate.clone())
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
