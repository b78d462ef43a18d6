// SPDX-License-Identifier: Apache-2.0
//! One guest with more than it bears, and with very many containers. The
//! numbers are small for an emulated machine; `BULKHEAD_AGENT_LOAD=full`
//! (`make test-guest-load`) makes them what a guest has to stand.

use std::fs;
use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::{
    ContainerRequest, Empty, SignalProcessRequest, WaitProcessReply, WaitProcessRequest,
};
use bulkhead_agent_protocol::oci;
use bulkhead_tests::guest::{specification, Guest};
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Size;
use serde_json::json;

use crate::context::{same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    fork_bombs_and_memory_hogs_leave_the_agent_alive,
    very_many_containers_and_processes_in_one_guest
];

/// The shared directory's root file system.
pub const ROOT: &str = "root";

/// The whole number, or one that an emulated machine can bear.
fn number(full: usize, quick: usize) -> usize {
    match std::env::var("BULKHEAD_AGENT_LOAD").as_deref() {
        Ok("full") => full,
        _ => quick,
    }
}

/// One with so many MiB and a root file system in its shared directory.
pub fn guest(context: &Context, start: Start, name: &str, memory_mib: u32) -> Result<Guest> {
    let size = Size {
        memory_mib,
        ..Size::default()
    };
    let guest = context.guest(start, name, size)?;
    let root = guest.shared().join(ROOT);
    fill(&root).with_context(|| format!("fill {}", root.display()))?;
    Ok(guest)
}

