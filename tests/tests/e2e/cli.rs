// SPDX-License-Identifier: Apache-2.0
//! The operator's side: what `bulkhead` tells of containerd's pods and does
//! with them, the configuration, annotations and runtime options.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context as _, Result};
use bulkhead_runtime::operator::client;
use bulkhead_tests::proc::{self, Done};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

use crate::context::{mentions, same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    cli_tells_of_a_pod_and_runs_commands_in_it,
    cli_copies_files_and_looks_into_the_guest,
    cli_lists_silent_and_dead_shims,
    cli_tells_the_configuration,
    annotations_are_allowed_by_name,
    runtime_options_name_a_configuration,
];

/// How long a command may take to see what has just happened.
const SOON: Duration = Duration::from_secs(90);

fn command(context: &Context, args: &[&str]) -> Command {
    let mut command = Command::new(context.products.program("bulkhead"));
    command
        .env("BULKHEAD_CONFIG", context.dir.join("config.toml"))
        .args(args);
    command
}

pub fn bulkhead(context: &Context, args: &[&str]) -> Result<Done> {
    proc::run(&mut command(context, args), LIMIT)
}

/// What `bulkhead list` tells of a sandbox, or nothing.
pub fn listed(context: &Context, id: &str) -> Result<Value> {
    let text = bulkhead(context, &["list", "--format", "json"])?
        .ok()?
        .out();
    let all: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let found = all["sandboxes"].as_array().context("sandboxes")?;
    let found = found.iter().find(|found| found["id"] == id);
    Ok(found.cloned().unwrap_or_default())
}

fn signal(pid: &Value, signal: Signal) -> Result<()> {
    let pid = pid.as_i64().context("no process")?;
    kill(Pid::from_raw(pid.try_into()?), signal).context("send a signal")
}

/// The value of a metric with this container's or sandbox's name in it.
fn metric(text: &str, family: &str, of: &str) -> Result<f64> {
    let begin = format!("bulkhead_{family}{{");
    let line = text
        .lines()
        .find(|line| line.starts_with(&begin) && line.contains(&format!("\"{of}\"")));
    let value = line.and_then(|line| line.rsplit(' ').next());
    value
        .with_context(|| format!("{family} of {of} in {text}"))?
        .parse()
        .context("a number")
}

/// A `bulkhead events --follow` of one sandbox.
struct Follower {
    child: Child,
    file: std::path::PathBuf,
}

impl Follower {
    fn start(context: &Context, id: &str) -> Result<Self> {
        let file = context.dir.join("events.out");
        let child = command(context, &["events", "--follow", id])
            .stdin(Stdio::null())
            .stdout(fs::File::create(&file)?)
            .spawn()?;
        Ok(Self { child, file })
    }

    fn told(&self, what: &str) -> Result<bool> {
        Ok(fs::read_to_string(&self.file)?.contains(what))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It has ended, but after an error.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.file);
    }
}

