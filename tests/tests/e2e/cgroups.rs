// SPDX-License-Identifier: Apache-2.0
//! Which cgroups of the host a pod's processes are in.

use std::fs;

use anyhow::{bail, Context as _, Result};
use serde_json::Value;

use crate::cli::{listed, with_config};
use crate::context::{same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    all_of_a_pod_is_in_its_cgroup,
    the_overhead_can_have_a_cgroup_of_its_own,
];

/// Where a process is that `bulkhead list` tells of, in each hierarchy that has
/// controllers, and in that of cgroup v2.
fn cgroups_of(told: &Value, process: &str) -> Result<Vec<String>> {
    let pid = told[process].as_u64().context("a process id")?;
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let fields = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        (!controllers.starts_with("name=")).then(|| path.to_owned())
    });
    let paths: Vec<String> = fields.collect();
    if paths.is_empty() {
        bail!("process {pid} is in no cgroup: {text}");
    }
    Ok(paths)
}

fn all_are(paths: &[String], wanted: &str) -> Result<()> {
    paths
        .iter()
        .try_for_each(|path| same(path.as_str(), wanted))
}

fn all_of_a_pod_is_in_its_cgroup(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let pod = context.detached(&[], &["sleep", "1000"])?;
    let told = listed(context, &pod.id)?;
    // What ctr asks for.
    let wanted = format!("/default/{}", pod.id);
    for process in ["vmm_pid", "pid"] {
        all_are(&cgroups_of(&told, process)?, &wanted).context(process)?;
    }
    pod.remove()?;
    context.nothing_left(&before, LIMIT)
}

fn the_overhead_can_have_a_cgroup_of_its_own(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let text = context.config.toml().replace(
        "[runtime]\n",
        "[runtime]\nsandbox_cgroup_only = false\noverhead_cgroup = \"/bulkhead-e2e\"\n",
    );
    let pod = with_config(context, &text, || context.detached(&[], &["sleep", "1000"]))?;
    let told = listed(context, &pod.id)?;
    all_are(
        &cgroups_of(&told, "vmm_pid")?,
        &format!("/default/{}", pod.id),
    )?;
    all_are(
        &cgroups_of(&told, "pid")?,
        &format!("/bulkhead-e2e/default-{}", pod.id),
    )?;
    pod.remove()?;
    context.nothing_left(&before, LIMIT)
}
