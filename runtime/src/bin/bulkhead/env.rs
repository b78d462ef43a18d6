// SPDX-License-Identifier: Apache-2.0
//! `bulkhead env`: what a bug report should tell.

use std::{fmt, fs, path::Path, process::Command as Program};

use bulkhead_runtime::{
    check::{self, Report, Subject, Verdict},
    config::{Loaded, Origin, KEYS},
    node::{self, PATIENCE},
};
use clap::Args;
use serde::Serialize;

use crate::format::Format;

/// The host and what is installed.
#[derive(Debug, Args)]
pub struct Command {
    /// How to tell it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Environment {
    bulkhead: &'static str,
    shim: String,
    containerd: String,
    kernel: String,
    distribution: String,
    processor: String,
    processors: usize,
    memory_mib: u64,
    cgroups: &'static str,
    configuration: Vec<String>,
    /// Keys that do not have their default.
    settings: Vec<String>,
    sandboxes: Vec<(String, usize)>,
    checks: Vec<String>,
}

impl Command {
    /// Tells it.
    pub fn execute(&self, loaded: &Loaded) -> Result<(), String> {
        self.format.print(&take(loaded))
    }
}

fn take(loaded: &Loaded) -> Environment {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let config = &loaded.config;
    let sandboxes = node::all(&config.runtime.state_dir, PATIENCE).unwrap_or_default();
    Environment {
        bulkhead: env!("CARGO_PKG_VERSION"),
        shim: version("containerd-shim-bulkhead-v2", "-v"),
        containerd: version("containerd", "--version"),
        kernel: read("/proc/sys/kernel/osrelease").trim().into(),
        distribution: field(&read("/etc/os-release"), "PRETTY_NAME", '=')
            .trim_matches('"')
            .into(),
        processor: field(&read("/proc/cpuinfo"), "model name", ':').into(),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        memory_mib: field(&read("/proc/meminfo"), "MemTotal", ':')
            .trim_end_matches(" kB")
            .parse::<u64>()
            .unwrap_or_default()
            / 1024,
        cgroups: match Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            true => "v2",
            false => "v1",
        },
        configuration: loaded
            .files
            .iter()
            .map(|path| path.display().to_string())
            .collect(),
        settings: KEYS
            .iter()
            .filter(|key| loaded.origin(key) != Origin::Default)
            .map(|key| format!("{} = {}", key.name, key.get(config)))
            .collect(),
        sandboxes: node::Status::ALL
            .into_iter()
            .map(|status| {
                let count = sandboxes.iter().filter(|found| found.status == status);
                (status.to_string(), count.count())
            })
            .filter(|(_, count)| *count > 0)
            .collect(),
        checks: checks(&check::run(&Subject {
            vmm: config.hypervisor.path.clone(),
            kernel: config.hypervisor.kernel.clone(),
            image: config.hypervisor.image.clone(),
            state_dir: config.runtime.state_dir.clone(),
        })),
    }
}

fn checks(report: &Report) -> Vec<String> {
    let line = |line: &check::Line| match &line.verdict {
        Verdict::Good(found) => format!("ok    {}: {found}", line.name),
        Verdict::Fair { found, .. } => format!("warn  {}: {found}", line.name),
        Verdict::Bad { found, .. } => format!("FAIL  {}: {found}", line.name),
    };
    report.lines.iter().map(line).collect()
}

/// What a program says of itself.
fn version(program: &str, argument: &str) -> String {
    match Program::new(program).arg(argument).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            text.lines().next().unwrap_or_default().to_owned()
        }
        Err(error) => format!("not found in PATH: {error}"),
    }
}

/// The value of a line `key<separator>value`.
fn field<'a>(text: &'a str, key: &str, separator: char) -> &'a str {
    text.lines()
        .filter_map(|line| line.split_once(separator))
        .find(|(name, _)| name.trim() == key)
        .map_or("", |(_, value)| value.trim())
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "bulkhead:      {}", self.bulkhead)?;
        writeln!(f, "shim:          {}", self.shim)?;
        writeln!(f, "containerd:    {}", self.containerd)?;
        writeln!(f, "kernel:        {}", self.kernel)?;
        writeln!(f, "distribution:  {}", self.distribution)?;
        writeln!(f, "processors:    {} x {}", self.processors, self.processor)?;
        writeln!(f, "memory:        {} MiB", self.memory_mib)?;
        writeln!(f, "cgroups:       {}", self.cgroups)?;
        for file in &self.configuration {
            writeln!(f, "configuration: {file}")?;
        }
        for setting in &self.settings {
            writeln!(f, "               {setting}")?;
        }
        for (status, count) in &self.sandboxes {
            writeln!(f, "sandboxes:     {count} {status}")?;
        }
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let text = "processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Other\n";
        assert_eq!(field(text, "model name", ':'), "Some CPU");
        assert_eq!(field(text, "flags", ':'), "");
        assert_eq!(
            field("NAME=x\nPRETTY_NAME=\"A b\"\n", "PRETTY_NAME", '='),
            "\"A b\""
        );
    }

    #[test]
    fn a_missing_program_is_told() {
        assert!(version("no-such-program-here", "-v").starts_with("not found"));
    }
}
