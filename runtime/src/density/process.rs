// SPDX-License-Identifier: Apache-2.0
//! What the kernel tells of a pod's processes.

use std::{fs, io, path::Path};

use super::smaps::{self, Sums};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Reads a process's smaps; `None` when it is gone.
///
/// # Errors
/// It may not be read, say.
pub fn sums(proc: &Path, pid: u32) -> io::Result<Option<Sums>> {
    match fs::read_to_string(proc.join(pid.to_string()).join("smaps")) {
        // A process that has ended and is not reaped has none.
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => Ok(Some(smaps::sum(&text))),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether `pid` is a child of `parent` now.
pub fn is_child(proc: &Path, pid: u32, parent: u32) -> bool {
    let path = proc.join(pid.to_string()).join("status");
    let status = fs::read_to_string(path).unwrap_or_default();
    field(&status, "PPid").and_then(|text| text.parse().ok()) == Some(parent)
}

/// Bytes of the page tables of a process.
pub fn page_tables(proc: &Path, pid: u32) -> u64 {
    let path = proc.join(pid.to_string()).join("status");
    let status = fs::read_to_string(path).unwrap_or_default();
    field(&status, "VmPTE")
        .and_then(smaps::kib)
        .unwrap_or_default()
}

/// Bytes of a process that are merged with others or among themselves; `None`:
/// the kernel does not tell (before 5.19).
pub fn merged(proc: &Path, pid: u32) -> Option<u64> {
    let text = fs::read_to_string(proc.join(pid.to_string()).join("ksm_merging_pages")).ok()?;
    text.trim().parse::<u64>().ok()?.checked_mul(PAGE)
}

/// What of `key: value` lines belongs to a key.
pub fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name == key).then(|| value.trim())
    })
}

/// Kernel memory that is charged to a control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Charged {
    /// Page tables through which the processor finds guest memory.
    pub guest_tables: u64,
    /// All else but the processes' own page tables.
    pub other: u64,
}

/// Of the control group of the VMM, where it holds nothing but this pod's
/// processes: else it is not known which part is the pod's.
pub fn charged(proc: &Path, cgroups: &Path, vmm: u32, pod: &[u32]) -> Option<Charged> {
    let text = fs::read_to_string(proc.join(vmm.to_string()).join("cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let dir = cgroups.join(path);
    let procs = fs::read_to_string(dir.join("cgroup.procs")).ok()?;
    let ours = |line: &str| line.parse().is_ok_and(|pid| pod.contains(&pid));
    if path.is_empty() || !procs.lines().all(ours) {
        return None;
    }
    stat(&fs::read_to_string(dir.join("memory.stat")).ok()?)
}

/// Of `memory.stat`; `None` where it does not tell (before 5.18).
fn stat(text: &str) -> Option<Charged> {
    let value = |key: &str| -> Option<u64> {
        text.lines().find_map(|line| {
            let (name, value) = line.split_once(' ')?;
            (name == key).then(|| value.parse().ok())?
        })
    };
    let guest_tables = value("sec_pagetables").unwrap_or_default();
    let tables = value("pagetables").unwrap_or_default();
    Some(Charged {
        guest_tables,
        other: value("kernel")?.saturating_sub(tables.saturating_add(guest_tables)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let proc = Path::new("/proc");
        let pid = std::process::id();
        assert!(sums(proc, pid).unwrap().unwrap().private > 0);
        assert!(page_tables(proc, pid) > 0);
        assert!(is_child(proc, pid, std::os::unix::process::parent_id()));
        assert!(!is_child(proc, pid, pid));
        assert_eq!(sums(proc, u32::MAX).unwrap(), None);
        assert_eq!(merged(proc, u32::MAX), None);
    }

    #[test]
    fn kernel_memory_is_told_once() {
        let text = "anon 5\nkernel 1000\nkernel_stack 10\npagetables 200\nsec_pagetables 300\n";
        let expected = Charged {
            guest_tables: 300,
            other: 500,
        };
        assert_eq!(stat(text), Some(expected));
        assert_eq!(stat("anon 5\n"), None);
    }

    #[test]
    fn a_shared_control_group_tells_nothing_of_a_pod() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, cgroups) = (dir.path().join("p"), dir.path().join("c"));
        fs::create_dir_all(proc.join("7")).unwrap();
        fs::create_dir_all(cgroups.join("a/b")).unwrap();
        fs::write(proc.join("7/cgroup"), "0::/a/b\n").unwrap();
        fs::write(cgroups.join("a/b/memory.stat"), "kernel 9\n").unwrap();
        fs::write(cgroups.join("a/b/cgroup.procs"), "7\n8\n").unwrap();
        assert!(charged(&proc, &cgroups, 7, &[6, 7, 8]).is_some());
        assert_eq!(charged(&proc, &cgroups, 7, &[6, 7]), None);
    }
}
