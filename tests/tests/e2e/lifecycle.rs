// SPDX-License-Identifier: Apache-2.0
//! Signals, orphans, several at once, pause and resume, figures, events.

use std::fs::File;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::timeline::Timeline;
use serde_json::Value;

use crate::context::{mentions, same, status, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    term_then_kill,
    term_is_handled,
    a_signal_to_an_exec,
    a_process_that_outlives_its_parent,
    orphans_end_with_the_container,
    three_containers_at_once,
    pause_and_resume,
    figures_are_real,
    events_come_in_order,
    a_stopped_task_keeps_its_exit_code,
    the_start_has_a_timeline,
    twenty_runs_leave_nothing,
];

fn term_then_kill(context: &Context) -> Result<()> {
    let script = "trap '' TERM; echo up; while :; do sleep 1; done";
    let mut run = context.attached(&[], &["sh", "-c", script])?;
    run.wait_for("up")?;
    let id = run.id.clone();
    context.ctr(&["task", "kill", "-s", "TERM", &id])?.ok()?;
    thread::sleep(Duration::from_secs(2));
    same(status(context, &id)?.as_str(), "RUNNING").context("after TERM, which it ignores")?;
    context.ctr(&["task", "kill", "-s", "KILL", &id])?.ok()?;
    same(run.wait(LIMIT)?, 137)
}

fn term_is_handled(context: &Context) -> Result<()> {
    let script = "trap 'echo caught; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let mut run = context.attached(&[], &["sh", "-c", script])?;
    run.wait_for("up")?;
    // The default signal of ctr is TERM.
    context.ctr(&["task", "kill", &run.id])?.ok()?;
    same(run.wait(LIMIT)?, 3)?;
    same(run.out().as_str(), "up\ncaught\n")
}

fn a_signal_to_an_exec(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let out = context.dir.join("exec.out");
    let mut child = context
        .containerd
        .ctr()
        .args(["task", "exec", "--exec-id", "victim", &container.id])
        .args(["sh", "-c", "echo up; exec sleep 1000"])
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .spawn()?;
    until(LIMIT, "the exec to start", || {
        Ok(std::fs::read_to_string(&out)?.contains("up"))
    })?;
    let kill = [
        "task",
        "kill",
        "-s",
        "TERM",
        "--exec-id",
        "victim",
        &container.id,
    ];
    context.ctr(&kill)?.ok()?;
    let code = bulkhead_tests::proc::code_of(child.wait()?);
    same(code, 143)?;
    same(container.status()?.as_str(), "RUNNING")?;
    container.remove()
}

fn a_process_that_outlives_its_parent(context: &Context) -> Result<()> {
    // The middle shell ends at once; its child goes on, with a new parent.
    let script =
        "sh -c '(sleep 2; grep PPid /proc/self/status >/tmp/parent; echo late) & echo early'; \
        echo middle; while [ ! -s /tmp/parent ]; do sleep 0.2; done; sleep 0.5; cat /tmp/parent";
    let out = context.sh(script)?.ok()?.out();
    let lines: Vec<&str> = out.lines().collect();
    same(&lines[..3], &["early", "middle", "late"][..]).with_context(|| out.clone())?;
    // grep's parent is the orphan.
    let script =
        "sh -c 'sleep 3 & echo $! >/tmp/pid'; sleep 0.5; grep PPid /proc/$(cat /tmp/pid)/status";
    same(context.sh(script)?.ok()?.out().as_str(), "PPid:\t1")?;
    // The same below an exec, which is over when its own process is.
    let container = context.detached(&[], &["sleep", "1000"])?;
    let begin = Instant::now();
    let done = container.exec(&["sh", "-c", "sleep 500 >/dev/null 2>&1 & echo started"])?;
    same(done.ok()?.out().as_str(), "started")?;
    if begin.elapsed() > LIMIT {
        bail!("the exec waited for what it left behind");
    }
    let list = container.exec(&["ps", "-o", "args"])?.ok()?.out();
    if !list.contains("sleep 500") {
        bail!("what the exec left behind is gone: {list}");
    }
    container.remove()
}

