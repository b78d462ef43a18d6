// SPDX-License-Identifier: Apache-2.0
//! What cannot work is a clear error in ctr's output and leaves nothing.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::proc::{self, Done};
use serde_json::{json, Value};

use crate::context::{mentions, same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    a_command_that_does_not_exist,
    an_exec_that_does_not_exist,
    calls_that_come_at_the_wrong_time,
    broken_config_json,
    unreadable_rootfs,
    missing_kernel_image,
    missing_guest_image,
    broken_bulkhead_configuration,
];

/// It failed, said one of `words`, and not just that something is unknown.
fn clear_error(done: &Done, words: &[&str]) -> Result<()> {
    if done.code == 0 {
        bail!("it succeeded: {:?}", done.out());
    }
    let err = done.err();
    mentions(&err, words)?;
    if err.contains("panicked")
        || err.contains("Unknown desc")
        || err.ends_with(": unknown") && words.is_empty()
    {
        bail!("not clear: {err:?}");
    }
    Ok(())
}

fn a_command_that_does_not_exist(context: &Context) -> Result<()> {
    let before = context.listing()?;
    let done = context.run(&[], &["no-such-program", "x"])?;
    clear_error(&done, &["no-such-program"])?;
    mentions(&done.err(), &["not found", "no such file"])?;
    let done = context.run(&[], &["/etc/passwd"])?;
    clear_error(&done, &["permission denied"])?;
    let done = context.run(&["--cwd", "/nowhere"], &["true"])?;
    // runc makes the directory; without it the error names it.
    if done.code != 0 {
        clear_error(&done, &["/nowhere"])?;
    }
    context.nothing_left(&before, LIMIT)
}

fn an_exec_that_does_not_exist(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let done = container.exec(&["no-such-program"])?;
    clear_error(&done, &["no-such-program"])?;
    same(
        container.exec(&["echo", "alive"])?.ok()?.out().as_str(),
        "alive",
    )?;
    container.remove()
}

fn calls_that_come_at_the_wrong_time(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let id = container.id.as_str();
    clear_error(
        &context.ctr(&["task", "delete", id])?,
        &["running", "stopped", "failed precondition"],
    )?;
    clear_error(
        &context.ctr(&["task", "start", id])?,
        &["already", "running", "cannot"],
    )?;
    clear_error(
        &context.ctr(&["task", "kill", "--exec-id", "nobody", id])?,
        &["not found", "does not exist"],
    )?;
    context.ctr(&["task", "kill", "-s", "KILL", id])?.ok()?;
    container.wait_for("STOPPED", LIMIT)?;
    clear_error(
        &container.exec(&["true"])?,
        &[
            "not running",
            "stopped",
            "not found",
            "deleted",
            "cannot exec",
        ],
    )?;
    // Killing what is dead is not found, which ctr says.
    clear_error(
        &context.ctr(&["task", "kill", "-s", "KILL", id])?,
        &["not found", "already finished", "process"],
    )
}

/// A specification that works with the rootfs at `root`.
pub fn good_spec(context: &Context, root: &Path) -> Result<Value> {
    let text = context.ctr(&["oci", "spec"])?.ok()?.out();
    let mut spec: Value = serde_json::from_str(&text).context("the default specification")?;
    spec["root"] = json!({ "path": root });
    spec["process"]["args"] = json!(["echo", "works"]);
    spec["process"]["terminal"] = json!(false);
    spec["process"]["env"] = json!(["PATH=/bin"]);
    Ok(spec)
}

/// Runs a container with this specification to its end.
pub fn run_spec(context: &Context, spec: &Value) -> Result<Done> {
    let id = context.id("spec");
    let file = context.dir.join("spec.json");
    fs::write(&file, spec.to_string())?;
    let mut command = context
        .containerd
        .run(&context.runtime, &["--rm", "--config"]);
    proc::run(command.arg(&file).arg(&id), LIMIT)
}

