// SPDX-License-Identifier: Apache-2.0
//! One file of the configuration: any subset of the keys.

use std::path::Path;

use toml::Table;

use super::{
    keys::{Key, KEYS},
    Config, ConfigError,
};

/// Applies a text to a configuration; `path` names it in errors. Returns the
/// keys that it sets.
///
/// # Errors
/// It is not TOML, or a key or value is wrong; the configuration is of no use
/// then.
pub(super) fn apply(
    config: &mut Config,
    path: &Path,
    text: &str,
) -> Result<Vec<&'static Key>, ConfigError> {
    let table: Table = text.parse().map_err(|source| ConfigError::Syntax {
        path: path.into(),
        source: Box::new(source),
    })?;
    apply_table(config, path, &table)
}

pub(super) fn apply_table(
    config: &mut Config,
    path: &Path,
    table: &Table,
) -> Result<Vec<&'static Key>, ConfigError> {
    if let Some((key, nearest)) = unknown_key(table) {
        return Err(ConfigError::UnknownKey {
            path: path.into(),
            key,
            nearest,
        });
    }
    let mut set = Vec::new();
    for (section, value) in table {
        let bad = |key: &str, problem: String| ConfigError::BadValue {
            path: path.into(),
            key: key.into(),
            problem,
        };
        let inner = value.as_table().ok_or_else(|| {
            bad(
                section,
                format!("is a section: write [{section}] and its keys below"),
            )
        })?;
        for (name, value) in inner {
            let full = format!("{section}.{name}");
            // Looked for above.
            let Some(key) = Key::named(&full) else {
                continue;
            };
            key.set(config, value)
                .map_err(|problem| bad(&full, problem))?;
            set.push(key);
        }
    }
    Ok(set)
}

/// Section and name of a key.
fn split(key: &Key) -> (&'static str, &'static str) {
    key.name.split_once('.').unwrap_or((key.name, ""))
}

/// The first key that does not exist, and one that is spelled alike.
fn unknown_key(table: &Table) -> Option<(String, Option<String>)> {
    let all: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
    let mut sections: Vec<&str> = KEYS.iter().map(|key| split(key).0).collect();
    sections.dedup();
    for (section, value) in table {
        if !sections.contains(&section.as_str()) {
            // A key of a section, written outside of it, is likely meant.
            let moved = KEYS.iter().find(|key| split(key).1 == section);
            return Some((
                section.clone(),
                moved
                    .map(|key| key.name.to_owned())
                    .or_else(|| nearest(section, &sections)),
            ));
        }
        let names = value.as_table().into_iter().flat_map(Table::keys);
        for name in names {
            let full = format!("{section}.{name}");
            if Key::named(&full).is_none() {
                let nearest = nearest(&full, &all);
                return Some((full, nearest));
            }
        }
    }
    None
}

/// The candidate that takes the fewest edits, when they are few.
pub(crate) fn nearest(word: &str, candidates: &[&str]) -> Option<String> {
    candidates
        .iter()
        .map(|candidate| (distance(word, candidate), *candidate))
        .min()
        .filter(|(edits, candidate)| *edits * 3 <= candidate.len())
        .map(|(_, candidate)| candidate.to_owned())
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