fn orphans_end_with_the_container(context: &Context) -> Result<()> {
    let begin = Instant::now();
    let done = context.sh("sleep 500 & sleep 501 & echo up; exit 6")?;
    same((done.code, done.out().as_str()), (6, "up"))?;
    if begin.elapsed() > LIMIT {
        bail!("it took {:?}", begin.elapsed());
    }
    Ok(())
}

fn three_containers_at_once(context: &Context) -> Result<()> {
    let script = "echo up; for i in 1 2 3 4 5; do sleep 1; echo $i; done; exit $CODE";
    let mut runs = Vec::new();
    for code in ["11", "12", "13"] {
        let env = format!("CODE={code}");
        let run = context.attached(&["--env", &env], &["sh", "-c", script])?;
        runs.push((run, code));
    }
    for (run, _) in &mut runs {
        run.wait_for("up")?;
    }
    let list = context.ctr(&["task", "ls"])?.ok()?.out();
    let pids: Vec<&str> = runs
        .iter()
        .filter_map(|(run, _)| {
            let line = list
                .lines()
                .find(|l| l.split_whitespace().next() == Some(&run.id))?;
            line.split_whitespace().nth(1)
        })
        .collect();
    if pids.len() < 3 || pids[0] == pids[1] || pids[1] == pids[2] || pids.contains(&"0") {
        bail!("three containers have the processes {pids:?}");
    }
    for (run, code) in &mut runs {
        same(run.wait(LIMIT)?.to_string(), *code)?;
        same(run.out().as_str(), "up\n1\n2\n3\n4\n5\n")?;
    }
    Ok(())
}

fn pause_and_resume(context: &Context) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done";
    let mut run = context.attached(&[], &["sh", "-c", script])?;
    run.wait_for("tick 3")?;
    let id = run.id.clone();
    context.ctr(&["task", "pause", &id])?.ok()?;
    same(status(context, &id)?.as_str(), "PAUSED")?;
    // What was on its way arrives.
    thread::sleep(Duration::from_secs(1));
    let paused = run.out();
    thread::sleep(Duration::from_secs(3));
    same(run.out().lines().count(), paused.lines().count()).context("ticks while paused")?;
    context.ctr(&["task", "resume", &id])?.ok()?;
    same(status(context, &id)?.as_str(), "RUNNING")?;
    let next = format!("tick {}\n", paused.lines().count() + 5);
    run.wait_for(&next)?;
    // Not one was lost or repeated.
    let out = run.out();
    for (i, line) in out.lines().enumerate() {
        same(line, format!("tick {}", i + 1))?;
    }
    context.ctr(&["task", "kill", "-s", "KILL", &id])?.ok()?;
    same(run.wait(LIMIT)?, 137)
}

/// All numbers under keys of this name, anywhere.
fn numbers(value: &Value, key: &str, found: &mut Vec<f64>) {
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                if name == key {
                    let text = inner.as_str().and_then(|s| s.parse().ok());
                    found.extend(inner.as_f64().or(text));
                }
                numbers(inner, key, found);
            }
        }
        Value::Array(list) => list.iter().for_each(|v| numbers(v, key, found)),
        _ => {}
    }
}

