// SPDX-License-Identifier: Apache-2.0
//! How much memory a guest has.

use anyhow::{bail, Result};

use crate::context::{same, Context};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![guest_of_128_mib, guest_of_2_gib];

/// A guest of `mib` sees nearly that much, and can use `use_mib` of it.
fn guest(context: &Context, mib: u64, use_mib: u64) -> Result<()> {
    context.only_bulkhead()?;
    let annotation = format!("io.bulkhead.hypervisor.memory_mib={mib}");
    let script = format!(
        "awk '/MemTotal/ {{print $2}}' /proc/meminfo; mount -t tmpfs -o size=100% x /mem 2>/dev/null; \
         dd if=/dev/zero of=/dev/shm/held bs=1M count={use_mib} 2>/dev/null; stat -c %s /dev/shm/held"
    );
    let shm = "type=tmpfs,src=shm,dst=/dev/shm,options=size=100%";
    let done = context.run(
        &["--annotation", &annotation, "--mount", shm],
        &["sh", "-c", &script],
    )?;
    let out = done.ok()?.out();
    let mut lines = out.lines();
    let total: u64 = lines.next().unwrap_or_default().parse::<u64>()? / 1024;
    // The kernel keeps something for itself.
    if total > mib || total < mib * 80 / 100 {
        bail!("{total} MiB in a guest of {mib}");
    }
    same(
        lines.next().unwrap_or_default(),
        (use_mib << 20).to_string(),
    )
}

fn guest_of_128_mib(context: &Context) -> Result<()> {
    guest(context, 128, 40)
}

fn guest_of_2_gib(context: &Context) -> Result<()> {
    guest(context, 2048, 400)
}
