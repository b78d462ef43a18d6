// SPDX-License-Identifier: Apache-2.0
//! Pods whose start goes wrong at each of its steps, and pods whose guest does
//! not answer any more: nothing is left, and the pod can be made again under
//! its name.

use anyhow::{bail, Context as _, Result};
use bulkhead_runtime::fault::Step;
use bulkhead_tests::listing::Listing;
use bulkhead_tests::proc;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::cli::{listed, with_config};
use crate::context::{mentions, same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    each_step_of_a_start_can_fail,
    each_step_of_a_start_can_be_the_shims_last,
    a_guest_that_does_not_answer_is_ended,
];

/// A start that goes wrong.
fn wrong(context: &Context, id: &str, key: &str, step: Step, before: &Listing) -> Result<()> {
    let text = format!("{}\n[debug]\n{key} = \"{step}\"\n", context.config.toml());
    let done = with_config(context, &text, || {
        proc::run(&mut context.run_command(&["--rm"], id, &["true"]), LIMIT)
    })?;
    if done.code == 0 {
        bail!("it started: {}", done.out());
    }
    if key == "fail_at" {
        mentions(&done.err(), &[&format!("step {step}: debug.fail_at")])?;
    }
    context.containerd.clean()?;
    context.nothing_left(before, LIMIT)
}

/// One after the other under one name, which in the end works.
fn each_step(context: &Context, key: &str) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let id = context.id("faulty");
    for step in Step::ALL {
        wrong(context, &id, key, *step, &before).with_context(|| format!("step {step}"))?;
    }
    let mut run = context.run_command(&["--rm"], &id, &["echo", "works"]);
    same(proc::run(&mut run, LIMIT)?.ok()?.out().as_str(), "works")?;
    context.nothing_left(&before, LIMIT)
}

fn each_step_of_a_start_can_fail(context: &Context) -> Result<()> {
    each_step(context, "fail_at")
}

fn each_step_of_a_start_can_be_the_shims_last(context: &Context) -> Result<()> {
    each_step(context, "crash_at")
}

fn a_guest_that_does_not_answer_is_ended(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    // Slow machines are slow for real while the guest starts.
    let text: String = context
        .config
        .toml()
        .lines()
        .map(|line| match line.starts_with("rpc_timeout_ms") {
            true => "rpc_timeout_ms = 5000\nhealth_interval_ms = 500\nhealth_failures = 2\n".into(),
            false => format!("{line}\n"),
        })
        .collect();
    let mut run = with_config(context, &text, || {
        let mut run = context.attached(&[], &["sh", "-c", "echo up; sleep 1000"])?;
        run.wait_for("up")?;
        Ok(run)
    })?;
    let found = listed(context, &run.id)?;
    let vmm = found["vmm_pid"].as_i64().context("the VMM")?;
    // No answer, and no end either.
    kill(Pid::from_raw(vmm.try_into()?), Signal::SIGSTOP)?;
    same(run.wait(LIMIT)?, 137)?;
    mentions(
        &context.containerd.log(),
        &["has not answered 2 times in a row"],
    )?;
    drop(run);
    context.nothing_left(&before, LIMIT)
}