fn cli_tells_of_a_pod_and_runs_commands_in_it(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let container = context.detached(&["--env", "COLOUR=red"], &["sleep", "1000"])?;
    let id = container.id.as_str();

    let found = listed(context, id)?;
    same(&found["status"], "running")?;
    same(&found["state"]["containers"][0]["status"], "running")?;
    let text = bulkhead(context, &["list"])?.ok()?.out();
    let line = text
        .lines()
        .find(|line| line.contains(id))
        .context("list")?;
    mentions(line, &["1/1"])?;
    let text = bulkhead(context, &["state", id])?.ok()?.out();
    println!("{text}");
    for step in ["kernel_entry", "agent_ready", "container_started"] {
        mentions(&text, &[step])?;
    }

    let mut follower = Follower::start(context, id)?;
    until(SOON, "the past to be told", || follower.told("container=")).context("events")?;

    let script = "echo $COLOUR $SIZE; pwd; echo bad >&2; exit 7";
    let flags = ["exec", "--env", "SIZE=big", "--cwd", "/tmp", id, "--"];
    let done = bulkhead(context, &[&flags[..], &["sh", "-c", script]].concat())?;
    same(done.code, 7).with_context(|| format!("{} {}", done.out(), done.err()))?;
    same(done.out().as_str(), "red big\n/tmp")?;
    same(done.err().as_str(), "bad")?;
    // Of standard input all arrives, and its end.
    let input = "0123456789abcde\n".repeat(20_000);
    let mut count = command(context, &["exec", "-i", id, "--", "wc", "-c"]);
    let done = proc::run_with(&mut count, Some(input.clone().into_bytes()), LIMIT)?.ok()?;
    same(done.out().trim(), input.len().to_string().as_str())?;
    let done = bulkhead(context, &["exec", "--user", "5:6", id, "--", "id", "-u"])?;
    same(done.ok()?.out().as_str(), "5")?;
    let done = bulkhead(context, &["exec", id, "--", "no-such-program"])?;
    same(done.code, 125)?;
    mentions(&done.err(), &["no-such-program"])?;
    let done = bulkhead(context, &["exec", "nobody", "--", "true"])?;
    same(done.code, 3)?;
    mentions(&done.err(), &["nobody"])?;

    let text = bulkhead(context, &["metrics"])?.ok()?.out();
    same(metric(&text, "sandbox_up", id)?, 1.0)?;
    same(metric(&text, "sandbox_agent_up", id)?, 1.0)?;
    for family in [
        "container_pids",
        "container_memory_usage_bytes",
        "process_resident_memory_bytes",
        "sandbox_start_seconds",
        "sandbox_events_total",
    ] {
        if metric(&text, family, id)? <= 0.0 {
            bail!("{family} is nothing: {text}");
        }
    }
    mentions(&text, &["bulkhead_node_sandboxes{status=\"running\"} 1"])?;
    // As a collector reads them, without this program.
    let directory = found["directory"].as_str().context("directory")?;
    let scraped = client::get(&Path::new(directory).join("o"), "/metrics", SOON)?;
    same(metric(&scraped, "sandbox_up", id)?, 1.0)?;

    let log = bulkhead(context, &["logs", id])?.ok()?.out();
    mentions(&log, &["sandbox started"])?;
    if let Some(line) = log.lines().find(|l| !l.contains(&format!("sandbox={id}"))) {
        bail!("a line without its sandbox: {line}");
    }
    bulkhead(context, &["logs", "--console", id])?.ok()?;
    let events = bulkhead(context, &["events", id])?.ok()?.out();
    for event in ["sandbox-started", "exec-added", "status=7"] {
        mentions(&events, &[event])?;
    }

    container.remove()?;
    until(SOON, "the events to end", || {
        Ok(follower.child.try_wait()?.is_some())
    })?;
    same(follower.told("exited")?, true)?;
    drop(follower);
    same(bulkhead(context, &["state", "no-such"])?.code, 3)?;
    context.nothing_left(&before, Duration::from_secs(10))
}

fn cli_lists_silent_and_dead_shims(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let container = context.detached(&[], &["sleep", "1000"])?;
    let id = container.id.clone();
    let found = listed(context, &id)?;
    signal(&found["pid"], Signal::SIGSTOP)?;
    let silent = listed(context, &id);
    let metrics = bulkhead(context, &["metrics"]);
    signal(&found["pid"], Signal::SIGCONT)?;
    same(&silent?["status"], "silent")?;
    mentions(
        &metrics?.ok()?.out(),
        &["bulkhead_node_sandboxes{status=\"silent\"} 1"],
    )?;
    same(&listed(context, &id)?["status"], "running")?;

    // While containerd cannot clean up.
    let containerd = context.containerd.pid().context("containerd")?;
    let containerd = Value::from(containerd);
    signal(&containerd, Signal::SIGSTOP)?;
    signal(&found["pid"], Signal::SIGKILL)?;
    let dead = until(SOON, "the shim to be dead", || {
        Ok(listed(context, &id)?["status"] == "dead")
    });
    let logs = bulkhead(context, &["logs", &id]);
    let exec = bulkhead(context, &["exec", &id, "--", "true"]);
    signal(&containerd, Signal::SIGCONT)?;
    dead?;
    mentions(&logs?.ok()?.out(), &["sandbox started"])?;
    let exec = exec?;
    same(exec.code, 125)?;
    mentions(&exec.err(), &["it is dead"])?;
    until(SOON, "containerd to clean up", || {
        context.ctr(&["task", "delete", "-f", &id])?;
        Ok(container.status()?.is_empty())
    })?;
    context.ctr(&["container", "delete", &id])?.ok()?;
    context.nothing_left(&before, SOON)
}

