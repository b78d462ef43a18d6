// SPDX-License-Identifier: Apache-2.0
//! `bulkhead list` and `bulkhead state`.

use std::{
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bulkhead_runtime::{clock::Utc, config::Config, node::Found};
use clap::Args;
use serde::Serialize;

use crate::{find, format::Format, Failure};

/// All sandboxes.
#[derive(Debug, Args)]
pub struct List {
    /// How to tell it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// One sandbox.
#[derive(Debug, Args)]
pub struct Show {
    /// Name of the sandbox or of a container in it; a beginning will do
    #[arg(value_name = "NAME")]
    name: String,
    /// How to tell it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Debug, Serialize)]
struct Sandboxes {
    sandboxes: Vec<Found>,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct One(Found);

impl List {
    /// Tells them.
    pub fn execute(&self, config: &Config) -> Result<(), Failure> {
        let sandboxes = find::all(config)?;
        Ok(self.format.print(&Sandboxes { sandboxes })?)
    }
}

impl Show {
    /// Tells it.
    pub fn execute(&self, config: &Config) -> Result<(), Failure> {
        let found = find::sandbox(config, &self.name)?;
        Ok(self.format.print(&One(found))?)
    }
}

fn created(found: &Found) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(found.created_ms)
}

/// How long ago, as short as it can be told.
fn age(since: Duration) -> String {
    let seconds = since.as_secs();
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn row(found: &Found) -> [String; 8] {
    let known = |number: u32| match number {
        0 => "-".into(),
        number => number.to_string(),
    };
    let containers = match &found.state {
        Some(state) => {
            let running = state.containers.iter().filter(|c| c.status == "running");
            format!("{}/{}", running.count(), state.containers.len())
        }
        None => "-".into(),
    };
    let since = SystemTime::now().duration_since(created(found));
    [
        match found.namespace.as_str() {
            "" => "-".into(),
            namespace => namespace.into(),
        },
        found.id.clone(),
        found.status.to_string(),
        containers,
        known(found.vcpus.into()),
        known(found.memory_mib),
        known(found.vmm_pid),
        match found.created_ms {
            0 => "-".into(),
            _ => age(since.unwrap_or_default()),
        },
    ]
}

impl fmt::Display for Sandboxes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heads = [
            "NAMESPACE",
            "SANDBOX",
            "STATUS",
            "RUNNING",
            "VCPUS",
            "MIB",
            "VMM",
            "AGE",
        ];
        let mut rows = vec![heads.map(str::to_owned)];
        rows.extend(self.sandboxes.iter().map(row));
        table(f, &rows)
    }
}

/// Columns as wide as their widest cell.
pub fn table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let widths: Vec<usize> = (0..N)
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0)
        })
        .collect();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        writeln!(f, "{}", line.join("  ").trim_end())?;
    }
    Ok(())
}

impl fmt::Display for One {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.0;
        writeln!(f, "sandbox:    {}/{}", found.namespace, found.id)?;
        writeln!(f, "status:     {}", found.status)?;
        if let Some(why) = found.state.as_ref().and_then(|state| state.ended.as_ref()) {
            writeln!(f, "why:        {why}")?;
        }
        if found.created_ms > 0 {
            writeln!(f, "created:    {}", Utc(created(found)))?;
        }
        writeln!(
            f,
            "machine:    {} vcpus, {} MiB, process {}",
            found.vcpus, found.memory_mib, found.vmm_pid
        )?;
        writeln!(f, "front end:  process {}", found.pid)?;
        if let Some(socket) = &found.task_socket {
            writeln!(f, "task:       {}", socket.display())?;
        }
        writeln!(f, "directory:  {}", found.directory.display())?;
        let Some(state) = &found.state else {
            return Ok(());
        };
        for (step, at) in state.start.steps() {
            if let Some(at) = at {
                writeln!(f, "start:      {at:>10.3} ms  {step}")?;
            }
        }
        for container in &state.containers {
            write!(f, "container:  {}  {}", container.id, container.status)?;
            if let Some(status) = container.exit_status {
                write!(f, " ({status})")?;
            }
            writeln!(f, "  {}", container.bundle.display())?;
            for exec in &container.execs {
                writeln!(f, "  process:  {}  {}", exec.id, exec.status)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_runtime::{
        node::Status,
        operator::{ContainerState, Start, State},
    };

    use super::*;

    fn found() -> Found {
        Found {
            namespace: "k8s.io".into(),
            id: "web".into(),
            status: Status::Running,
            pid: 7,
            vmm_pid: 8,
            vcpus: 2,
            memory_mib: 256,
            created_ms: 1_795_219_200_000,
            task_socket: Some("/run/containerd/s/x".into()),
            directory: "/run/bulkhead/s/0".into(),
            state: Some(State {
                namespace: "k8s.io".into(),
                sandbox: "web".into(),
                pid: 7,
                vmm_pid: 8,
                vcpus: 2,
                memory_mib: 256,
                ended: None,
                start: Start {
                    agent_ready_ms: Some(12.5),
                    ..Start::default()
                },
                containers: vec![ContainerState {
                    id: "c1".into(),
                    status: "stopped".into(),
                    bundle: "/b".into(),
                    exit_status: Some(3),
                    exited_at: None,
                    execs: Vec::new(),
                }],
            }),
        }
    }

    #[test]
    fn people_get_columns() {
        let dead = Found {
            id: "a-longer-name".into(),
            status: Status::Dead,
            state: None,
            created_ms: 0,
            ..found()
        };
        let text = Sandboxes {
            sandboxes: vec![found(), dead],
        }
        .to_string();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|l| l.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1][..6],
            ["k8s.io", "web", "running", "0/1", "2", "256"]
        );
        assert_eq!(lines[2][2..4], ["dead", "-"]);
        let column = |line: usize, word: &str| text.lines().nth(line).unwrap().find(word);
        assert_eq!(column(0, "STATUS"), column(2, "dead"));
    }

    #[test]
    fn one_is_told_in_full() {
        let text = One(found()).to_string();
        for part in [
            "sandbox:    k8s.io/web\n",
            "created:    2026-11-21T00:00:00.000Z\n",
            "start:          12.500 ms  agent_ready\n",
            "container:  c1  stopped (3)  /b\n",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        let json = serde_json::to_value(One(found())).unwrap();
        assert_eq!(json["state"]["containers"][0]["exit_status"], 3);
    }

    #[test]
    fn ages_are_short() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (7200, "2h"),
            (172_800, "2d"),
        ] {
            assert_eq!(age(Duration::from_secs(seconds)), text);
        }
    }
}
