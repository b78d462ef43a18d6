// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-ksm-throttler` with the kernel's own KSM.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Instant;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::{proc, Mergeable};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::context::{mentions, same, until, Context, Skip, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    ksm_throttler_merges_and_restores,
    ksm_throttler_comes_back_after_sigkill,
    ksm_throttler_hears_a_pod_start,
    ksm_throttler_refuses_a_read_only_sysfs,
];

const KSM: &str = "/sys/kernel/mm/ksm";
/// 32 MiB.
const PAGES: usize = 8192;
/// The daemon's bound on ksmd, as it is by default.
const SHARE: f64 = 0.5;
/// What a coarse clock, the first step, and a box that stands still for a
/// moment while it is ksmd's turn may add to it, in seconds.
const SLACK: f64 = 1.0;

/// Values that no default is like.
const FOUND: [(&str, &str); 3] = [
    ("run", "0"),
    ("pages_to_scan", "77"),
    ("sleep_millisecs", "333"),
];

fn read(name: &str) -> Result<String> {
    let path = Path::new(KSM).join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().to_owned())
}

pub fn number(name: &str) -> Result<u64> {
    read(name)?.parse().with_context(|| name.to_owned())
}

fn write(name: &str, value: &str) -> Result<()> {
    let path = Path::new(KSM).join(name);
    fs::write(&path, value).with_context(|| format!("{}: {value}", path.display()))
}

/// The settings, which are the host's again in the end.
pub struct Settings(BTreeMap<&'static str, String>);

impl Settings {
    /// Sets [`FOUND`].
    pub fn take() -> Result<Self> {
        if !Path::new(KSM).join("run").exists() {
            return Err(Skip(format!("this kernel has no {KSM}")).into());
        }
        let mut before = BTreeMap::new();
        for (name, _) in FOUND {
            before.insert(name, read(name)?);
        }
        let settings = Self(before);
        // Nothing is left of what earlier tests have merged: ksmd would forget
        // it only while it scans.
        write("run", "2")?;
        for (name, value) in FOUND {
            write(name, value)?;
        }
        Ok(settings)
    }

    fn are_as_found() -> Result<()> {
        for (name, value) in FOUND {
            same(read(name)?, value).context(name)?;
        }
        Ok(())
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            // Best effort after an error.
            let _ = write(name, value);
        }
    }
}

pub struct Daemon {
    child: Child,
    metrics: PathBuf,
    log: PathBuf,
}

impl Daemon {
    fn command(context: &Context) -> Command {
        let state_dir = &context.config.state_dir;
        let mut command = Command::new(context.products.program("bulkhead-ksm-throttler"));
        command
            // Where shims with this configuration kick.
            .arg("--socket")
            .arg(state_dir.join("ksm.sock"))
            .arg("--metrics-socket")
            .arg(state_dir.join("ksm-metrics.sock"))
            .arg("--state-file")
            .arg(state_dir.join("ksm-state.json"));
        command
    }