fn cli_copies_files_and_looks_into_the_guest(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let container = context.detached(&[], &["sleep", "1000"])?;
    let id = container.id.as_str();
    let (here, back) = (context.dir.join("here"), context.dir.join("back"));
    let contents: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(&here, &contents)?;
    let name = |path: &std::path::Path| path.display().to_string();
    let inside = |path: &str| format!("{id}:{path}");
    let copy = |from: &str, to: &str| bulkhead(context, &["cp", "--owner", "7:8", from, to]);
    copy(&name(&here), &inside("/tmp/"))?.ok()?;
    let done = bulkhead(
        context,
        &["exec", id, "--", "stat", "-c", "%s %u:%g", "/tmp/here"],
    )?;
    same(done.ok()?.out().trim(), "2000000 7:8")?;
    copy(&inside("/tmp/here"), &name(&back))?.ok()?;
    if fs::read(&back)? != contents {
        bail!("another file came back");
    }
    let script = "ln -s /etc/shadow /tmp/link; echo inside > /etc/shadow";
    bulkhead(context, &["exec", id, "--", "sh", "-c", script])?.ok()?;
    copy(&inside("/tmp/link"), &name(&back))?.ok()?;
    same(fs::read_to_string(&back)?.as_str(), "inside\n")?;
    for (from, to, why) in [
        (inside("/tmp"), name(&back), "is a directory"),
        (inside("/none"), name(&back), "No such file"),
        (name(&here), inside("/no/where"), "No such file"),
        (name(&here), name(&back), "NAME:PATH"),
        (name(&here), inside("relative"), "path"),
    ] {
        let done = copy(&from, &to)?;
        same(done.code, 125).with_context(|| format!("{from} {to}"))?;
        mentions(&done.err(), &[why])?;
    }
    same(fs::read_to_string(&back)?.as_str(), "inside\n")?;
    fs::remove_file(&here)?;
    fs::remove_file(&back)?;

    let log = bulkhead(context, &["logs", "--kernel", id])?.ok()?.out();
    mentions(&log, &["Linux version", "] "])?;
    let text = bulkhead(context, &["metrics"])?.ok()?.out();
    for family in ["guest_memory_bytes", "guest_threads"] {
        if metric(&text, family, id)? <= 0.0 {
            bail!("{family} is nothing: {text}");
        }
    }
    mentions(&text, &["kind=\"MemAvailable\"", "bulkhead_guest_load{"])?;

    // Into the guest itself only where that is configured.
    let script = "echo $1; cat /proc/1/comm /proc/self/cgroup";
    let look = ["exec", "--guest", id, "--", "sh", "-c", script, "x", "word"];
    let done = bulkhead(context, &look)?;
    same(done.code, 125)?;
    mentions(&done.err(), &["agent.debug_shell"])?;
    container.remove()?;

    let drop_ins = context.dir.join("config.d");
    fs::create_dir_all(&drop_ins)?;
    let program = bulkhead_tests::install::which("busybox").context("busybox is missing")?;
    let text = format!(
        "[agent]\ndebug_shell = {:?}\n",
        program.display().to_string()
    );
    fs::write(drop_ins.join("debug.toml"), text)?;
    let looked = (|| {
        let container = context.detached(&[], &["sleep", "1000"])?;
        let id = container.id.as_str();
        let look = ["exec", "--guest", id, "--", "sh", "-c", script, "x", "word"];
        let done = bulkhead(context, &look)?.ok()?;
        same(
            done.out().as_str(),
            format!("word\ninit\n0::/guest-{id}").as_str(),
        )?;
        container.remove()
    })();
    fs::remove_dir_all(&drop_ins)?;
    looked?;
    context.nothing_left(&before, Duration::from_secs(10))
}

/// Runs with another configuration.
pub fn with_config<T>(
    context: &Context,
    text: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let file = context.dir.join("config.toml");
    fs::write(&file, text)?;
    let done = work();
    context.config.write(&file)?;
    done
}

