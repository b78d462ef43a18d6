// SPDX-License-Identifier: Apache-2.0
//! A guest's console and its log: virtio-console, as Linux drives it.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{ensure, Context as _, Result};
use bulkhead_agent_protocol::SHARED_TAG;
use bulkhead_tests::vmm::Vmm;
use bulkhead_vmm_api::{ConsoleConfig, DeviceConfigs, DeviceKind, DeviceMetrics};

use crate::context::{same, Context, LIMIT};
use crate::plugged::Guest;
use crate::runner::{tests, Test};
use crate::vmm::{runtime, Host};

pub const TESTS: &[Test] = tests![
    a_console_and_a_log_carry_bytes,
    a_clone_has_a_console_and_a_log_of_its_own
];

/// Makes the device nodes /dev/hvc0 and /dev/log, the latter by its port's name.
const NODES: &str = "for port in /sys/class/virtio-ports/*; do \
     if [ \"$(busybox cat $port/name)\" = log ]; then IFS=: read -r major minor <$port/dev; fi; \
     done; busybox mknod /dev/log c $major $minor; busybox mknod /dev/hvc0 c 229 0";

/// The host's ends of both.
struct Ends {
    console: UnixStream,
    log: UnixStream,
}

impl Ends {
    /// Gives a machine the others.
    fn new() -> Result<(Self, [OwnedFd; 2])> {
        let (console, its_console) = UnixStream::pair()?;
        let (log, its_log) = UnixStream::pair()?;
        for end in [&console, &log] {
            end.set_read_timeout(Some(LIMIT))?;
        }
        Ok((Self { console, log }, [its_console.into(), its_log.into()]))
    }

    /// Reads from the console until there is `word`.
    fn wait_for(&mut self, word: &str) -> Result<String> {
        let mut text = String::new();
        let mut bytes = [0; 4096];
        while !text.contains(word) {
            let count = self.console.read(&mut bytes);
            let count = count.with_context(|| format!("no {word:?}, but {text:?}"))?;
            ensure!(count > 0, "the console ended: {text:?}");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        Ok(text)
    }

    /// Has a container use both.
    fn talk(&mut self, guest: &Guest, id: &str) -> Result<()> {
        let script = format!(
            "set -e; exec 2>/errors; {NODES}; echo a line of the log >/dev/log; exec 3<>/dev/hvc0; \
             echo ready >&3; read -r line <&3; echo \"$line\" >/got"
        );
        guest.start(id, None, &script)?;
        self.wait_for("ready\r\n")
            .with_context(|| guest.left(id, "errors"))?;
        self.console.write_all(b"typed at the host\n")?;
        same(guest.end(id)?, 0).with_context(|| guest.left(id, "errors"))?;
        same(guest.left(id, "got").as_str(), "typed at the host\n")?;
        let mut line = [0; 18];
        self.log.read_exact(&mut line)?;
        same(line, *b"a line of the log\n")
    }
}

fn add(devices: &mut DeviceConfigs, fds: &mut Vec<OwnedFd>, ends: [OwnedFd; 2]) {
    let first = fds.len() as u32;
    fds.extend(ends);
    devices.console = Some(ConsoleConfig {
        console: Some(first),
        input: true,
        log: Some(first + 1),
    });
}

fn metrics(vmm: &mut Vmm) -> Result<DeviceMetrics> {
    let devices = vmm.status()?.devices;
    let console = devices
        .iter()
        .find(|device| device.kind == DeviceKind::Console);
    Ok(console.context("no console")?.metrics)
}

fn a_console_and_a_log_carry_bytes(context: &Context) -> Result<()> {
    const LONG: usize = 2 << 20;
    let (mut ends, theirs) = Ends::new()?;
    let mut guest = Guest::boot_changed(context, "console", SHARED_TAG, |config, fds| {
        add(&mut config.devices, fds, theirs);
    })?;
    ends.talk(&guest, "talk")?;
    let before = metrics(&mut guest.vmm)?;
    same(before.errors, 0)?;
    // Far more than a socket holds: nobody reads the console, and the guest goes
    // on.
    let flood = format!("{NODES}; busybox dd if=/dev/zero of=/dev/hvc0 bs=4096 count=256");
    guest.run("flood", None, &flood)?;
    let after = metrics(&mut guest.vmm)?;
    ensure!(after.errors > 0, "{after:?}");
    // Nor does the log lose any of as much, whose writer waits for who reads.
    let script = format!("{NODES}; busybox dd if=/dev/zero of=/dev/log bs=65536 count=32");
    guest.start("log", None, &script)?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    let mut zeros = vec![1; LONG];
    ends.log.read_exact(&mut zeros)?;
    ensure!(zeros.iter().all(|byte| *byte == 0), "not what was written");
    same(guest.end("log")?, 0)?;
    let last = metrics(&mut guest.vmm)?;
    same(last.errors, after.errors)?;
    println!("    {last:?}");
    guest.stop()
}

fn a_clone_has_a_console_and_a_log_of_its_own(context: &Context) -> Result<()> {
    let (ends, theirs) = Ends::new()?;
    let mut template = Guest::boot_changed(context, "console-template", "", |config, fds| {
        add(&mut config.devices, fds, theirs);
    })?;
    let dir = template.host.dir.clone();
    template
        .vmm
        .snapshot(&dir.join("state"), &dir.join("memory"))?;
    drop((template, ends));

    let host = Host::new(context, "console-clone")?;
    let (mut ends, theirs) = Ends::new()?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    vmm.clone_with(
        &dir.join("state"),
        &dir.join("memory"),
        &context.products,
        &host.dir,
        |devices, fds| add(devices, fds, theirs),
    )?;
    vmm.wait_clone().with_context(|| host.console())?;
    let runtime = runtime()?;
    let (agent, _) = host.set_up(&runtime)?;
    let clone = Guest {
        host,
        vmm,
        runtime,
        agent,
    };
    ends.talk(&clone, "talk")?;
    clone.stop()
}
