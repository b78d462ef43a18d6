// SPDX-License-Identifier: Apache-2.0
//! `bulkhead` without any daemon.

use std::fs;
use std::process::Command;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::proc::{self, Done};

use crate::context::{mentions, same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    bulkhead_check_finds_this_host_able,
    bulkhead_check_names_what_is_missing,
    bulkhead_run_without_a_daemon,
    bulkhead_run_leaves_nothing,
];

fn bulkhead(context: &Context, args: &[&str], input: Option<Vec<u8>>) -> Result<Done> {
    let mut command = Command::new(context.products.program("bulkhead"));
    command
        .args(args)
        .env("BULKHEAD_CONFIG", context.dir.join("config.toml"));
    proc::run_with(&mut command, input, LIMIT)
}

fn bulkhead_check_finds_this_host_able(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let done = bulkhead(context, &["check"], None)?;
    same(done.code, 0).with_context(|| format!("{} {}", done.out(), done.err()))?;
    mentions(&done.out(), &["kvm"])
}

fn bulkhead_check_names_what_is_missing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let mut config = context.config.clone();
    config.kernel = "/nonexistent/vmlinux".into();
    let file = context.dir.join("config.toml");
    config.write(&file)?;
    let done = bulkhead(context, &["check"], None);
    context.config.write(&file)?;
    let done = done?;
    if done.code == 0 {
        bail!("it finds nothing wrong: {}", done.out());
    }
    mentions(
        &format!("{} {}", done.out(), done.err()),
        &["/nonexistent/vmlinux"],
    )
}

/// A directory with busybox as a rootfs.
pub fn rootfs(context: &Context) -> Result<String> {
    let root = context.dir.join("plain-rootfs");
    if !root.exists() {
        for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(root.join(dir))?;
        }
        let busybox = bulkhead_tests::install::which("busybox").context("busybox is missing")?;
        fs::copy(busybox, root.join("bin/busybox"))?;
        for name in ["sh", "cat", "uname", "echo"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
    }
    Ok(root.to_string_lossy().into_owned())
}

fn bulkhead_run_without_a_daemon(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let root = rootfs(context)?;
    let script = "uname -r; echo err >&2; cat; exit 7";
    let done = bulkhead(
        context,
        &["run", &root, "--", "/bin/sh", "-c", script],
        Some(b"from outside\n".to_vec()),
    )?;
    same(done.code, 7).with_context(|| done.err())?;
    mentions(&done.err(), &["err"])?;
    let out = done.out();
    let (release, rest) = out.split_once('\n').context("one line")?;
    if release == bulkhead_tests::inside::release()? {
        bail!("it ran on the host's kernel");
    }
    same(rest, "from outside")?;
    let done = bulkhead(context, &["run", &root, "--", "/bin/no-such-program"], None)?;
    if done.code == 0 {
        bail!("a program that does not exist ran");
    }
    mentions(&done.err(), &["no-such-program"])
}

fn bulkhead_run_leaves_nothing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let root = rootfs(context)?;
    let before = context.listing()?;
    bulkhead(context, &["run", &root, "--", "/bin/echo", "x"], None)?.ok()?;
    context.nothing_left(&before, LIMIT)
}
