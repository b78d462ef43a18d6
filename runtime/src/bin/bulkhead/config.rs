// SPDX-License-Identifier: Apache-2.0
//! `bulkhead config`: what is in force, and where it comes from.

use std::fmt;

use bulkhead_runtime::config::{Loaded, KEYS};
use clap::Args;
use serde::Serialize;

use crate::format::Format;

/// The effective configuration.
#[derive(Debug, Args)]
pub struct Command {
    /// Tell what each key says, as a configuration file that sets every key
    #[arg(long, conflicts_with = "format")]
    document: bool,
    /// How to tell it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Effective {
    files: Vec<String>,
    keys: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct Entry {
    key: &'static str,
    value: toml::Value,
    origin: String,
    annotation: bool,
    help: &'static str,
}

impl Command {
    /// Tells it.
    pub fn execute(&self, loaded: &Loaded) -> Result<(), String> {
        if self.document {
            print!("{}", document(loaded));
            return Ok(());
        }
        self.format.print(&effective(loaded))
    }
}

fn effective(loaded: &Loaded) -> Effective {
    Effective {
        files: loaded
            .files
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        keys: KEYS
            .iter()
            .map(|key| Entry {
                key: key.name,
                value: key.get(&loaded.config),
                origin: loaded.origin(key).to_string(),
                annotation: key.annotation,
                help: key.help,
            })
            .collect(),
    }
}

/// A configuration file with every key, its sense and its value.
fn document(loaded: &Loaded) -> String {
    let mut text = String::new();
    let mut section = "";
    for key in KEYS {
        let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
        if of != section {
            text.push_str(if section.is_empty() { "" } else { "\n" });
            text.push_str(&format!("[{of}]\n"));
            section = of;
        }
        let value = key.get(&loaded.config);
        text.push_str(&format!("# {}\n{name} = {value}\n", key.help));
    }
    text
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self
            .keys
            .iter()
            .map(|entry| format!("{} = {}", entry.key, entry.value))
            .collect();
        let width = lines
            .iter()
            .map(|line| line.chars().count())
            .filter(|width| *width <= 72)
            .max()
            .unwrap_or(0);
        for (line, entry) in lines.iter().zip(&self.keys) {
            writeln!(f, "{line:width$}  # {}", entry.origin)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_runtime::config::Config;

    use super::*;

    #[test]
    fn the_document_is_a_configuration_that_changes_nothing() {
        let text = document(&Loaded::default());
        let table = text.parse().unwrap();
        let mut config = Config::default();
        config.apply("the document", &table).unwrap();
        assert_eq!(config, Config::default());
        assert!(text.contains("\nvcpus = 1\n"), "{text}");
    }

    #[test]
    fn every_line_tells_an_origin() {
        let effective = effective(&Loaded::default());
        let text = effective.to_string();
        assert_eq!(text.lines().count(), KEYS.len());
        assert!(text.lines().all(|line| line.ends_with("# default")));
        let json = serde_json::to_value(&effective).unwrap();
        assert_eq!(json["keys"][0]["key"], "hypervisor.path");
        assert_eq!(json["keys"][0]["origin"], "default");
    }
}
