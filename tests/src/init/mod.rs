// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the box: makes a host of the bare kernel, then runs commands for
//! the box's owner until the owner goes.

mod mounts;
mod serve;
mod session;

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::boxed::initramfs::{Plan, PLAN_PATH};
use crate::boxed::proto::{Ready, PORT_NAME};
use crate::sys;

/// Does all of it; returns only by ending the machine.
pub fn main() {
    if std::process::id() != 1 {
        eprintln!("bulkhead-box-init is the first process of a box and nothing else");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        // The console is the standard error of PID 1, and the owner keeps it.
        eprintln!("bulkhead-box-init: {error:#}");
    }
    sys::reset()
}

fn run() -> Result<()> {
    mounts::kernel_views(Path::new("/"))?;
    let plan = fs::read(PLAN_PATH).context("read the plan")?;
    let plan: Plan = serde_json::from_slice(&plan).context("understand the plan")?;
    let params = fs::read_to_string("/proc/cmdline").context("read /proc/cmdline")?;
    let mut warnings = Vec::new();

    // What the root does not need is inserted while the root is mounted.
    let needed = plan.modules.iter().filter(|(_, needed)| *needed);
    for (name, _) in needed {
        insert(name, &params).with_context(|| format!("insert the module {name}"))?;
    }
    let others: Vec<String> = plan
        .modules
        .iter()
        .filter(|(_, needed)| !needed)
        .map(|(name, _)| name.clone())
        .collect();
    let inserting = thread::spawn(move || {
        let failed = others
            .iter()
            .filter_map(|name| Some((name, insert(name, &params).err()?)));
        failed
            .map(|(name, error)| format!("module {name}: {error}"))
            .collect::<Vec<_>>()
    });
    mounts::root(&plan, &mut warnings)?;
    match inserting.join() {
        Ok(failed) => warnings.extend(failed),
        Err(_) => bail!("inserting modules panicked"),
    }
    mounts::enter(&plan, &mut warnings)?;
    if let Err(error) = sys::loopback_up() {
        warnings.push(format!("loopback interface: {error}"));
    }
    nix::unistd::sethostname("bulkhead-box").context("set the host name")?;

    let port = open_port(Duration::from_secs(20))?;
    let ready = Ready {
        release: fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("read the kernel's release")?
            .trim()
            .to_owned(),
        uptime_ms: uptime_ms(),
        warnings,
    };
    serve::serve(port, ready)
}

/// Inserts a module with the parameters that the kernel's command line has for
/// it as `module.parameter=value`. (The kernel itself applies those only to
/// what is built in; modprobe does it for the rest.)
fn insert(name: &str, cmdline: &str) -> io::Result<()> {
    let params = module_params(name, cmdline);
    let file = File::open(format!("/modules/{name}.ko"))?;
    match sys::insert_module(&file, &CString::new(params)?) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn module_params(name: &str, cmdline: &str) -> String {
    cmdline
        .split_whitespace()
        .filter_map(|word| {
            let (module, param) = word.split_once('.')?;
            (module.replace('-', "_") == name).then_some(param)
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Opens the port by its name; the device appears a moment after its driver.
fn open_port(limit: Duration) -> Result<File> {
    let begin = Instant::now();
    loop {
        if let Some(device) = find_port() {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(&device)
                .with_context(|| format!("open {}", device.display()));
        }
        if begin.elapsed() > limit {
            bail!("no virtio-serial port {PORT_NAME}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports
        .filter_map(|entry| entry.ok())
        .find(|port| {
            fs::read_to_string(port.path().join("name")).is_ok_and(|n| n.trim() == PORT_NAME)
        })
        .map(|port| Path::new("/dev").join(port.file_name()))
        .filter(|device| device.exists())
}

fn uptime_ms() -> u64 {
    fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse::<f64>().ok())
        .map_or(0, |seconds| (seconds * 1000.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_gets_its_own_parameters() {
        let line = "quiet kvm.nx_huge_pages=never kvm-amd.nested=0 root=/dev/vda kvm.x=1\n";
        assert_eq!(module_params("kvm", line), "nx_huge_pages=never x=1");
        assert_eq!(module_params("kvm_amd", line), "nested=0");
        assert_eq!(module_params("tun", line), "");
    }
}
