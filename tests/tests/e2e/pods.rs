// SPDX-License-Identifier: Apache-2.0
//! What pods live through: containers one after the other, many execs, people
//! who look in.

use std::env;
use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{ensure, Context as _, Result};
use bulkhead_tests::cri::{INLINE, INLINE_MEMORY_MIB};
use bulkhead_tests::proc;
use serde_json::json;

use crate::context::{mentions, same, until, Context, Skip};
use crate::pod::{Pod, PATIENCE};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    an_init_container_and_a_sidecar_restarted_ten_times,
    attach_and_exec_with_a_time_limit,
    many_execs_in_a_pod,
    a_runtime_handlers_own_configuration,
];

/// Restarts of the sidecar.
const RESTARTS: u32 = 10;

/// Environment variable with how many execs there are to be.
const EXECS: &str = "BULKHEAD_EXECS";
/// Without it; a box does one or two in a second.
const FEW_EXECS: u32 = 20;
const AT_A_TIME: u32 = 4;

fn an_init_container_and_a_sidecar_restarted_ten_times(context: &Context) -> Result<()> {
    let pod = Pod::run(context, "long", json!({}))?;
    let volume = pod.dir.join("volume");
    fs::create_dir_all(&volume)?;
    let mounted = json!({ "mounts": [{ "container_path": "/data", "host_path": volume }] });

    // It runs to its end, and stays there, ended, while the others run.
    let init = pod.start("init", "echo prepared >/data/prepared", mounted.clone())?;
    same(&pod.ended(&init)?["exitCode"], &json!(0))?;
    same(fs::read_to_string(volume.join("prepared"))?, "prepared\n")?;

    let serve = "test -e /data/prepared && httpd -p 127.0.0.1:8080 -h /data && echo up && \
                 exec sleep 4444";
    let main = pod.start("main", serve, mounted.clone())?;
    pod.logged(&main, "up")?;
    for attempt in 0..RESTARTS {
        let mut config = mounted.clone();
        config["metadata"] = json!({ "attempt": attempt });
        config["log_path"] = json!(format!("sidecar-{attempt}.log"));
        let script = format!("wget -q -O - http://127.0.0.1:8080/prepared; exit {attempt}");
        let sidecar = pod.start("sidecar", &script, config)?;
        let status = pod.ended(&sidecar)?;
        same(&status["exitCode"], &json!(attempt)).with_context(|| format!("run {attempt}"))?;
        pod.logged(&sidecar, "prepared")?;
        // A kubelet keeps one that has ended until the next one runs.
        if attempt % 2 == 0 {
            pod.cri.crictl(&["rm", &sidecar])?.ok()?;
        }
    }
    same(&pod.status(&main)?["state"], &json!("CONTAINER_RUNNING"))?;
    same(&pod.status(&init)?["state"], &json!("CONTAINER_EXITED"))?;
    let programs = pod.sh(&main, "ps -o args")?;
    ensure!(!programs.contains("wget"), "{programs}");
    pod.remove()
}

fn attach_and_exec_with_a_time_limit(context: &Context) -> Result<()> {
    let pod = Pod::run(context, "visited", json!({}))?;
    let shell = pod.start(
        "shell",
        "while read line; do echo \"heard $line\"; done; echo over; exec sleep 3333",
        json!({ "stdin": true, "stdin_once": true }),
    )?;
    let mut attach = pod.cri.command();
    attach
        .args(["attach", "-i", &shell])
        .stderr(Stdio::inherit());
    let heard = proc::run_with(&mut attach, Some(b"one\ntwo\n".to_vec()), PATIENCE);
    // With its input it has closed the container's; what is said until it
    // hears of that is the container's log at the latest.
    for words in ["heard one", "heard two", "over"] {
        pod.logged(&shell, words)
            .with_context(|| format!("{heard:?}"))?;
    }

    let other = pod.start("other", "exec sleep 2222", json!({}))?;
    let begin = Instant::now();
    let late = pod.cri.crictl(&[
        "exec",
        "-s",
        "--timeout",
        "3",
        &other,
        "sh",
        "-c",
        "sleep 86399; true",
    ])?;
    ensure!(late.code != 0, "an exec beyond its time limit succeeds");
    mentions(&late.err(), &["deadline", "timeout", "timed out"])?;
    ensure!(begin.elapsed() < PATIENCE, "it has waited for its end");
    until(PATIENCE, "the end of what ran too long", || {
        Ok(!pod.sh(&other, "ps -o args")?.contains("sleep 86399; true"))
    })?;
    same(pod.sh(&other, "echo still here")?, "still here")?;
    pod.remove()
}

fn many_execs_in_a_pod(context: &Context) -> Result<()> {
    let execs = match env::var(EXECS) {
        Ok(text) if !text.is_empty() => text.parse().with_context(|| format!("{EXECS}={text}"))?,
        _ => FEW_EXECS,
    };
    let pod = Pod::run(context, "busy", json!({}))?;
    let container = pod.start("worker", "exec sleep 1111", json!({}))?;
    let next = AtomicU32::new(0);
    let begin = Instant::now();
    let failures: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME)
            .map(|_| {
                scope.spawn(|| {
                    let mut failures = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= execs {
                            return failures;
                        }
                        let said = pod.sh(&container, &format!("echo run {number}"));
                        match said {
                            Ok(said) if said == format!("run {number}") => {}
                            Ok(said) => failures.push(format!("{number}: {said:?}")),
                            Err(error) => failures.push(format!("{number}: {error:#}")),
                        }
                    }
                })
            })
            .collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined
            .flat_map(|failures| failures.expect("it does not panic"))
            .collect()
    });
    let took = begin.elapsed();
    println!("{execs} execs in {took:?}");
    ensure!(failures.is_empty(), "{} fail: {failures:?}", failures.len());
    // Nothing stays of them.
    let programs = pod.sh(&container, "ps -o args")?;
    ensure!(!programs.contains("echo run"), "{programs}");
    same(
        &pod.status(&container)?["state"],
        &json!("CONTAINER_RUNNING"),
    )?;
    pod.remove()
}

/// In MiB, as a guest's kernel sees it.
fn memory_of(pod: &Pod) -> Result<u32> {
    let container = pod.start("idle", "exec sleep 999", json!({}))?;
    let text = pod.sh(&container, "grep MemTotal /proc/meminfo")?;
    let kib = text.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    Ok(kib.map_or(0, |kib: u32| kib / 1024))
}

fn a_runtime_handlers_own_configuration(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let version = context
        .cri()?
        .json(&["version", "-o", "json"])
        .or_else(|_| {
            let done = context.cri()?.crictl(&["version"])?.ok()?;
            Ok::<_, anyhow::Error>(json!(done.out()))
        })?;
    if version.to_string().contains("1.6.") {
        let why = "containerd 1.6 gives a runtime no inline configuration";
        return Err(Skip(why.into()).into());
    }
    let plain = Pod::run(context, "plain", json!({}))?;
    let usual = memory_of(&plain)?;
    plain.remove()?;
    let inline = Pod::run_with(context, INLINE, "inline", json!({}))?;
    let memory = memory_of(&inline)?;
    inline.remove()?;
    ensure!(
        memory <= INLINE_MEMORY_MIB && memory > INLINE_MEMORY_MIB * 3 / 4,
        "{memory} MiB, {usual} MiB without"
    );
    ensure!(
        !(INLINE_MEMORY_MIB * 3 / 4..=INLINE_MEMORY_MIB).contains(&usual),
        "{usual} MiB"
    );
    Ok(())
}
