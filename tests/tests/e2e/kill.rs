// SPDX-License-Identifier: Apache-2.0
//! SIGKILL to the VMM, to the shim and to both: containerd hears of it, and
//! everything is given back. And a VMM that the kernel kills for a system call.

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::containerd::BULKHEAD;
use bulkhead_tests::listing::{self, Process};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use crate::context::{mentions, same, until, Context, Detached, LIMIT};
use crate::host::rootfs;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    vmm_killed_is_a_task_exit_within_two_seconds,
    vmm_killed_leaves_nothing,
    vmm_killed_for_a_forbidden_call_is_told_as_such,
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

/// Has the VMM's first thread call reboot(2) where it would have called something
/// else: as if a guest had got hold of it. (SIGSYS itself would not do: the
/// first process of a namespace is spared signals that it does not handle.)
fn forbidden_call(vmm: &Process) -> Result<()> {
    let pid = Pid::from_raw(vmm.pid as i32);
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).context("seize the VMM")?;
    ptrace::interrupt(pid).context("interrupt the VMM")?;
    let wait = || waitpid(pid, Some(WaitPidFlag::__WALL));
    let stopped = wait()?;
    ensure!(
        matches!(stopped, WaitStatus::PtraceEvent(..)),
        "the VMM does not stop: {stopped:?}"
    );
    // It goes back into the call that it was in.
    ptrace::syscall(pid, None)?;
    same(wait()?, WaitStatus::PtraceSyscall(pid))?;
    let mut registers = ptrace::getregs(pid)?;
    registers.orig_rax = u64::try_from(libc::SYS_reboot)?;
    ptrace::setregs(pid, registers)?;
    ptrace::detach(pid, None).context("let go of the VMM")
}

fn vmm_killed_for_a_forbidden_call_is_told_as_such(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    const TOLD: &str = "forbidden system call";
    let root = rootfs(context)?;
    let before = context.listing()?;
    let (out, err) = (context.dir.join("run.out"), context.dir.join("run.err"));
    let mut run = Command::new(context.products.program("bulkhead"))
        .args([
            "run",
            &root,
            "--",
            "/bin/sh",
            "-c",
            "echo up; exec /bin/busybox sleep 1000",
        ])
        .env("BULKHEAD_CONFIG", context.dir.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?)
        .spawn()
        .context("run bulkhead")?;
    let told = || fs::read_to_string(&err).unwrap_or_default();
    let killed = || -> Result<()> {
        until(LIMIT, "the container", || {
            Ok(fs::read_to_string(&out)?.contains("up"))
        })
        .with_context(told)?;
        context.forbidden_call.set(true);
        forbidden_call(&the_one("bulkhead-vmm")?)?;
        until(LIMIT, "its end", || Ok(run.try_wait()?.is_some()))
    }();
    if killed.is_err() {
        // What has failed is told; it may have ended.
        let _ = run.kill();
    }
    let status = run.wait()?;
    killed?;
    ensure!(!status.success(), "it ends well");
    println!("    {}", told().trim_end());
    mentions(&told(), &[TOLD])?;

    // Of a container of containerd's, the shim's log and what is called next.
    let container = context.detached(&[], &["sleep", "1000"])?;
    let logged = context.containerd.log().len();
    forbidden_call(&the_one("bulkhead-vmm")?)?;
    container.wait_for("STOPPED", LIMIT)?;
    let log = context.containerd.log();
    mentions(log.get(logged..).unwrap_or_default(), &[TOLD])?;
    let done = context.ctr(&["task", "exec", "--exec-id", "late", &container.id, "true"])?;
    ensure!(done.code != 0, "an exec in a dead guest succeeded");
    println!("    {}", done.err());
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
