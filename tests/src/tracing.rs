// SPDX-License-Identifier: Apache-2.0
//! What the kernel's tracer sees.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{mount, MsFlags};

const DIRECTORY: &str = "/sys/kernel/tracing";
/// A thread of a process that is there, in the flags of clone.
const CLONE_THREAD: u64 = 0x0001_0000;
const EVENT: &str = "events/task/task_newtask/enable";

/// Counts processes that are born, from its begin to its end.
#[derive(Debug)]
pub struct Births {
    dir: PathBuf,
}

impl Births {
    /// Begins.
    ///
    /// # Errors
    /// The kernel has no tracer, or this is not root.
    pub fn begin() -> Result<Self> {
        let dir = PathBuf::from(DIRECTORY);
        if !dir.join("trace").exists() {
            let none: Option<&str> = None;
            mount(
                Some("tracefs"),
                &dir,
                Some("tracefs"),
                MsFlags::empty(),
                none,
            )
            .context("mount tracefs")?;
        }
        let births = Self { dir };
        births.write("trace", "")?;
        births.write(EVENT, "1")?;
        births.write("tracing_on", "1")?;
        Ok(births)
    }

    /// Ends; how many processes were born, by the names of their parents. This
    /// program's own children, and theirs, are not counted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn end(self) -> Result<BTreeMap<String, u64>> {
        self.write(EVENT, "0")?;
        let trace = fs::read_to_string(self.dir.join("trace")).context("read the trace")?;
        self.write("trace", "")?;
        Ok(births(&trace, std::process::id()))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path: &Path = &self.dir.join(name);
        fs::write(path, text).with_context(|| path.display().to_string())
    }
}

/// Of lines such as `crictl-31 [000] ..... 5.1: task_newtask: pid=32
/// comm=crictl clone_flags=4100 oom_score_adj=0`: who does it is first.
fn births(trace: &str, this: u32) -> BTreeMap<String, u64> {
    let mut own = vec![this];
    let mut counts = BTreeMap::new();
    for line in trace.lines() {
        let Some((parent, pid, flags)) = birth(line) else {
            continue;
        };
        let (name, number) = parent;
        if own.contains(&number) {
            // Its threads' children are its own, too.
            own.push(pid);
        } else if flags & CLONE_THREAD == 0 {
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    counts
}

fn birth(line: &str) -> Option<((&str, u32), u32, u64)> {
    let (head, rest) = line.split_once(": task_newtask: pid=")?;
    let (name, number) = head.split_once(" [")?.0.trim().rsplit_once('-')?;
    let (pid, rest) = rest.split_once(' ')?;
    let flags = rest.rsplit_once("clone_flags=")?.1.split(' ').next()?;
    let flags = u64::from_str_radix(flags.trim_start_matches("0x"), 16).ok()?;
    Some(((name, number.parse().ok()?), pid.parse().ok()?, flags))
}

#[cfg(test)]
mod tests {
    use super::births;

    #[test]
    fn processes_are_counted_and_threads_are_not() {
        let trace = "# tracer: nop\n\
            \x20   a bench-7     [000] .....  5.10: task_newtask: pid=8 comm=a bench clone_flags=4100 oom_score_adj=0\n\
            \x20    crictl-8     [000] .....  5.11: task_newtask: pid=9 comm=crictl clone_flags=10f00 oom_score_adj=0\n\
            \x20    crictl-9     [000] .....  5.12: task_newtask: pid=10 comm=crictl clone_flags=4100 oom_score_adj=0\n\
            \x20containerd-3     [000] .....  5.13: task_newtask: pid=11 comm=containerd clone_flags=4100 oom_score_adj=0\n\
            \x20containerd-3     [000] .....  5.14: task_newtask: pid=12 comm=containerd clone_flags=50f00 oom_score_adj=0\n\
            \x20   shim-v2-11    [000] .....  5.15: task_newtask: pid=13 comm=shim-v2 clone_flags=0 oom_score_adj=0\n";
        let expected = [("containerd".to_owned(), 1), ("shim-v2".to_owned(), 1)];
        assert_eq!(births(trace, 7), expected.into());
    }
}
