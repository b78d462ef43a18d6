// SPDX-License-Identifier: Apache-2.0
//! What idle pods take of the host's memory, with and without page merging, and
//! what is merged across merge groups.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use bulkhead_vmm_api::Pages;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use super::ksm::policy::{reset, Daemon};
use super::{progress, Bench, Figure, LIMIT};
use crate::containerd::BULKHEAD;
use crate::{image, proc};

/// How many pods there are when memory is looked at.
const COUNTS: [usize; 4] = [4, 8, 16, 32];
/// The same for pods in huge pages.
const HUGE_COUNTS: [usize; 2] = [2, 6];
/// Pods of the second group.
const OTHERS: usize = 2;
/// What a start or an end leaves to be done.
const SETTLE: Duration = Duration::from_secs(3);

/// How long is looked for pods that do not come to rest.
const GLANCE: Duration = Duration::from_millis(300);
/// What part of a processor such a one takes, beside ksmd.
const STUCK: f64 = 0.6;

const MERGE_GROUP: &str = "io.bulkhead.hypervisor.merge_group";

/// `pod-memory`, `pod-memory-ksm`, `ksm-across-groups`.
///
/// # Errors
/// When a pod does not run, or this kernel has no KSM.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    reset()?;
    let taken = take(bench);
    bench.containerd()?.clean()?;
    reset()?;
    taken
}

fn take(bench: &Bench) -> Result<Vec<Figure>> {
    // Once and for all: what the first container makes containerd load.
    start(bench, Some("red"), "red-first")?;
    end(bench, "red-first")?;
    thread::sleep(SETTLE);
    let empty = available()?;
    let mut pods = Vec::new();
    let apart = grow(bench, &mut pods, Some("red"), &COUNTS)?;

    // The same pods, merged; then fewer and fewer of them.
    let daemon = Daemon::start(&bench.products, &bench.dir.join("state"))?;
    merge(bench, &daemon, &mut pods)?;
    let mut merged = Vec::new();
    for count in COUNTS.into_iter().rev() {
        while pods.len() > count {
            end(bench, &pods.pop().context("a pod")?)?;
        }
        end_stuck(bench, &mut pods)?;
        thread::sleep(SETTLE);
        merged.push((pods.len() as f64, available()?));
        progress(&format!("{} merged pods", pods.len()));
    }

    for number in 0..OTHERS {
        start(bench, Some("blue"), &format!("blue-{number}"))?;
    }
    merge(bench, &daemon, &mut pods)?;
    let (ours, across) = merged_pages(bench, pods.len())?;
    bench.containerd()?.clean()?;
    thread::sleep(SETTLE);
    let left = mib(empty - available()?);
    drop(daemon);

    // Memory that is mergeable is in small pages, so these are of no group.
    bench.configure(|config| config.pages = Pages::Transparent)?;
    let huge = grow(bench, &mut Vec::new(), None, &HUGE_COUNTS);
    bench.configure(|_| ())?;
    let huge = huge?;
    let counts = COUNTS.map(|count| count.to_string()).join(", ");
    let most = COUNTS[COUNTS.len() - 1] as f64;
    // Of the most pods there were.
    let each = |points: &[(f64, f64)]| {
        let all = points.iter().copied();
        let (count, at) = all.fold((1.0, empty), |most, point| match point.0 > most.0 {
            true => point,
            false => most,
        });
        mib(empty - at) / count
    };
    let lost = -mib(slope(&apart));
    Ok(vec![
        Figure::new(
            "pod-memory",
            lost,
            "MiB",
            &format!(
                "MemAvailable lost per idle pod, slope over {counts} pods of containerd with a sleep in them, ksmd off, guest memory \
                 marked mergeable and so in small pages; {:.1} MiB each when all of {most} are compared with none; target: under 30",
                each(&apart)
            ),
        ),
        Figure::new(
            "pod-memory-ksm",
            -mib(slope(&merged)),
            "MiB",
            &format!(
                "the same pods after the daemon's run, slope over {counts} as they are ended; {:.1} MiB each when all of {most} are \
                 compared with none; {left:.1} MiB were not back when all had ended; target: under 12",
                each(&merged)
            ),
        ),
        Figure::new(
            "pod-memory-huge",
            -mib(slope(&huge)),
            "MiB",
            &format!(
                "the same without a merge group and with hypervisor.pages = transparent, slope over {} and {} pods; the peer is pod-memory",
                HUGE_COUNTS[0], HUGE_COUNTS[1]
            ),
        )
        .beside("small pages", lost),
        Figure::new(
            "ksm-across-groups",
            across,
            "pages",
            &format!(
                "pages that the kernel has merged in {OTHERS} pods of a second group, started beside {} of the first with {ours} merged \
                 pages, after another run; target: 0",
                COUNTS[0]
            ),
        ),
    ])
}

/// Starts pods until there are so many, and so many; what is available then.
fn grow(
    bench: &Bench,
    pods: &mut Vec<String>,
    group: Option<&str>,
    counts: &[usize],
) -> Result<Vec<(f64, f64)>> {
    let mut seen = Vec::new();
    let mut number = 0;
    for &count in counts {
        while pods.len() < count {
            // What is started for one that is stuck may be so too, but not for ever.
            if number >= 2 * counts[counts.len() - 1] {
                bail!("of {number} pods only {} come to rest", pods.len());
            }
            let id = format!("{}-{number}", group.unwrap_or("alone"));
            start(bench, group, &id)?;
            pods.push(id);
            number += 1;
            end_stuck(bench, pods)?;
        }
        thread::sleep(SETTLE);
        seen.push((count as f64, available()?));
        // Merging takes long; what was seen before it is told at once.
        let so_far = match seen.len() {
            1 => String::new(),
            _ => format!(", {:.1} MiB each by their slope", -mib(slope(&seen))),
        };
        progress(&format!("{count} pods{so_far}"));
    }
    Ok(seen)
}