fn cli_tells_the_configuration(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let text = bulkhead(context, &["config"])?.ok()?.out();
    let line = |key: &str| {
        let begin = format!("{key} = ");
        text.lines()
            .find(|line| line.starts_with(&begin))
            .with_context(|| format!("{key} in {text}"))
    };
    mentions(line("runtime.state_dir")?, &["config.toml"])?;
    mentions(line("hypervisor.max_vcpus")?, &["# default"])?;
    let done = bulkhead(context, &["check", "--config"])?.ok()?;
    mentions(&done.out(), &["ok    configuration: "])?;
    let broken = context
        .config
        .toml()
        .replacen("[agent]\n", "[agent]\nready_timeout = 5\n", 1);
    let done = with_config(context, &broken, || {
        bulkhead(context, &["check", "--config"])
    })?;
    same(done.code, 1)?;
    mentions(&done.out(), &["did you mean \"agent.ready_timeout_ms\"?"])?;

    let file = context.dir.join("documented.toml");
    let name = file.to_string_lossy().into_owned();
    fs::write(
        &file,
        bulkhead(context, &["config", "--document"])?.ok()?.out(),
    )?;
    bulkhead(context, &["check", "--config", &name])?.ok()?;
    fs::remove_file(&file)?;

    let text = bulkhead(context, &["env"])?.ok()?.out();
    mentions(&text, &["containerd:    containerd"])?;
    mentions(&text, &["hypervisor.kernel = "])?;
    mentions(
        &bulkhead(context, &["completion", "bash"])?.ok()?.out(),
        &["_bulkhead()"],
    )?;
    let pages = context.dir.join("man8");
    let name = pages.to_string_lossy().into_owned();
    bulkhead(context, &["man", &name])?.ok()?;
    mentions(
        &fs::read_to_string(pages.join("bulkhead-list.8"))?,
        &["dead ones too"],
    )?;
    fs::remove_dir_all(&pages)?;
    Ok(())
}

/// Tells the guest's memory.
const MEMORY: &[&str] = &["grep", "MemTotal", "/proc/meminfo"];

/// Fails unless that is this many MiB, less what the guest's kernel keeps.
fn has_about(mib: u64, told: &str) -> Result<()> {
    let kib = told.split_whitespace().nth(1).context("MemTotal")?;
    let found = kib.parse::<u64>()? / 1024;
    if found > mib || found + 40 < mib {
        bail!("{found} MiB of {mib}: {told}");
    }
    Ok(())
}

fn annotations_are_allowed_by_name(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let memory = "io.bulkhead.hypervisor.memory_mib";
    let sized = format!("{memory}=384");
    let done = context.run(&["--annotation", &sized], MEMORY)?.ok()?;
    has_about(384, &done.out())?;
    let refused = |annotation: &str, words: &str| -> Result<()> {
        let done = context.run(&["--annotation", annotation], &["true"])?;
        if done.code == 0 {
            bail!("{annotation} was taken");
        }
        let name = annotation.split('=').next().unwrap_or_default();
        mentions(&done.err(), &[&format!("annotations: {name}: {words}")])
    };
    refused(&format!("{memory}=much"), "\"much\" is not a whole number")?;
    refused(&format!("{memory}=1"), "1 is not within 48 to 1048576")?;
    refused(
        "io.bulkhead.hypervisor.vcpu=2",
        "there is no such annotation",
    )?;
    let params = "io.bulkhead.hypervisor.kernel_params=bulkhead.colour=red";
    refused(params, "not allowed here: runtime.allowed_annotations")?;
    let allowed = format!(
        "{}allowed_annotations = [\"io.bulkhead.hypervisor.kernel_params\"]\n",
        context.config.toml()
    );
    with_config(context, &allowed, || {
        let done = context.run(&["--annotation", params], &["cat", "/proc/cmdline"])?;
        mentions(&done.ok()?.out(), &["bulkhead.colour=red"])?;
        // The list is the whole list.
        let done = context.run(&["--annotation", &sized], &["true"])?;
        mentions(&done.err(), &["not allowed here"])
    })
}

fn runtime_options_name_a_configuration(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let file = context.dir.join("other.toml");
    let name = file.to_string_lossy().into_owned();
    let base = context.config.toml();
    let with = |memory: &str| {
        let section = format!("[hypervisor]\nmemory_mib = {memory}\n");
        base.replacen("[hypervisor]\n", &section, 1)
    };
    fs::write(&file, with("320"))?;
    let flags = ["--runtime-config-path", name.as_str()];
    let done = context.run(&flags, MEMORY)?.ok()?;
    has_about(320, &done.out())?;
    fs::write(&file, with("7"))?;
    let done = context.run(&flags, MEMORY)?;
    mentions(
        &done.err(),
        &["other.toml: hypervisor.memory_mib: 7 is not within 48 to 1048576"],
    )?;
    fs::remove_file(&file)?;
    let done = context.run(&flags, MEMORY)?;
    mentions(&done.err(), &["other.toml cannot be read"])
}
