// SPDX-License-Identifier: Apache-2.0
//! Starts on a host that has run out of something: each fails with a reason,
//! leaves nothing, and works once there is enough again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context as _, Result};
use bulkhead_tests::proc::{self, Done};

use crate::cli::with_config;
use crate::context::{mentions, same, Context, LIMIT};
use crate::host::rootfs;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    a_start_without_disk_space_leaves_nothing,
    a_start_with_few_descriptors_leaves_nothing,
];

/// Blocks that are left for a start, one try after the other; the size of one.
const BLOCKS: [u64; 6] = [0, 1, 2, 3, 5, 8];
const BLOCK: u64 = 4096;
/// Of all.
const DISK: u64 = 64 * BLOCK;

/// Descriptors that do not do: for the front end, for its files, for the VMM's.
const FEW: [u32; 4] = [8, 16, 18, 20];
/// And as many as a service has.
const ENOUGH: u32 = 1024;

/// A small file system, gone when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf) -> Result<Self> {
        fs::create_dir_all(&at)?;
        let options = format!("size={DISK},mode=0700");
        let at_text = at.to_string_lossy().into_owned();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "full", &at_text]);
        proc::run(&mut mount, LIMIT)?.ok()?;
        Ok(Self(at))
    }

    /// Leaves so many blocks.
    fn fill_up_to(&self, blocks: u64) -> Result<()> {
        let filler = self.0.join("filler");
        // What is in use beside it: directories cost nothing on a tmpfs.
        fs::write(&filler, vec![b'x'; usize::try_from(DISK - blocks * BLOCK)?])?;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = proc::run(Command::new("umount").args(["-l"]).arg(&self.0), LIMIT);
    }
}

/// Every file below a directory.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn a_start_without_disk_space_leaves_nothing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    // Its path is short: sockets are made below.
    let disk = Disk::mount(PathBuf::from("/run/bh-full"))?;
    let mut config = context.config.clone();
    config.state_dir = disk.0.join("s");
    let start = || -> Result<Done> {
        let id = context.id("cramped");
        let mut run = context.run_command(&["--rm"], &id, &["echo", "works"]);
        let done = proc::run(&mut run, LIMIT)?;
        context.containerd.clean()?;
        Ok(done)
    };
    with_config(context, &config.toml(), || {
        // Directories that stay are there from now on.
        same(start()?.ok()?.out().as_str(), "works")?;
        let before = context.listing()?;
        let mut failed = 0;
        for blocks in BLOCKS {
            disk.fill_up_to(blocks)?;
            let done = start()?;
            if done.code != 0 {
                failed += 1;
                mentions(&done.err(), &["No space left on device"])
                    .with_context(|| format!("with {blocks} blocks left"))?;
            }
            context.nothing_left(&before, LIMIT)?;
            same(files(&disk.0)?, vec![disk.0.join("filler")])
                .with_context(|| format!("after a start with {blocks} blocks"))?;
        }
        ensure!(failed > 0, "it does without any space");
        fs::remove_file(disk.0.join("filler"))?;
        same(start()?.ok()?.out().as_str(), "works")
    })
}

fn a_start_with_few_descriptors_leaves_nothing(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let root = rootfs(context)?;
    let before = context.listing()?;
    let program = context.products.program("bulkhead");
    let start = |most: u32| -> Result<Done> {
        let mut run = Command::new("prlimit");
        run.arg(format!("--nofile={most}:{most}"))
            .arg(&program)
            .args(["run", &root, "--", "/bin/echo", "works"])
            .env("BULKHEAD_CONFIG", context.dir.join("config.toml"));
        proc::run(&mut run, LIMIT)
    };
    for most in FEW {
        let done = start(most)?;
        ensure!(done.code != 0, "it does with {most} descriptors");
        mentions(&done.err(), &["open"]).with_context(|| format!("with {most} descriptors"))?;
        context
            .nothing_left(&before, LIMIT)
            .with_context(|| format!("after a start with {most} descriptors"))?;
    }
    same(start(ENOUGH)?.ok()?.out().as_str(), "works")?;
    context.nothing_left(&before, LIMIT)
}