pub fn fill(root: &Path) -> Result<()> {
    for below in ["bin", "proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(root.join(below))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    for name in ["cat", "dd", "echo", "mkdir", "sh", "sleep"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    Ok(())
}

fn spec(id: &str, args: &[&str]) -> Result<oci::Spec> {
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
    let mount =
        |kind: &str, place: &str| json!({"type": kind, "source": kind, "destination": place});
    let config = json!({
        "ociVersion": "1.1.0",
        "process": {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev"), mount("tmpfs", "/run")],
        "linux": {"namespaces": namespaces},
    });
    specification(&config, id, ROOT)
}

pub fn process(args: &[&str]) -> Result<oci::Process> {
    Ok(spec("x", args)?.process.unwrap_or_default())
}

fn request(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

fn run(guest: &Guest, id: &str, args: &[&str]) -> Result<()> {
    guest.create(id, spec(id, args)?)?;
    guest.start(id)
}

fn check(guest: &Guest) -> Result<()> {
    guest.wait_for(guest.agent().check(Empty::new())).map(drop)
}

pub async fn end(guest: &Guest, id: &str) -> Result<WaitProcessReply> {
    let request = WaitProcessRequest {
        container_id: id.into(),
        ..Default::default()
    };
    Ok(guest.agent().wait_process(request).await?)
}

pub fn kill(guest: &Guest, id: &str) -> Result<()> {
    let request = SignalProcessRequest {
        container_id: id.into(),
        signal: libc::SIGKILL as u32,
        all: true,
        ..Default::default()
    };
    guest
        .wait_for(guest.agent().signal_process(request))
        .map(drop)
}

fn processes(guest: &Guest, id: &str) -> Result<u64> {
    let stats = guest.wait_for(guest.agent().stats_container(request(id)))?;
    Ok(stats.pids.current)
}

fn says(guest: &Guest, id: &str, exec_id: &str, word: &str) -> Result<()> {
    let done = guest.exec(id, exec_id, process(&["echo", word])?)?.1.ok()?;
    same(String::from_utf8_lossy(&done).trim_end(), word)?;
    guest.forget(id, exec_id)
}

/// Of a guest of 128 MiB, whose kernel has some thirty.
const HOGGED: u64 = 64 << 20;

/// Containers without any limit take all processes, and all memory.
fn fork_bombs_and_memory_hogs_leave_the_agent_alive(context: &Context) -> Result<()> {
    let guest = guest(context, Start::Cold, "overload", 128)?;
    run(&guest, "neighbour", &["sleep", "9999"])?;

    run(
        &guest,
        "bomb",
        &["sh", "-c", "b() { b | b & }; while :; do b; done"],
    )?;
    let begin = Instant::now();
    let wanted = number(150, 60) as u64;
    let mut most = 0;
    while most < wanted {
        ensure!(
            begin.elapsed() < LIMIT,
            "a bomb of no more than {most} processes"
        );
        most = processes(&guest, "bomb").context("the bomb's processes")?;
        check(&guest).context("while the bomb grows")?;
    }
    // It goes on meanwhile.
    for _ in 0..20 {
        check(&guest).context("while the bomb is there")?;
    }
    println!("the bomb had {most} processes");
    kill(&guest, "bomb").context("kill the bomb")?;
    same(guest.block_on(end(&guest, "bomb"))?.exit_status, 137)?;
    guest.delete("bomb")?;
    says(&guest, "neighbour", "after-bomb", "alive")?;

    // More than the guest has. The kernel may kill some of it, or all there is
    // may go on slowly; the agent answers either way.
    let script =
        "for i in 1 2 3 4; do dd if=/dev/zero of=/dev/null bs=40M & done; wait; sleep 9999";
    run(&guest, "hog", &["sh", "-c", script])?;
    let begin = Instant::now();
    loop {
        let stats = guest.wait_for(guest.agent().stats_container(request("hog")))?;
        check(&guest).context("while the hog takes memory")?;
        let taken = stats.memory.usage;
        if taken > HOGGED || stats.memory_events.oom_kill > 0 {
            println!("the hog had {} MiB", taken >> 20);
            break;
        }
        ensure!(
            begin.elapsed() < LIMIT,
            "the hog has no more than {taken} bytes"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    for _ in 0..20 {
        check(&guest).context("while there is no memory left")?;
    }
    kill(&guest, "hog").context("kill the hog")?;
    same(guest.block_on(end(&guest, "hog"))?.exit_status, 137)?;
    guest.delete("hog")?;
    says(&guest, "neighbour", "after-hog", "alive")
}

fn very_many_containers_and_processes_in_one_guest(context: &Context) -> Result<()> {
    let guest = guest(context, Start::Cold, "many", 1024)?;
    let count = number(500, 25);
    let id = |number: usize| format!("c{number}");
    let begin = Instant::now();
    for number in 0..count {
        run(&guest, &id(number), &["sleep", "9999"]).with_context(|| id(number))?;
    }
    println!("{count} containers in {:?}", begin.elapsed());

    let (execs, begin) = (number(2000, 30), Instant::now());
    for number in 0..execs {
        says(
            &guest,
            &id(number % count),
            &format!("e{number}"),
            &format!("word-{number}"),
        )?;
    }
    println!("{execs} execs in {:?}", begin.elapsed());

    let at_once = number(100, 20);
    let mut jobs: Vec<Pin<Box<dyn Future<Output = Result<()>> + '_>>> = Vec::new();
    for number in 0..at_once {
        let guest = &guest;
        let id = id(number % count);
        jobs.push(Box::pin(async move {
            let (word, name) = (format!("word-{number}"), format!("at-once-{number}"));
            let done = guest
                .exec_async(&id, &name, process(&["echo", &word])?)
                .await?
                .1
                .ok()?;
            same(String::from_utf8_lossy(&done).trim_end(), word.as_str())
        }));
    }
    guest.block_on(all(jobs))?;

    for number in 0..count {
        same(processes(&guest, &id(number))?, 1u64)?;
        kill(&guest, &id(number))?;
        same(guest.block_on(end(&guest, &id(number)))?.exit_status, 137)?;
        guest.delete(&id(number))?;
    }
    Ok(())
}

/// Drives all of them to their ends, or to the first error.
async fn all(mut jobs: Vec<Pin<Box<dyn Future<Output = Result<()>> + '_>>>) -> Result<()> {
    std::future::poll_fn(|cx| {
        let mut at = 0;
        while at < jobs.len() {
            match jobs[at].as_mut().poll(cx) {
                Poll::Pending => at += 1,
                Poll::Ready(Ok(())) => drop(jobs.swap_remove(at)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            }
        }
        match jobs.is_empty() {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    })
    .await
}
