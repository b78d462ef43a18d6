// SPDX-License-Identifier: Apache-2.0
//! What it costs to write a machine to a snapshot, and to make one of it.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use super::{median, Bench, Figure, LIMIT};
use crate::vmm::{agent_socket, Vmm};

/// How often each is done; the first does not count.
const RUNS: usize = 4;

/// `snapshot-create`, and `vmm-restore` up to the VMM's word that the guest
/// runs.
///
/// # Errors
/// When a guest does not come up.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let files = bench.dir.join("snapshot");
    fs::create_dir_all(&files)?;
    let (state, memory) = (files.join("state"), files.join("memory"));
    let mut snapshots = Vec::new();
    for run in 0..RUNS {
        let dir = bench.dir.join(format!("template-{run}"));
        let _agent = listen(&dir)?;
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        vmm.boot(&bench.products, &dir)?;
        vmm.wait_ready()?;
        let begin = Instant::now();
        vmm.snapshot(&state, &memory)?;
        snapshots.push(milliseconds(begin));
    }
    let mut running = Vec::new();
    for run in 0..RUNS {
        let dir = bench.dir.join(format!("clone-{run}"));
        let _agent = listen(&dir)?;
        let begin = Instant::now();
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        vmm.clone_of(&state, &memory, &bench.products, &dir)?;
        running.push(milliseconds(begin));
    }
    fs::remove_dir_all(&files)?;
    let [snapshot, running] = [snapshots, running].map(|mut runs| {
        runs.remove(0);
        median(runs)
    });
    Ok(vec![
        Figure::new(
            "snapshot-create",
            snapshot?,
            "ms",
            "a guest of 256 MiB, just booted: pause, state file and memory file on a tmpfs",
        ),
        Figure::new(
            "vmm-restore",
            running?,
            "ms",
            "exec of a new VMM until it says that the clone runs",
        ),
    ])
}

fn listen(dir: &Path) -> Result<UnixListener> {
    fs::create_dir_all(dir)?;
    Ok(UnixListener::bind(agent_socket(dir))?)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
