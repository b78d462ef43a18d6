// SPDX-License-Identifier: Apache-2.0
//! What a pod's VMM may do.

use std::fs;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::listing::by_program;

use crate::context::{same, Context};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![a_pods_vmm_is_nobody_else];

/// The fields of a line of a process's or thread's status.
fn field<'a>(status: &'a str, name: &str) -> Result<Vec<&'a str>> {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.strip_prefix(':'));
    Ok(value.context("a field")?.split_whitespace().collect())
}

fn a_pods_vmm_is_nobody_else(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let container = context.detached(&[], &["sleep", "600"])?;
    // What the guest connects to, and what it makes, works all the same.
    container
        .exec(&["sh", "-c", "echo x >/file && chown 5:6 /file"])?
        .ok()?;
    let vmms = by_program("bulkhead-vmm");
    let [vmm] = &vmms[..] else {
        bail!("{} VMMs", vmms.len());
    };
    let process = format!("/proc/{}", vmm.pid);
    let user = (0x7000_0000 + vmm.pid).to_string();
    let mut kinds = Vec::new();
    for thread in fs::read_dir(format!("{process}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let name = field(&status, "Name")?.join(" ");
        let effective = field(&status, "CapEff")?.join(" ");
        same(field(&status, "NoNewPrivs")?, ["1"]).with_context(|| name.clone())?;
        if name == "fs" {
            same(effective, "00000000880000df")?;
            same(field(&status, "Uid")?, ["0"; 4])?;
        } else if !name.starts_with("kvm-") {
            same(effective, "0000000000000000").with_context(|| name.clone())?;
            for of in ["Uid", "Gid"] {
                same(field(&status, of)?, [user.as_str(); 4]).with_context(|| name.clone())?;
            }
            same(field(&status, "Groups")?, [""; 0])?;
        }
        kinds.push(name);
    }
    for kind in ["fs", "io", "vcpu0"] {
        if !kinds.iter().any(|name| name == kind) {
            bail!("no thread {kind}: {kinds:?}");
        }
    }
    let status = fs::read_to_string(format!("{process}/status"))?;
    // The first of its namespace of processes.
    same(
        field(&status, "NSpid")?,
        [vmm.pid.to_string().as_str(), "1"],
    )?;
    for namespace in ["mnt", "net", "ipc", "uts", "pid"] {
        let theirs = fs::read_link(format!("{process}/ns/{namespace}"))?;
        if theirs == fs::read_link(format!("/proc/self/ns/{namespace}"))? {
            bail!("it is in this process's {namespace} namespace");
        }
    }
    same(fs::read(format!("{process}/environ"))?, Vec::<u8>::new())?;
    container.remove()
}
