// SPDX-License-Identifier: Apache-2.0
//! Memory of an idle container.

use std::fs;
use std::ops::Range;
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
    let mut command = bench.containerd()?.run(BULKHEAD, &["-d"]);
    command.args([image::ROOT_IMAGE, "bench-idle", "sleep", "1000"]);
    proc::run(&mut command, LIMIT)?.ok()?;
    // What a start leaves to be done.
    thread::sleep(Duration::from_secs(3));
    let taken = take();
    bench.containerd()?.clean()?;
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
///
/// # Errors
/// There is not one.
pub fn private(program: &str) -> Result<(u64, u64)> {
    let processes = listing::by_program(program);
    let [process] = processes.as_slice() else {
        bail!("{} processes of {program}, not one", processes.len());
    };
    private_of(process.pid)
}

/// The same of a process.
///
/// # Errors
/// It is gone.
pub fn private_of(pid: u32) -> Result<(u64, u64)> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(sum(&text))
}

fn sum(smaps: &str) -> (u64, u64) {
    let (mut own, mut guest) = (0, 0);
    // Mappings side by side with the same rights are one that was given
    // different advice; the guest's memory is.
    let mut block = Block::default();
    for line in smaps.lines() {
        if let Some((range, rest)) = mapping(line) {
            let rights = rest.split(' ').next().unwrap_or_default();
            if range.start != block.end || rights != block.rights {
                block.add_to(&mut own, &mut guest);
                block = Block {
                    rights: rights.to_owned(),
                    // A file that is not copied is the guest's image.
                    image: rights.ends_with('s') && rest.contains(" /"),
                    ..Block::default()
                };
            }
            block.end = range.end;
            block.size += (range.end - range.start) >> 10;
            continue;
        }
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib = value.trim().strip_suffix("kB");
        let kib = kib.and_then(|v| v.trim().parse::<u64>().ok());
        if let ("Private_Clean" | "Private_Dirty", Some(kib)) = (key, kib) {
            block.private += kib;
        }
    }
    block.add_to(&mut own, &mut guest);
    (own, guest)
}

#[derive(Default)]
struct Block {
    end: u64,
    rights: String,
    size: u64,
    private: u64,
    image: bool,
}

impl Block {
    fn add_to(&self, own: &mut u64, guest: &mut u64) {
        let is_guests = self.image || self.size >= GUEST;
        *if is_guests { guest } else { own } += self.private;
    }
}

/// The range of addresses that a mapping's first line begins with.
fn mapping(line: &str) -> Option<(Range<u64>, &str)> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?..hex(end)?, rest))
}

#[cfg(test)]
mod tests {
    use super::sum;

    #[test]
    fn guest_memory_is_told_by_its_size() {
        let smaps = "7f0000000000-7f0001000000 rw-p 00000000 00:00 0\nSize:  16384 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 10000 kB\n\
            7f0001000000-7f0010000000 rw-p 00000000 00:00 0\nSize:  245760 kB\nPrivate_Dirty: 20000 kB\n\
            7f0010000000-7f0010100000 r--p 00000000 00:00 0\nSize:  1024 kB\nPrivate_Dirty: 1 kB\n\
            7f0020000000-7f0020100000 r-xp 00000000 00:00 0 /bin/x\nSize: 1024 kB\nPrivate_Clean: 300 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd\n\
            7f0030000000-7f0030400000 r--s 00000000 fe:00 7 /x.erofs\nSize: 4096 kB\nPrivate_Clean: 2000 kB\n\
            7f0030400000-7f0030401000 rw-s 00000000 00:0e 54 anon_inode:kvm-vcpu:0\nSize: 4 kB\nPrivate_Dirty: 4 kB\n";
        assert_eq!(sum(smaps), (309, 32000));
    }
}
