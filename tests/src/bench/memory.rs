// SPDX-License-Identifier: Apache-2.0
//! Memory of an idle container.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::{Bench, Figure, LIMIT};
use crate::containerd::BULKHEAD;
use crate::{image, listing, proc};

/// What is at least this big in a VMM, in KiB, is the guest's memory.
const GUEST: u64 = 128 << 10;

/// `host-private` and `guest-private`.
///
/// # Errors
/// When the container does not run.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let mut command = bench.containerd.run(BULKHEAD, &["-d"]);
    command.args([image::ROOT_IMAGE, "bench-idle", "sleep", "1000"]);
    proc::run(&mut command, LIMIT)?.ok()?;
    // What a start leaves to be done.
    thread::sleep(Duration::from_secs(3));
    let taken = take();
    bench.containerd.clean()?;
    taken
}

fn take() -> Result<Vec<Figure>> {
    let (shim, _) = private("containerd-shim-bulkhead-v2")?;
    let (vmm, guest) = private("bulkhead-vmm")?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    Ok(vec![
        Figure::new(
            "host-private",
            mib(shim + vmm),
            "MiB",
            &format!(
                "private memory of shim ({:.1}) and VMM ({:.1}) of an idle container, guest memory aside; target: under 10",
                mib(shim),
                mib(vmm)
            ),
        ),
        Figure::new(
            "guest-private",
            mib(guest),
            "MiB",
            "guest memory that an idle pod has touched; target: under 40",
        ),
    ])
}

/// Private memory in KiB of the one process of a program, without and of guest
/// memory.
fn private(program: &str) -> Result<(u64, u64)> {
    let processes = listing::by_program(program);
    let [process] = processes.as_slice() else {
        bail!("{} processes of {program}, not one", processes.len());
    };
    let path = format!("/proc/{}/smaps", process.pid);
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(sum(&text))
}

fn sum(smaps: &str) -> (u64, u64) {
    let (mut own, mut guest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let Some(kib) = value
            .trim()
            .strip_suffix("kB")
            .and_then(|v| v.trim().parse::<u64>().ok())
        else {
            continue;
        };
        match key {
            "Size" => size = kib,
            "Private_Clean" | "Private_Dirty" if size >= GUEST => guest += kib,
            "Private_Clean" | "Private_Dirty" => own += kib,
            _ => {}
        }
    }
    (own, guest)
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn guest_memory_is_told_by_its_size() {
        let smaps = "7f00-7f01 rw-p 00000000 00:00 0\nSize:  262144 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 30000 kB\n\
            5500-5501 r-xp 00000000 00:00 0 /bin/x\nSize: 400 kB\nPrivate_Clean: 300 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd\n";
        assert_eq!(sum(smaps), (304, 30000));
    }
}
