// SPDX-License-Identifier: Apache-2.0
//! SIGKILL to the VMM, to the shim and to both: containerd hears of it, and
//! everything is given back.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::containerd::BULKHEAD;
use bulkhead_tests::listing::{self, Process};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::context::{same, Context, Detached, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    vmm_killed_is_a_task_exit_within_two_seconds,
    vmm_killed_leaves_nothing,
    shim_killed_leaves_nothing,
    both_killed_leave_nothing,
    containerd_restarted_finds_its_containers,
];

fn program(context: &Context) -> &'static str {
    if context.runtime == BULKHEAD {
        "containerd-shim-bulkhead-v2"
    } else {
        "containerd-shim-runc-v2"
    }
}

fn the_one(name: &str) -> Result<Process> {
    let mut found: Vec<Process> = listing::by_program(name)
        .into_iter()
        .filter(|p| !p.zombie)
        .collect();
    match (found.pop(), found.len()) {
        (Some(process), 0) => Ok(process),
        (None, _) => bail!("no process {name}"),
        (Some(_), more) => bail!("{} processes {name}", more + 1),
    }
}

fn end(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.pid as i32), Signal::SIGKILL)
        .with_context(|| format!("kill {}", process.command))
}

/// Deletes what containerd still knows of a container whose shim has died.
fn delete(context: &Context, container: Detached<'_>) -> Result<()> {
    let id = container.id.clone();
    // containerd may have cleaned the task up by itself already.
    let begin = Instant::now();
    while !container.status()?.is_empty() {
        context.ctr(&["task", "delete", "-f", &id])?;
        if begin.elapsed() > LIMIT {
            bail!("the task stays: {}", container.status()?);
        }
        thread::sleep(Duration::from_millis(200));
    }
    context.ctr(&["container", "delete", &id])?.ok()?;
    Ok(())
}

fn vmm_killed_is_a_task_exit_within_two_seconds(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let mut run = context.attached(&[], &["sh", "-c", "echo up; sleep 1000"])?;
    run.wait_for("up")?;
    let vmm = the_one("bulkhead-vmm")?;
    // How slow the box is at the moment, with what else its machine does.
    let begin = Instant::now();
    context.ctr(&["task", "list"])?.ok()?;
    let client = begin.elapsed();
    let begin = Instant::now();
    end(&vmm)?;
    let code = run.wait(LIMIT)?;
    let took = begin.elapsed();
    same(code, 137)?;
    if took > Duration::from_secs(2) + 5 * client {
        bail!("containerd's client heard of it after {took:?}, a call of it takes {client:?}");
    }
    Ok(())
}

fn vmm_killed_leaves_nothing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let container = context.detached(&[], &["sleep", "1000"])?;
    end(&the_one("bulkhead-vmm")?)?;
    container.wait_for("STOPPED", LIMIT)?;
    let done = context.ctr(&["task", "exec", "--exec-id", "late", &container.id, "true"])?;
    if done.code == 0 {
        bail!("an exec in a dead guest succeeded");
    }
    delete(context, container)?;
    context.nothing_left(&before, LIMIT)
}

fn shim_killed_leaves_nothing(context: &Context) -> Result<()> {
    let before = context.listing()?;
    let container = context.detached(&[], &["sleep", "1000"])?;
    end(&the_one(program(context))?)?;
    delete(context, container)?;
    context.nothing_left(&before, LIMIT)
}

fn both_killed_leave_nothing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let container = context.detached(&[], &["sleep", "1000"])?;
    let (shim, vmm) = (the_one(program(context))?, the_one("bulkhead-vmm")?);
    end(&vmm)?;
    end(&shim)?;
    delete(context, container)?;
    context.nothing_left(&before, LIMIT)
}

fn containerd_restarted_finds_its_containers(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    context.containerd.restart()?;
    same(container.status()?.as_str(), "RUNNING")?;
    same(
        container
            .exec(&["echo", "still here"])?
            .ok()?
            .out()
            .as_str(),
        "still here",
    )?;
    container.remove()
}
