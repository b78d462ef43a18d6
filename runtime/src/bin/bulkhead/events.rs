// SPDX-License-Identifier: Apache-2.0
//! `bulkhead events`: what has happened in pods, and what happens.

use std::{
    collections::HashSet,
    fmt::Write as _,
    io::{stdout, Write as _},
    path::PathBuf,
    thread,
    time::Duration,
};

use bulkhead_runtime::{
    config::Config,
    node::{Found, PATIENCE},
    operator::{client, Happened},
};
use clap::Args;

use crate::{find, format::Format, Failure};

/// How often new sandboxes are looked for.
const LOOK: Duration = Duration::from_millis(500);

/// Events of pods.
#[derive(Debug, Args)]
pub struct Command {
    /// Only of this sandbox, or of that with this container
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Go on with what happens; of a named sandbox until it is gone
    #[arg(short, long)]
    follow: bool,
    /// How to tell it; json: an object a line
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

impl Command {
    /// Tells them.
    pub fn execute(&self, config: &Config) -> Result<(), Failure> {
        let named = match &self.name {
            Some(name) => Some(find::sandbox(config, name)?),
            None => None,
        };
        if !self.follow {
            return self.past(match named {
                Some(found) => vec![found],
                None => find::all(config)?,
            });
        }
        if let Some(found) = named {
            return follow(&found, self.format).map_err(Failure::from);
        }
        let mut seen: HashSet<PathBuf> = HashSet::new();
        loop {
            let all = find::all(config)?;
            // One that is gone may come again under its name.
            seen.retain(|directory| all.iter().any(|found| found.directory == *directory));
            for found in all.into_iter().filter(|found| found.state.is_some()) {
                if seen.insert(found.directory.clone()) {
                    let format = self.format;
                    // A pod that goes meanwhile is the end of its events.
                    thread::spawn(move || follow(&found, format));
                }
            }
            thread::sleep(LOOK);
        }
    }

    /// Tells what has happened, in the order in which it has.
    fn past(&self, sandboxes: Vec<Found>) -> Result<(), Failure> {
        let mut all: Vec<Happened> = Vec::new();
        for found in sandboxes.iter().filter(|found| found.state.is_some()) {
            // One that is gone by now has none.
            let text = client::get(&found.socket(), "/events", PATIENCE).unwrap_or_default();
            all.extend(
                text.lines()
                    .filter_map(|line| serde_json::from_str(line).ok()),
            );
        }
        all.sort_by(|a, b| a.time.cmp(&b.time));
        for happened in &all {
            print(happened, self.format)?;
        }
        Ok(())
    }
}

fn follow(found: &Found, format: Format) -> Result<(), String> {
    let lines = client::follow(&found.socket(), "/events?follow", PATIENCE)
        .map_err(|error| bulkhead_runtime::error::chain(&error))?;
    for line in lines {
        // The end of the pod may cut its connection.
        let Ok(line) = line else {
            break;
        };
        if let Ok(happened) = serde_json::from_str(&line) {
            print(&happened, format)?;
        }
    }
    Ok(())
}

/// A line at once, so that several threads may.
fn print(happened: &Happened, format: Format) -> Result<(), String> {
    let mut line = match format {
        Format::Text => text(happened),
        Format::Json => serde_json::to_string(happened).map_err(|error| error.to_string())?,
    };
    line.push('\n');
    let mut out = stdout().lock();
    out.write_all(line.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| format!("standard output: {error}"))
}

fn text(happened: &Happened) -> String {
    let mut line = format!(
        "{}  {}/{}  {}",
        happened.time, happened.namespace, happened.sandbox, happened.event
    );
    let fields = [
        ("container", happened.container.clone()),
        ("exec", happened.exec.clone()),
        ("status", happened.status.map(|status| status.to_string())),
        ("why", happened.why.as_ref().map(|why| format!("{why:?}"))),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            // Writing to a string does not fail.
            let _ = write!(line, "  {name}={value}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_what_is_known() {
        let happened: Happened = serde_json::from_str(
            r#"{"time":"T","namespace":"n","sandbox":"s","event":"exited","container":"c","status":3}"#,
        )
        .unwrap();
        assert_eq!(text(&happened), "T  n/s  exited  container=c  status=3");
    }
}
