// SPDX-License-Identifier: Apache-2.0
//! Programs that take a container's output (`binary://`).

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bulkhead_tests::image;
use bulkhead_tests::proc;
use sha2::{Digest as _, Sha256};

use crate::context::{same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    a_program_takes_all_output_however_slow_it_is,
    a_program_takes_output_while_containerd_restarts,
];

/// Lines of the container that prints on while containerd is restarted.
const LINES: u32 = 150;

/// A program that writes what it takes into `PREFIX.out` and `PREFIX.err`, where
/// its argument is the prefix, and `PREFIX.end` in the end. It begins so late.
fn program(context: &Context, name: &str, seconds: u32) -> Result<PathBuf> {
    let path = context.dir.join(name);
    // 3 and 4 are the output, closing 5 says that it is ready.
    let script = format!(
        "#!/bin/sh\n(/bin/sleep {seconds}; exec /bin/cat <&3 >\"$1.out\") 5>&- &\n\
         (/bin/sleep {seconds}; exec /bin/cat <&4 >\"$1.err\") 5>&- &\n\
         exec 3<&- 4<&- 5>&-\nwait\n: >\"$1.end\"\n"
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Runs a script in the background whose output the program takes.
fn run(context: &Context, program: &Path, prefix: &Path, id: &str, script: &str) -> Result<()> {
    let uri = format!("binary://{}?{}", program.display(), prefix.display());
    let flags = ["-d", "--log-uri", &uri];
    let mut command = context.run_command(&flags, id, &["sh", "-c", script]);
    proc::run(&mut command, LIMIT)?.ok()?;
    Ok(())
}

fn remove(context: &Context, id: &str) -> Result<()> {
    context.ctr(&["task", "delete", id])?.ok()?;
    context.ctr(&["container", "delete", id])?.ok()?;
    Ok(())
}

fn stopped(context: &Context, id: &str) -> Result<()> {
    until(LIMIT, "the container's end", || {
        Ok(crate::context::status(context, id)? == "STOPPED")
    })
}

fn a_program_takes_all_output_however_slow_it_is(context: &Context) -> Result<()> {
    const ROUNDS: usize = 5;
    let before = context.listing()?;
    let logger = program(context, "slow-logger", 3)?;
    let prefix = context.dir.join("slow-log");
    let id = context.id("logged");
    let pattern = image::PATTERN_PATH;
    let script = format!("for i in $(seq {ROUNDS}); do cat {pattern}; done; echo last words >&2");
    run(context, &logger, &prefix, &id, &script)?;
    stopped(context, &id)?;
    remove(context, &id)?;
    until(LIMIT, "the program's end", || {
        Ok(prefix.with_extension("end").exists())
    })?;
    let out = fs::read(prefix.with_extension("out"))?;
    let want = image::pattern().repeat(ROUNDS);
    same(out.len(), want.len())?;
    same(Sha256::digest(&out), Sha256::digest(&want))?;
    let err = fs::read_to_string(prefix.with_extension("err"))?;
    same(err.as_str(), "last words\n")?;
    context.nothing_left(&before, LIMIT)
}

fn a_program_takes_output_while_containerd_restarts(context: &Context) -> Result<()> {
    let logger = program(context, "logger", 0)?;
    let prefix = context.dir.join("log");
    let id = context.id("logged");
    let script = format!("i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); sleep 0.1; done");
    run(context, &logger, &prefix, &id, &script)?;
    let out = prefix.with_extension("out");
    let lines = || -> Vec<String> {
        let text = fs::read_to_string(&out).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    until(LIMIT, "the first lines", || Ok(lines().len() >= 3))?;
    context.containerd.restart()?;
    stopped(context, &id)?;
    remove(context, &id)?;
    until(LIMIT, "the program's end", || {
        Ok(prefix.with_extension("end").exists())
    })?;
    let want: Vec<String> = (0..LINES).map(|i| i.to_string()).collect();
    same(lines(), want).context("what it took")
}
