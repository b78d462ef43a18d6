// SPDX-License-Identifier: Apache-2.0
//! A guest in which programs use its devices, and the same programs on the
//! host, in memory, as their peers.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_agent_protocol::agent::DeviceNode;
use bulkhead_agent_protocol::{oci, SHARED_MOUNT};

use super::{progress, Bench, LIMIT};
use crate::boxed::hot::with_libraries;
use crate::guest::Guest;
use crate::{load, proc};

const MEMORY_MIB: u32 = 256;
/// How long one step may take, in virtual time: ten times what the longest does.
const PATIENCE: Duration = Duration::from_secs(20);
/// Guests to try: in QEMU's emulation of SVM one hangs now and then, and turns
/// in its kernel for ever without leaving it.
const TRIES: u32 = 3;
/// The program of [`load`].
pub const PROGRAM: &str = "bulkhead-load";
/// The root file system of its containers, in the shared directory.
const ROOT: &str = "load";
/// Where a disk is in a container.
pub const DISK: &str = "/dev/disk";

/// A guest for programs that use its devices.
pub struct Loads {
    /// The guest.
    pub guest: Guest,
    dir: PathBuf,
    program: PathBuf,
    runs: Cell<u32>,
}

/// Has figures taken with a guest, and with another one when it hangs.
///
/// # Errors
/// Those of the last.
pub fn with_guest<T>(
    bench: &Bench,
    name: &str,
    take: impl Fn(&mut Loads) -> Result<T>,
) -> Result<T> {
    let mut number = 1;
    loop {
        let guest = Loads::start(bench, &format!("{name}-{number}"));
        match guest.and_then(|mut loads| take(&mut loads)) {
            Err(error) if number < TRIES => {
                progress(&format!("{name}: once more, for this: {error:#}"));
                number += 1;
            }
            outcome => return outcome,
        }
    }
}

impl Loads {
    /// Boots one, with a directory of its own.
    fn start(bench: &Bench, name: &str) -> Result<Self> {
        let dir = bench.dir.join(name);
        let root = dir.join("shared").join(ROOT);
        for below in ["dev", "proc", "data"] {
            fs::create_dir_all(root.join(below))?;
        }
        let program = bench.products.program(PROGRAM);
        for file in with_libraries(&program)? {
            let place = match file == program {
                true => root.join(PROGRAM),
                false => root.join(file.strip_prefix("/")?),
            };
            fs::create_dir_all(place.parent().context("a file without a directory")?)?;
            fs::copy(&file, &place).with_context(|| format!("copy {}", file.display()))?;
        }
        let guest = Guest::boot(&bench.products, &dir, MEMORY_MIB, PATIENCE)?;
        progress(&format!("{name}: the guest runs"));
        Ok(Self {
            guest,
            program: root.join(PROGRAM),
            dir,
            runs: Cell::new(0),
        })
    }

    /// A directory that programs in the guest have at `/data`.
    pub fn data(&self) -> PathBuf {
        self.dir.join("shared").join(ROOT).join("data")
    }

    /// Runs the program in the guest; the nanoseconds that it tells.
    ///
    /// # Errors
    /// When it fails.
    pub fn in_guest(&self, disk: Option<&DeviceNode>, load: &[&str]) -> Result<Vec<u64>> {
        self.runs.set(self.runs.get() + 1);
        let id = format!("load-{}", self.runs.get());
        let (_, outcome) = self.guest.run(&id, specification(disk, load))?;
        self.guest.delete(&id)?;
        let output = outcome.ok().with_context(|| load.join(" "))?;
        progress(&format!("in the guest: {}", load.join(" ")));
        numbers(&String::from_utf8_lossy(&output))
    }

    /// The same on the host.
    ///
    /// # Errors
    /// When it fails.
    pub fn on_host(&self, load: &[&str]) -> Result<Vec<u64>> {
        let done = proc::run(Command::new(&self.program).args(load), LIMIT)?.ok()?;
        numbers(&done.out())
    }

    /// Where the guest's connections to `port` of the host come.
    ///
    /// # Errors
    /// Those of listening.
    pub fn listen(&self, port: u32) -> Result<(UnixListener, String)> {
        let path = self.dir.join(format!("vsock_{port}"));
        let listener = UnixListener::bind(&path)?;
        // The VMM is a user of its own.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
        Ok((listener, path.to_string_lossy().into_owned()))
    }
}

/// Serves so many connections, one after another.
pub fn serve(listener: UnixListener, connections: usize) -> JoinHandle<Result<()>> {
    thread::spawn(move || {
        for _ in 0..connections {
            load::serve(&mut listener.accept()?.0, || Ok(()))?;
        }
        Ok(())
    })
}

fn numbers(text: &str) -> Result<Vec<u64>> {
    let numbers = text.lines().map(|line| line.parse::<u64>());
    numbers
        .collect::<Result<_, _>>()
        .with_context(|| format!("not numbers: {text:?}"))
}

fn specification(disk: Option<&DeviceNode>, load: &[&str]) -> oci::Spec {
    let mount = |destination: &str, kind: &str| oci::Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: kind.into(),
        ..Default::default()
    };
    let devices = disk.map(|node| oci::Device {
        path: DISK.into(),
        type_: "b".into(),
        major: node.major.into(),
        minor: node.minor.into(),
        file_mode: Some(0o600),
        ..Default::default()
    });
    let namespaces = ["pid", "mount"].map(|kind| oci::Namespace {
        type_: kind.into(),
        ..Default::default()
    });
    let every = oci::DeviceRule {
        allow: true,
        access: "rwm".into(),
        ..Default::default()
    };
    let arguments = std::iter::once(format!("/{PROGRAM}"));
    let arguments = arguments.chain(load.iter().map(|argument| (*argument).to_owned()));
    oci::Spec {
        version: "1.2.0".into(),
        process: Some(oci::Process {
            args: arguments.collect(),
            cwd: "/".into(),
            ..Default::default()
        })
        .into(),
        root: Some(oci::Root {
            path: format!("{SHARED_MOUNT}/{ROOT}"),
            ..Default::default()
        })
        .into(),
        mounts: vec![mount("/proc", "proc"), mount("/dev", "tmpfs")],
        linux: Some(oci::Linux {
            namespaces: namespaces.to_vec(),
            devices: devices.into_iter().collect(),
            resources: Some(oci::Resources {
                devices: vec![every],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// How many of these are done in a second.
pub fn per_second(count: u64, nanoseconds: u64) -> f64 {
    count as f64 * 1e9 / nanoseconds as f64
}

/// How many MiB these bytes in that time make in a second.
pub fn mib_per_second(bytes: u64, nanoseconds: u64) -> f64 {
    per_second(bytes, nanoseconds) / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_made_of_what_a_program_tells() {
        assert_eq!(numbers("12\n7\n").unwrap(), [12, 7]);
        assert!(numbers("12\nx\n").is_err());
        assert_eq!(per_second(500, 250_000_000), 2000.0);
        assert_eq!(mib_per_second(8 << 20, 500_000_000), 16.0);
    }
}