fn figures_are_real(context: &Context) -> Result<()> {
    // 24 MiB of memory held, and some processor time spent.
    let script = "head -c 25165824 /dev/zero >/dev/shm/held; i=0; \
        while [ $i -lt 20000 ]; do i=$((i+1)); done; touch /ready; sleep 1000";
    let container = context.detached(&[], &["sh", "-c", script])?;
    until(LIMIT, "the work to be done", || {
        Ok(container.exec(&["test", "-e", "/ready"])?.code == 0)
    })?;
    let text = context
        .ctr(&["task", "metrics", "--format", "json", &container.id])?
        .ok()?
        .out();
    let json: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let largest = |keys: &[&str]| {
        let mut found = Vec::new();
        keys.iter().for_each(|key| numbers(&json, key, &mut found));
        found.into_iter().fold(0.0, f64::max)
    };
    let memory = largest(&["usage"]);
    let cpu_us = largest(&["usage_usec"]).max(largest(&["total"]) / 1000.0);
    let pids = largest(&["current"]);
    if !(20e6..400e6).contains(&memory) {
        bail!("{memory} bytes of memory in {text}");
    }
    if !(1e3..600e6).contains(&cpu_us) {
        bail!("{cpu_us} µs of processor time in {text}");
    }
    if !(1.0..100.0).contains(&pids) {
        bail!("{pids} processes in {text}");
    }
    container.remove()
}

fn events_come_in_order(context: &Context) -> Result<()> {
    let file = context.dir.join("events");
    let mut watcher = context
        .containerd
        .ctr()
        .arg("events")
        .stdin(Stdio::null())
        .stdout(File::create(&file)?)
        .spawn()?;
    let watched = watch_events(context, &file);
    // It would run for ever.
    watcher.kill()?;
    watcher.wait()?;
    watched
}

fn watch_events(context: &Context, file: &std::path::Path) -> Result<()> {
    // The subscription stands some time after its process.
    thread::sleep(Duration::from_secs(2));
    let container = context.detached(&[], &["sleep", "1000"])?;
    same(container.exec(&["sh", "-c", "exit 5"])?.code, 5)?;
    context.ctr(&["task", "pause", &container.id])?.ok()?;
    context.ctr(&["task", "resume", &container.id])?.ok()?;
    let id = container.id.clone();
    container.remove()?;
    let topics = || -> Result<Vec<String>> {
        let text = std::fs::read_to_string(file)?;
        Ok(text
            .lines()
            .filter(|l| l.contains(&format!("\"{id}\"")))
            .flat_map(|l| l.split_whitespace())
            .filter(|w| w.starts_with("/tasks/"))
            .map(str::to_owned)
            .collect())
    };
    let want = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    let begin = Instant::now();
    while topics()?.len() < want.len() && begin.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(100));
    }
    // runc's shim tells the deletion of an exec too.
    let got: Vec<String> = topics()?;
    let mut rest = got.iter();
    for topic in want {
        if !rest.any(|t| t == topic) {
            bail!("no {topic} at its place in {got:?}");
        }
    }
    Ok(())
}

fn a_stopped_task_keeps_its_exit_code(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sh", "-c", "exit 23"])?;
    container.wait_for("STOPPED", LIMIT)?;
    // Some versions of ctr exit with the task's code, others tell it.
    let done = context.ctr(&["task", "delete", &container.id])?;
    if done.code != 23 {
        mentions(&done.err(), &["exit code 23"])?;
    }
    same(status(context, &container.id)?.as_str(), "")?;
    context.ctr(&["container", "delete", &container.id])?.ok()?;
    Ok(())
}

fn the_start_has_a_timeline(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.containerd.log().len();
    context.sh("echo x")?.ok()?;
    let mut timeline = None;
    until(LIMIT, "a timeline in the log", || {
        let log = context.containerd.log();
        timeline = Timeline::find(log.get(before..).unwrap_or_default());
        Ok(timeline.is_some())
    })?;
    let stamps = timeline.context("no timeline")?.0;
    if stamps.windows(2).any(|w| w[1] < w[0]) || stamps[6] <= 0.0 {
        bail!("the stamps are {stamps:?}");
    }
    Ok(())
}

fn twenty_runs_leave_nothing(context: &Context) -> Result<()> {
    let before = context.listing()?;
    for n in 0..20 {
        let done = context.sh(&format!("echo {n}; exit {n}"))?;
        same((done.code, done.out()), (n, n.to_string())).with_context(|| done.err())?;
    }
    context.nothing_left(&before, LIMIT)
}
