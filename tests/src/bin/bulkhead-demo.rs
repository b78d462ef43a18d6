// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-demo`: what `make run` shows. A container in a microVM of its own,
//! through a private containerd, here or in the KVM host in a box.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use bulkhead_tests::containerd::{remove_tree, Containerd, BULKHEAD};
use bulkhead_tests::inside::{self, in_a_box, release_outside};
use bulkhead_tests::install::Products;
use bulkhead_tests::timeline::Timeline;
use bulkhead_tests::{image, proc};

/// What the container runs. The last line is taken for the table.
const SCRIPT: &str = "echo \"Hello from a container in a microVM of its own.\"; \
    echo \"I am $(id -un) on $(nproc) processor(s), $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB of memory.\"; \
    uname -r";
/// How long the whole may take in a box.
const LIMIT: Duration = Duration::from_secs(600);

/// Prints what happens, with the time since the beginning.
struct Progress(Instant);

impl Progress {
    fn step(&self, what: &str) {
        println!("[{:6.1} s] {what}", self.0.elapsed().as_secs_f64());
    }
}

fn main() -> ExitCode {
    let result = if inside::is_here() { show() } else { boxed() };
    match result {
        Ok(0) => ExitCode::SUCCESS,
        Ok(code) => ExitCode::from(code.clamp(1, 255) as u8),
        Err(error) => {
            eprintln!("bulkhead-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn runtime() -> String {
    env::var("BULKHEAD_TEST_RUNTIME").unwrap_or_else(|_| BULKHEAD.into())
}

fn boxed() -> Result<i32> {
    let progress = Progress(Instant::now());
    if runtime() == BULKHEAD {
        Products::find()?.check()?;
    }
    progress.step("no VT-x or SVM here: starting the KVM host in a box");
    in_a_box(LIMIT, |machine| {
        progress.step(&format!(
            "the box is up after {:.1} s, kernel {}",
            machine.boot_time().as_secs_f64(),
            machine.ready().release
        ));
    })
}

fn show() -> Result<i32> {
    let progress = Progress(Instant::now());
    let products = Products::find()?;
    let runtime = runtime();
    if runtime == BULKHEAD {
        products.check()?;
    }
    let dir = inside::work_dir("bulkhead-demo");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let result = run(&progress, &products, &runtime, &dir);
    // The first error is the one to tell.
    let removed = remove_tree(&dir);
    result.and_then(|code| removed.map(|()| code))
}

fn run(progress: &Progress, products: &Products, runtime: &str, dir: &Path) -> Result<i32> {
    let config = dir.join("config.toml");
    let mut settings = products.config(&dir.join("state"));
    settings.guest_console = Some(dir.join("console-"));
    settings.write(&config)?;

    progress.step("starting a private containerd");
    let containerd = Containerd::start(&dir.join("c"), &products.bin_dir(), &config)?;
    progress.step("importing the image");
    containerd.import(&image::cached()?)?;
    progress.step(&format!("ctr run --rm --runtime {runtime}"));
    let begin = Instant::now();
    let mut command = containerd.run(runtime, &["--rm"]);
    command.args([image::ROOT_IMAGE, "demo", "sh", "-c", SCRIPT]);
    let done = proc::run(&mut command, LIMIT)?;
    if done.code != 0 {
        explain(&containerd, dir);
        bail!(
            "ctr run failed with exit code {}: {}",
            done.code,
            done.err()
        );
    }
    progress.step(&format!(
        "it ran for {:.1} s, all in all",
        begin.elapsed().as_secs_f64()
    ));
    let out = done.out();
    println!("\nThe container said:");
    for line in out.lines() {
        println!("    {line}");
    }
    println!("\nKernel releases:");
    if let Some(outside) = release_outside() {
        println!("    {:<24}{outside}", "this machine");
        println!("    {:<24}{}", "host (the box)", inside::release()?);
    } else {
        println!("    {:<24}{}", "host", inside::release()?);
    }
    println!(
        "    {:<24}{}",
        "guest (the container)",
        out.lines().last().unwrap_or_default()
    );
    if runtime == BULKHEAD {
        let Some(timeline) = timeline(&containerd) else {
            explain(&containerd, dir);
            bail!("the shim has logged no start timeline");
        };
        println!("\nThe start in milliseconds, from the start of the shim:");
        for line in timeline.table().lines() {
            println!("    {line}");
        }
    }
    containerd.stop()?;
    Ok(0)
}

/// The shim's log arrives a moment after the container's end.
fn timeline(containerd: &Containerd) -> Option<Timeline> {
    let begin = Instant::now();
    loop {
        let found = Timeline::find(&containerd.log());
        if found.is_some() || begin.elapsed() > Duration::from_secs(3) {
            return found;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The ends of the logs that bear on a failure.
fn explain(containerd: &Containerd, dir: &Path) {
    eprintln!("--- end of the log of containerd and its shims ---");
    eprintln!("{}", containerd.log_tail(30));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("console-") {
            let bytes = fs::read(entry.path()).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).replace('\r', "");
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("--- end of the guest's console ({name}) ---");
            eprintln!("{}", lines[lines.len().saturating_sub(30)..].join("\n"));
        }
    }
}