    pub fn start(context: &Context) -> Result<Self> {
        let log = context.dir.join("ksm.log");
        let child = Self::command(context)
            .args(["--log-level", "debug"])
            .stderr(File::create(&log)?)
            .spawn()
            .context("run bulkhead-ksm-throttler (make binaries)")?;
        let mut daemon = Self {
            child,
            metrics: context.config.state_dir.join("ksm-metrics.sock"),
            log,
        };
        until(LIMIT, "the daemon to answer", || {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("it ended ({status}): {}", daemon.log());
            }
            Ok(UnixStream::connect(&daemon.metrics).is_ok())
        })?;
        Ok(daemon)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn metric(&self, name: &str) -> Result<f64> {
        let mut stream = UnixStream::connect(&self.metrics)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        text.lines()
            .find_map(|line| line.strip_prefix(&format!("bulkhead_ksm_{name} ")))
            .with_context(|| format!("no {name} in {text}"))?
            .parse()
            .context("a number")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    pub fn end(mut self, signal: Signal) -> Result<i32> {
        self.signal(signal)?;
        let mut code = None;
        until(LIMIT, "the daemon to end", || {
            code = self.child.try_wait()?.map(proc::code_of);
            Ok(code.is_some())
        })?;
        code.context("it has ended")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // After an error. It puts the settings back.
            let _ = self.signal(Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

fn kick(context: &Context) -> Result<()> {
    let path = context.config.state_dir.join("ksm.sock");
    UnixDatagram::unbound()?
        .send_to(b"test", path)
        .context("kick")?;
    Ok(())
}

/// ksmd's processor time in seconds.
fn ksmd_seconds() -> Result<f64> {
    for entry in fs::read_dir("/proc")? {
        let dir = entry?.path();
        let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        if comm.trim() == "ksmd" {
            let stat = fs::read_to_string(dir.join("stat"))?;
            let (_, rest) = stat.rsplit_once(')').context("a name")?;
            let words: Vec<&str> = rest.split_whitespace().collect();
            let ticks = words[11].parse::<f64>()? + words[12].parse::<f64>()?;
            return Ok(ticks / 100.0);
        }
    }
    bail!("no ksmd")
}

fn ksm_throttler_merges_and_restores(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    let daemon = Daemon::start(context)?;
    same(number("pages_sharing")?, 0)?;
    let (begin, cpu) = (Instant::now(), ksmd_seconds()?);
    let memory = Mergeable::new(PAGES)?;
    kick(context)?;
    until(LIMIT, "identical pages to be merged", || {
        Ok(number("pages_sharing")? >= PAGES as u64 * 9 / 10)
    })
    .with_context(|| daemon.log())?;
    let took = begin.elapsed();

    let mut status = Command::new(context.products.program("bulkhead"));
    status.env("BULKHEAD_CONFIG", context.dir.join("config.toml"));
    status.args(["ksm", "status"]);
    let text = proc::run(&mut status, LIMIT)?.ok()?.out();
    mentions(&text, &["daemon:     running"])?;
    let json = proc::run(status.args(["--format", "json"]), LIMIT)?.ok()?;
    let json: serde_json::Value = serde_json::from_slice(&json.stdout)?;
    let saved = json["saved_bytes"].as_u64().context("saved_bytes")?;
    if saved < PAGES as u64 * 4096 * 9 / 10 {
        bail!("status tells {saved} bytes: {json}");
    }

    // The run ends by itself, and what is merged stays so.
    until(LIMIT, "the run to end", || {
        Ok(daemon.metric("active")? == 0.0)
    })
    .with_context(|| daemon.log())?;
    Settings::are_as_found().context("when idle")?;
    let used = ksmd_seconds()? - cpu;
    let wall = begin.elapsed().as_secs_f64();
    if used > SHARE * wall + SLACK {
        bail!("ksmd used {used} s in {wall} s: {}", daemon.log());
    }
    let merged = daemon.metric("merged_pages_total")?;
    println!(
        "merged {merged} pages, most of them {:.1} s after the kick; ksmd used {used:.2} s in {wall:.1} s, {:.0} pages a second of it",
        took.as_secs_f64(),
        merged / used.max(0.01)
    );

    // In the middle of a run.
    kick(context)?;
    until(LIMIT, "another run", || Ok(read("run")? == "1"))?;
    same(daemon.end(Signal::SIGTERM)?, 0)?;
    Settings::are_as_found().context("in the end")?;
    drop(memory);
    Ok(())
}

fn ksm_throttler_comes_back_after_sigkill(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    let daemon = Daemon::start(context)?;
    kick(context)?;
    until(LIMIT, "a run", || Ok(read("run")? == "1"))?;
    daemon.end(Signal::SIGKILL)?;
    if Settings::are_as_found().is_ok() {
        bail!("nothing was left to put back");
    }
    let daemon = Daemon::start(context)?;
    until(LIMIT, "it to find what was left", || {
        Ok(daemon.log().contains("found by a daemon that died"))
    })?;
    until(LIMIT, "its first run to end", || {
        Ok(daemon.metric("runs_total")? == 1.0 && daemon.metric("active")? == 0.0)
    })?;
    Settings::are_as_found().context("when idle")?;
    same(daemon.end(Signal::SIGINT)?, 0)?;
    Settings::are_as_found().context("in the end")
}

fn ksm_throttler_hears_a_pod_start(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    // Without a daemon a pod starts all the same, and with one it kicks.
    context.sh("exit 0")?.ok()?;
    let daemon = Daemon::start(context)?;
    same(daemon.metric("kicks_total")?, 0.0)?;
    context.sh("exit 0")?.ok()?;
    until(
        LIMIT,
        "the kick",
        || Ok(daemon.metric("kicks_total")? > 0.0),
    )?;
    same(daemon.metric("kicks_total")?, 1.0)?;
    same(daemon.end(Signal::SIGTERM)?, 0)?;
    Settings::are_as_found()
}

fn ksm_throttler_refuses_a_read_only_sysfs(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let _settings = Settings::take()?;
    let daemon = Daemon::command(context);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg("mount -o remount,bind,ro /sys && exec \"$@\"")
        .arg("sh")
        .arg(daemon.get_program())
        .args(daemon.get_args());
    let done = proc::run(&mut command, LIMIT)?;
    if done.code == 0 {
        bail!("it took it");
    }
    mentions(&done.err(), &["/sys/kernel/mm/ksm/run is not writable"])?;
    Settings::are_as_found()
}