/// The image's files in a directory, without a snapshotter.
pub fn unpacked(context: &Context) -> Result<std::path::PathBuf> {
    let root = context.dir.join("rootfs");
    if root.join("bin/busybox").exists() {
        return Ok(root);
    }
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp", "run"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = bulkhead_tests::install::which("busybox").context("busybox is missing")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in ["sh", "echo", "cat", "ls", "true", "uname"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    Ok(root)
}

fn broken_config_json(context: &Context) -> Result<()> {
    let root = unpacked(context)?;
    let good = good_spec(context, &root)?;
    let done = run_spec(context, &good)?
        .ok()
        .context("the specification without faults")?;
    same(done.out().as_str(), "works")?;
    let before = context.listing()?;
    let broken = |pointer: &str, value: Value| -> Result<Done> {
        let mut spec = good.clone();
        *spec
            .pointer_mut(pointer)
            .with_context(|| pointer.to_owned())? = value;
        run_spec(context, &spec)
    };
    clear_error(&broken("/process/args", json!([]))?, &["args"])?;
    clear_error(
        &broken("/process/cwd", json!("relative"))?,
        &["cwd", "working directory"],
    )?;
    clear_error(
        &broken("/linux/namespaces/0", json!({ "type": "nonsense" }))?,
        &["nonsense", "namespace"],
    )?;
    clear_error(&broken("/process", Value::Null)?, &["process"])?;
    // Not even JSON: ctr itself notices.
    let file = context.dir.join("broken.json");
    fs::write(&file, "{ \"ociVersion\": ")?;
    let mut command = context
        .containerd
        .run(&context.runtime, &["--rm", "--config"]);
    let done = proc::run(command.arg(&file).arg(context.id("spec")), LIMIT)?;
    clear_error(&done, &["json", "unexpected"])?;
    context.containerd.clean()?;
    context.nothing_left(&before, LIMIT)
}

fn unreadable_rootfs(context: &Context) -> Result<()> {
    let before = context.listing()?;
    let missing = context.dir.join("nowhere");
    let spec = good_spec(context, &missing)?;
    clear_error(&run_spec(context, &spec)?, &["nowhere"])?;
    let file = context.dir.join("not-a-directory");
    fs::write(&file, "x")?;
    let spec = good_spec(context, &file)?;
    clear_error(
        &run_spec(context, &spec)?,
        &["not-a-directory", "not a directory"],
    )?;
    context.containerd.clean()?;
    fs::remove_file(file)?;
    context.nothing_left(&before, LIMIT)
}

/// Runs a container with another configuration of Bulkhead.
fn with_config(context: &Context, text: &str) -> Result<Done> {
    let file = context.dir.join("config.toml");
    fs::write(&file, text)?;
    let done = context.sh("echo works");
    context.config.write(&file)?;
    done
}

fn missing_kernel_image(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let mut config = context.config.clone();
    config.kernel = "/nonexistent/vmlinux".into();
    clear_error(
        &with_config(context, &config.toml())?,
        &["/nonexistent/vmlinux"],
    )?;
    // One that is no kernel.
    config.kernel = "/etc/passwd".into();
    clear_error(&with_config(context, &config.toml())?, &["kernel", "elf"])?;
    context.nothing_left(&before, LIMIT)
}

fn missing_guest_image(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let mut config = context.config.clone();
    config.image = "/nonexistent/rootfs".into();
    clear_error(
        &with_config(context, &config.toml())?,
        &["/nonexistent/rootfs"],
    )?;
    context.nothing_left(&before, LIMIT)
}

fn broken_bulkhead_configuration(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let text = format!("{}\n[hypervisor.typo]\n", context.config.toml());
    clear_error(&with_config(context, &text)?, &["typo", "config.toml"])?;
    clear_error(&with_config(context, "[hypervisor\n")?, &["config.toml"])?;
    same(context.sh("echo works")?.ok()?.out().as_str(), "works")
}
