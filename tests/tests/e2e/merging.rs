// SPDX-License-Identifier: Apache-2.0
//! Guest memory that is merged, and that is not, and what `bulkhead density`
//! tells of it.

use std::fs;
use std::process::Command;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::proc;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::context::{mentions, same, until, Context, Detached, LIMIT};
use crate::ksm::{number, Daemon, Settings};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    ksm_merges_pods_that_asked,
    ksm_keeps_groups_apart,
    density_adds_up
];

const ANNOTATION: &str = "io.bulkhead.hypervisor.merge_group";
/// The guest kernel alone, which is the same in all pods.
const SHARED: u64 = 10 << 20;

fn pod<'a>(context: &'a Context, group: Option<&str>) -> Result<Detached<'a>> {
    let annotation = group.map(|group| format!("{ANNOTATION}={group}"));
    let flags: Vec<&str> = match &annotation {
        Some(annotation) => vec!["--annotation", annotation],
        None => Vec::new(),
    };
    context.detached(&flags, &["sleep", "1000"])
}

fn bulkhead(context: &Context, args: &[&str]) -> Result<String> {
    let mut command = Command::new(context.products.program("bulkhead"));
    command.env("BULKHEAD_CONFIG", context.dir.join("config.toml"));
    Ok(proc::run(command.args(args), LIMIT)?.ok()?.out())
}

fn json(context: &Context, args: &[&str]) -> Result<Value> {
    let text = bulkhead(context, &[args, &["--format", "json"]].concat())?;
    serde_json::from_str(&text).context(text)
}

/// What `bulkhead density` tells of one pod.
fn density(context: &Context, pod: &Detached<'_>) -> Result<Value> {
    let all = json(context, &["density"])?;
    let pods = all["pods"].as_array().context("pods")?;
    let found = pods.iter().find(|p| p["id"] == pod.id.as_str());
    found
        .cloned()
        .with_context(|| format!("{} in {all}", pod.id))
}

fn bytes(value: &Value, key: &str) -> Result<u64> {
    value[key]
        .as_u64()
        .with_context(|| format!("{key} in {value}"))
}

/// Whether the kernel says that the guest's memory is mergeable.
fn is_mergeable(told: &Value) -> Result<bool> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", bytes(told, "vmm_pid")?))?;
    let mut flags = smaps.lines().filter_map(|l| l.strip_prefix("VmFlags:"));
    Ok(flags.any(|line| line.split_whitespace().any(|flag| flag == "mg")))
}

fn ksm_merges_pods_that_asked(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    let daemon = Daemon::start(context)?;
    let apart = pod(context, None)?;
    let first = pod(context, Some("red"))?;
    let second = pod(context, Some("red"))?;
    until(LIMIT, "the daemon to hear of both", || {
        Ok(daemon.metric("pods_merged_total")? == 2.0)
    })?;
    same(&json(context, &["ksm", "status"])?["group"]["is"], "red")?;
    for pod in [&first, &second] {
        until(LIMIT, "a pod to be merged", || {
            Ok(bytes(&density(context, pod)?, "merged")? >= SHARED)
        })
        .with_context(|| daemon.log())?;
        let told = density(context, pod)?;
        same(&told["mergeable"], true)?;
        same(is_mergeable(&told)?, true)?;
    }
    if number("pages_sharing")? < SHARED / 4096 {
        bail!("the kernel says that less is merged");
    }
    let told = density(context, &apart)?;
    same(&told["mergeable"], false)?;
    same(is_mergeable(&told)?, false)?;
    same(bytes(&told, "merged")?, 0)?;
    let text = bulkhead(context, &["density"])?;
    println!("{text}");
    mentions(&text, &["red"])?;
    for pod in [first, second, apart] {
        pod.remove()?;
    }
    same(&json(context, &["ksm", "status"])?["group"], "none")?;
    same(daemon.end(Signal::SIGTERM)?, 0)
}

fn ksm_keeps_groups_apart(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    let green = format!("{ANNOTATION}=green");
    let done = context.run(&["--annotation", &green], &["true"])?;
    if done.code == 0 {
        bail!("a group was taken that is not allowed");
    }
    mentions(&done.err(), &["allowed_merge_groups"])?;
    // Without a daemon, too.
    let red = pod(context, Some("red"))?;
    let daemon = Daemon::start(context)?;
    let blue = pod(context, Some("blue"))?;
    let told = density(context, &blue)?;
    same(&told["mergeable"], false)?;
    same(&told["merge_group"], "blue")?;
    same(is_mergeable(&told)?, false)?;
    until(LIMIT, "the daemon to hear of the other", || {
        Ok(daemon.metric("pods_refused_total")? == 1.0)
    })?;
    mentions(&daemon.log(), &["group=\"blue\""])?;
    let status = bulkhead(context, &["ksm", "status"])?;
    mentions(&status, &["group:      red; pods of other groups"])?;
    mentions(&bulkhead(context, &["density"])?, &["not merged (blue)"])?;
    // One that dies leaves nothing behind that would keep others out.
    let vmm = bytes(&density(context, &red)?, "vmm_pid")?;
    kill(Pid::from_raw(vmm.try_into()?), Signal::SIGKILL)?;
    red.wait_for("STOPPED", LIMIT)?;
    let next = pod(context, Some("blue"))?;
    let told = density(context, &next)?;
    same(&told["mergeable"], true)?;
    same(is_mergeable(&told)?, true)?;
    // For all its life, it is apart.
    same(is_mergeable(&density(context, &blue)?)?, false)?;
    same(daemon.end(Signal::SIGTERM)?, 0)
}

fn density_adds_up(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let pods = [pod(context, None)?, pod(context, None)?];
    for pod in &pods {
        let told = density(context, pod)?;
        let parts = ["guest", "vmm", "shim", "page_tables"];
        let mut sum = told["kernel"].as_u64().unwrap_or(0);
        for part in parts {
            let part = bytes(&told, part)?;
            if part == 0 {
                bail!("a part is nothing: {told}");
            }
            sum += part;
        }
        same(bytes(&told, "own")?, sum)?;
        same(bytes(&told, "size")?, 256 << 20)?;
        // Both map the same programs and the same guest image.
        if bytes(&told, "file_shared")? == 0 || bytes(&told, "guest")? < SHARED {
            bail!("not what an idle pod costs: {told}");
        }
    }
    let all = json(context, &["density"])?;
    let room = bytes(&all["room"], "like_these")?;
    let available = bytes(&all["host"], "available")?;
    same(room, available / bytes(&all["room"], "each")?)?;
    if bytes(&all["room"], "all_used")? > room {
        bail!("busy pods are no smaller than idle ones: {all}");
    }
    for pod in pods {
        pod.remove()?;
    }
    same(json(context, &["density"])?["room"].is_null(), true)
}
