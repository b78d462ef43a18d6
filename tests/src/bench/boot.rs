// SPDX-License-Identifier: Apache-2.0
//! What a boot costs in exits and system calls.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use bulkhead_vmm_api::Exits;

use super::{Bench, Figure, LIMIT};
use crate::install::which;
use crate::proc;
use crate::vmm::{self, Vmm};

/// `boot-exits`: those that the VMM handles until the agent calls.
///
/// # Errors
/// When the guest does not come up.
pub fn exits(bench: &Bench) -> Result<Vec<Figure>> {
    let dir = bench.dir.join("exits");
    fs::create_dir_all(&dir)?;
    let exits = boot(bench, &dir)?;
    let figure = Figure::new(
        "boot-exits",
        (exits.pio + exits.mmio) as f64,
        "exits",
        &format!(
            "{} for ports and {} for memory that the VMM handled until the agent's ready call",
            exits.pio, exits.mmio
        ),
    );
    Ok(vec![figure])
}

fn boot(bench: &Bench, dir: &Path) -> Result<Exits> {
    let _agent = UnixListener::bind(vmm::agent_socket(dir))?;
    let mut vmm = Vmm::start(&bench.products, LIMIT)?;
    vmm.boot(&bench.products, dir)?;
    vmm.wait_ready()?;
    Ok(vmm.status()?.exits)
}

/// `boot-syscalls`: those of the VMM's process up to its first KVM_RUN, and of
/// these the ones that cost most, `boot-create-vm`, `boot-gsi-routing` and
/// `boot-memslots`.
///
/// # Errors
/// Without strace; when the guest does not come up.
pub fn syscalls(bench: &Bench) -> Result<Vec<Figure>> {
    let strace = which("strace").context("strace is not installed")?;
    let trace = bench.dir.join("trace");
    let wrapper = bench.dir.join("traced-vmm");
    fs::write(
        &wrapper,
        format!(
            "#!/bin/sh\nexec {} -f -o {} {} \"$@\"\n",
            strace.display(),
            trace.display(),
            bench.products.program("bulkhead-vmm").display()
        ),
    )?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut config = bench.products.config(&bench.dir.join("traced"));
    config.vmm = wrapper;
    let path = bench.dir.join("traced.toml");
    config.write(&path)?;
    let mut command = Command::new(bench.products.program("bulkhead"));
    command.arg("--config").arg(&path).arg("run");
    command.arg(bench.rootfs()?).args(["--", "/bin/true"]);
    proc::run(&mut command, LIMIT)?.ok()?;
    let text = fs::read_to_string(&trace).context("read the trace")?;
    let calls = before_first_run(&text).context("the trace has no KVM_RUN")?;
    let requests = |name: &str| calls.iter().filter(|call| call.contains(name)).count() as f64;
    Ok(vec![
        Figure::new(
            "boot-syscalls",
            calls.len() as f64,
            "calls",
            "system calls of all threads of the VMM from its exec up to the first KVM_RUN, by strace; target: at most 200",
        ),
        Figure::new(
            "boot-create-vm",
            requests("KVM_CREATE_VM"),
            "calls",
            "of these, KVM_CREATE_VM",
        ),
        Figure::new(
            "boot-gsi-routing",
            requests("KVM_SET_GSI_ROUTING"),
            "calls",
            "of these, KVM_SET_GSI_ROUTING: devices' interrupts are sent without routes",
        ),
        Figure::new(
            "boot-memslots",
            requests("KVM_SET_USER_MEMORY_REGION"),
            "calls",
            "of these, KVM_SET_USER_MEMORY_REGION: memory, the guest's image, and the two windows that guests read without an exit, of interrupt tables and of PCI configuration",
        ),
    ])
}

/// Calls that began before the first KVM_RUN did.
fn before_first_run(trace: &str) -> Option<Vec<&str>> {
    let mut calls = Vec::new();
    for line in trace.lines() {
        if line.contains("KVM_RUN") {
            return Some(calls);
        }
        let what = line
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .trim_start();
        // Neither the rest of a call, nor a signal, nor an exit.
        if !what.starts_with(['<', '-', '+']) {
            calls.push(what);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::before_first_run;

    #[test]
    fn calls_are_counted_once() {
        let trace = "12 execve(\"x\") = 0\n12 read(3,  <unfinished ...>\n13 brk(0) = 1\n12 <... read resumed>) = 1\n\
            13 --- SIGCHLD ---\n12 ioctl(5, KVM_RUN, 0) = 0\n";
        let calls = [
            "execve(\"x\") = 0",
            "read(3,  <unfinished ...>",
            "brk(0) = 1",
        ];
        assert_eq!(before_first_run(trace).unwrap(), calls);
        assert_eq!(before_first_run("1 read() = 0\n"), None);
    }
}