/// Ends pods whose guest does not come to rest: in the emulator, an interrupt
/// of the host that comes together with one of a guest now and then lets the
/// guest run on with interrupts where there may be none, and it waits for its
/// own lock for ever. That costs a hundred times what an idle guest does.
fn end_stuck(bench: &Bench, pods: &mut Vec<String>) -> Result<()> {
    let list = bulkhead(bench, &["list"])?;
    let machines = list["sandboxes"].as_array().context("no sandboxes")?;
    let pid = |machine: &Value| machine["vmm_pid"].as_u64();
    let times = || -> Vec<Option<f64>> {
        let all = machines.iter();
        all.map(|machine| cpu_seconds(pid(machine)?)).collect()
    };
    let before = times();
    thread::sleep(GLANCE);
    for ((machine, before), after) in machines.iter().zip(before).zip(times()) {
        let (Some(before), Some(after)) = (before, after) else {
            continue;
        };
        let id = machine["id"].as_str().context("a sandbox without an id")?;
        if after - before > GLANCE.as_secs_f64() * STUCK {
            progress(&format!("{id} does not come to rest and is ended"));
            // Nothing in it would answer.
            let vmm = pid(machine).and_then(|pid| i32::try_from(pid).ok());
            kill(Pid::from_raw(vmm.context("no process")?), Signal::SIGKILL)?;
            end(bench, id)?;
            pods.retain(|pod| pod != id);
        }
    }
    Ok(())
}

/// Has everything merged that can be.
fn merge(bench: &Bench, daemon: &Daemon, pods: &mut Vec<String>) -> Result<()> {
    daemon.kick()?;
    let end = Instant::now() + LIMIT;
    // The kick is heard before the first look is over.
    loop {
        end_stuck(bench, pods)?;
        if daemon.metric("active")? == 0.0 {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("the daemon is busy after {LIMIT:?}");
        }
    }
}

/// Processor time of a process so far; none: it has ended.
fn cpu_seconds(pid: u64) -> Option<f64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let mut all = 0.0;
    for thread in threads.flatten() {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        all += text.split(' ').next()?.parse::<f64>().ok()?;
    }
    Some(all / 1e9)
}

fn start(bench: &Bench, group: Option<&str>, id: &str) -> Result<()> {
    let annotation = group.map(|group| format!("{MERGE_GROUP}={group}"));
    let mut flags = vec!["-d", "--null-io"];
    if let Some(annotation) = &annotation {
        flags.extend(["--annotation", annotation]);
    }
    let mut command = bench.containerd()?.run(BULKHEAD, &flags);
    command.args([image::ROOT_IMAGE, id, "sleep", "100000"]);
    proc::run(&mut command, LIMIT)?
        .ok()
        .context("start a pod")?;
    Ok(())
}

fn end(bench: &Bench, id: &str) -> Result<()> {
    for args in [
        ["task", "delete", "-f", id].as_slice(),
        &["container", "delete", id],
    ] {
        proc::run(bench.containerd()?.ctr().args(args), LIMIT)?.ok()?;
    }
    Ok(())
}

/// In bytes.
fn available() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|value| value.trim().strip_suffix(" kB"));
    let kib: f64 = kib.context("no MemAvailable")?.trim().parse()?;
    Ok(kib * 1024.0)
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

/// Merged pages of the pods of the first group, and of those of the second.
fn merged_pages(bench: &Bench, ours: usize) -> Result<(f64, f64)> {
    let told = bulkhead(bench, &["density"])?;
    let pods = told["pods"].as_array().context("pods")?;
    let sum = |group: &str, count: usize| -> Result<f64> {
        let of: Vec<&Value> = pods.iter().filter(|p| p["merge_group"] == group).collect();
        if of.len() != count {
            bail!("{} pods of {group}, not {count}", of.len());
        }
        let bytes = of.iter().map(|p| p["merged"].as_f64().context("merged"));
        Ok(bytes.sum::<Result<f64>>()? / 4096.0)
    };
    Ok((sum("red", ours)?, sum("blue", OTHERS)?))
}

/// What the command says, as JSON.
fn bulkhead(bench: &Bench, arguments: &[&str]) -> Result<Value> {
    let mut command = std::process::Command::new(bench.products.program("bulkhead"));
    command.arg("--config").arg(&bench.config);
    command.args(arguments).args(["--format", "json"]);
    let told = proc::run(&mut command, LIMIT)?.ok()?.stdout;
    serde_json::from_slice(&told).context("bulkhead's JSON")
}

/// Of the line that fits best.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let over: f64 = points.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    let under: f64 = points.iter().map(|p| (p.0 - x).powi(2)).sum();
    over / under
}

#[cfg(test)]
mod tests {
    use super::slope;

    #[test]
    fn a_line_has_its_slope() {
        assert_eq!(
            slope(&[(4.0, 92.0), (8.0, 84.0), (16.0, 68.0), (32.0, 36.0)]),
            -2.0
        );
    }
}
