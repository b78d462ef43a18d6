// SPDX-License-Identifier: Apache-2.0
//! What it costs to write a machine to a snapshot, and to make one of it.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use bulkhead_vmm_api::DeviceConfigs;

use super::memory::private_of;
use super::{kvm, median, Bench, Figure, LIMIT};
use crate::guest::Guest;
use crate::vmm::{agent_socket, Vmm};

/// How often each is done; the first does not count.
const RUNS: usize = 4;
/// Clones whose memory is looked at, side by side.
const CLONES: usize = 8;
/// Until a guest that has booted, or has been restored, has nothing to do.
const REST: Duration = Duration::from_secs(5);

/// `snapshot-create`, `vmm-restore` up to the VMM's word that the guest runs,
/// `vmm-restore-call` up to its agent's first answer, and what machine and clone take: `restore-exits`, `restore-faults`,
/// `vmm-private` and `vmm-private-clone`.
///
/// # Errors
/// When a guest does not come up.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let files = bench.dir.join("snapshot");
    fs::create_dir_all(&files)?;
    let (state, memory) = (files.join("state"), files.join("memory"));
    let (mut snapshots, mut cold) = (Vec::new(), Vec::new());
    for run in 0..RUNS {
        let dir = bench.dir.join(format!("template-{run}"));
        let _agent = listen(&dir)?;
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        vmm.boot(&bench.products, &dir)?;
        vmm.wait_ready()?;
        cold.push(private_of(vmm.pid())?.0);
        thread::sleep(REST);
        let begin = Instant::now();
        vmm.snapshot(&state, &memory)?;
        snapshots.push(milliseconds(begin));
    }
    let mut running = Vec::new();
    let (mut exits, mut own, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..RUNS {
        let dir = bench.dir.join(format!("clone-{run}"));
        let _agent = listen(&dir)?;
        let before = [kvm::counter("exits")?, kvm::counter("pf_taken")?];
        let begin = Instant::now();
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        vmm.clone_of(&state, &memory, &bench.products, &dir)?;
        running.push(milliseconds(begin));
        vmm.wait_clone()?;
        exits.push(kvm::counter("exits")? - before[0]);
        faults.push(kvm::counter("pf_taken")? - before[1]);
        let left = vmm.status()?.exits;
        own.push(left.pio + left.mmio);
    }
    let mut calls = Vec::new();
    for run in 0..RUNS {
        let dir = bench.dir.join(format!("called-{run}"));
        let begin = Instant::now();
        let more = |_: &mut DeviceConfigs, _: &mut Vec<OwnedFd>| {};
        let guest = Guest::clone_with(&bench.products, &dir, (&state, &memory), LIMIT, more)?;
        calls.push(milliseconds(begin));
        drop(guest);
    }
    let clone = side_by_side(bench, &state, &memory)?;
    fs::remove_dir_all(&files)?;
    let [snapshot, running, called] = [snapshots, running, calls].map(|mut runs| {
        runs.remove(0);
        median(runs)
    });
    let counts = |runs: Vec<u64>| median(runs.into_iter().map(|count| count as f64).collect());
    let [exits, own, faults, cold] = [exits, own, faults, cold].map(|mut runs| {
        runs.remove(0);
        counts(runs)
    });
    let clone = counts(clone);
    Ok(vec![
        Figure::new(
            "snapshot-create",
            snapshot?,
            "ms",
            "an idle guest of 256 MiB: pause, state file and memory file on a tmpfs",
        ),
        Figure::new(
            "vmm-restore",
            running?,
            "ms",
            "exec of a new VMM until it says that the clone runs",
        ),
        Figure::new(
            "vmm-restore-call",
            called?,
            "ms",
            "the same until the clone's agent has answered its first call, which gives it entropy, its clock and its names",
        ),
        Figure::new(
            "restore-exits",
            exits?,
            "exits",
            &format!(
                "exits of a clone, all kinds, until its agent has called and it has a generation id of its own; {:.0} of them went to the VMM; target: 400",
                own?
            ),
        ),
        Figure::new(
            "restore-faults",
            faults?,
            "faults",
            "nested page faults of the same; target: 350",
        ),
        Figure::new(
            "vmm-private",
            cold? / 1024.0,
            "MiB",
            "private memory of the VMM of a guest that has just booted, without the guest's; target: 3",
        ),
        Figure::new(
            "vmm-private-clone",
            clone? / 1024.0,
            "MiB",
            &format!(
                "memory that only a clone's VMM has, with the guest's, of {CLONES} idle clones of one idle template; target: 1.2"
            ),
        ),
    ])
}

/// Private memory in KiB of each of some clones that live at the same time: what
/// ends with it. What a clone has only read is its template's, and counts as
/// private where there is no other clone that has read it.
fn side_by_side(bench: &Bench, state: &Path, memory: &Path) -> Result<Vec<u64>> {
    let mut clones = Vec::new();
    for number in 0..CLONES {
        let dir = bench.dir.join(format!("beside-{number}"));
        let agent = listen(&dir)?;
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        vmm.clone_of(state, memory, &bench.products, &dir)?;
        vmm.wait_clone()?;
        clones.push((vmm, agent));
    }
    thread::sleep(REST);
    clones
        .iter()
        .map(|(vmm, _)| private_of(vmm.pid()).map(|(process, guest)| process + guest))
        .collect()
}

fn listen(dir: &Path) -> Result<UnixListener> {
    fs::create_dir_all(dir)?;
    Ok(UnixListener::bind(agent_socket(dir))?)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
