// SPDX-License-Identifier: Apache-2.0
//! What KVM counts of all virtual machines of this host together.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::LIMIT;
use crate::proc;

const DEBUGFS: &str = "/sys/kernel/debug";

/// One of its counters now.
///
/// # Errors
/// A kernel without them.
pub fn counter(name: &str) -> Result<u64> {
    let directory = Path::new(DEBUGFS).join("kvm");
    if !directory.exists() {
        let mut mount = Command::new("mount");
        mount.args(["-t", "debugfs", "debugfs", DEBUGFS]);
        proc::run(&mut mount, LIMIT)?.ok()?;
    }
    let path = directory.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    text.trim()
        .parse()
        .with_context(|| format!("{}: {text:?}", path.display()))
}
