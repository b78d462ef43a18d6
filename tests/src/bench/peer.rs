// SPDX-License-Identifier: Apache-2.0
//! A boot by itself, beside QEMU's smallest machine.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use bulkhead_rootfs_builder::cpio::Archive;
use bulkhead_runtime::hypervisor::cmdline;
use bulkhead_vmm_api::{Call, DeviceConfigs, KernelConfig, Pages, VmConfig};

use super::{median, Bench, Figure, LIMIT};
use crate::boxed::hot::with_libraries;
use crate::install::{which, Products};
use crate::vmm::Vmm;

/// Runs of each, the first of which does not count.
const RUNS: usize = 4;
const MEMORY_MIB: u32 = 256;
/// What init says first.
const WORD: &str = "init-is-here";
/// QEMU's program.
const QEMU: &str = "qemu-system-x86_64";
/// What its smallest machine starts a kernel with.
const FIRMWARE: &[&str] = &[
    "/usr/share/qemu/bios-microvm.bin",
    "/usr/share/seabios/bios-microvm.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
];

/// Environment variable with the image of a kernel of the distribution.
pub const STOCK_KERNEL: &str = "BULKHEAD_STOCK_KERNEL";

/// What QEMU reads when it starts. Where it came from the machine outside, the
/// peer would wait for that, which is busy or not.
///
/// # Errors
/// Those of looking for its libraries.
pub fn hot() -> Result<Vec<PathBuf>> {
    let Some(qemu) = which(QEMU) else {
        return Ok(Vec::new());
    };
    let mut files = with_libraries(&qemu)?;
    files.extend(FIRMWARE.iter().map(PathBuf::from));
    files.retain(|file| file.exists());
    Ok(files)
}

/// `vmm-boot`: both monitors boot the same kernel with the same initial
/// directory and command line, until its init speaks.
///
/// # Errors
/// Without QEMU; when a guest does not come up.
pub fn boot(bench: &Bench) -> Result<Vec<Figure>> {
    let figure = side_by_side(
        bench,
        "vmm-boot",
        "the guest kernel of this project",
        &bench.products.kernel(),
    )?;
    Ok(vec![figure])
}

/// `vmm-boot-stock`: as [`boot`], of a kernel as the distribution has it.
///
/// # Errors
/// Without such a kernel or QEMU; when a guest does not come up.
pub fn boot_stock(bench: &Bench) -> Result<Vec<Figure>> {
    let kernel = std::env::var_os(STOCK_KERNEL)
        .with_context(|| format!("{STOCK_KERNEL} names no kernel"))?;
    let figure = side_by_side(
        bench,
        "vmm-boot-stock",
        "Debian's kernel for virtual machines; target: ratio at most 0.36",
        Path::new(&kernel),
    )?;
    Ok(vec![figure])
}

fn side_by_side(bench: &Bench, name: &str, what: &str, kernel: &Path) -> Result<Figure> {
    let qemu = which(QEMU).with_context(|| format!("{QEMU} is not installed"))?;
    let dir = bench.dir.join(name);
    let files = Files::write(kernel, &dir)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..RUNS {
        let our = files.bulkhead(&bench.products).context("bulkhead-vmm")?;
        let their = files.qemu(&qemu).context(QEMU)?;
        super::progress(&format!("{name}: {our:.0} ms, {QEMU} {their:.0} ms"));
        if run > 0 {
            ours.push(our);
            theirs.push(their);
        }
    }
    fs::remove_dir_all(&dir)?;
    let how = format!(
        "exec to the first word of init, {MEMORY_MIB} MiB, one processor, transparent huge pages, a serial port and no other device; median of {}, beside the best of as many; {what}",
        ours.len()
    );
    let figure = Figure::new(name, median(ours)?, "ms", &how);
    // What the box adds to some of its runs is not QEMU's.
    let best = theirs.into_iter().min_by(f64::total_cmp);
    Ok(figure.beside("QEMU microvm", best.context("no run of QEMU")?))
}

/// What both boot.
struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
    cmdline: String,
}

impl Files {
    /// Puts them into memory.
    fn write(image: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let (kernel, initrd) = (dir.join("vmlinux"), dir.join("initrd"));
        fs::copy(image, &kernel).context("copy the guest kernel")?;
        let busybox = which("busybox").context("busybox is missing (package busybox-static)")?;
        let mut archive = Archive::new();
        for dir in ["bin", "dev"] {
            archive.dir(dir);
        }
        archive.char_dev("dev/console", 0o600, 5, 1);
        archive.file("bin/busybox", 0o755, &fs::read(busybox)?);
        let script = format!("#!/bin/busybox sh\necho {WORD}\nexec busybox sleep 9999\n");
        archive.file("init", 0o755, script.as_bytes());
        fs::write(&initrd, archive.finish())?;
        Ok(Self {
            kernel,
            initrd,
            // An initial directory comes before the root device that it names.
            cmdline: cmdline::build(""),
        })
    }

    fn bulkhead(&self, products: &Products) -> Result<f64> {
        let (serial, theirs) = UnixStream::pair()?;
        serial.set_read_timeout(Some(LIMIT))?;
        let fds: [OwnedFd; 3] = [
            File::open(&self.kernel)?.into(),
            File::open(&self.initrd)?.into(),
            theirs.into(),
        ];
        let config = VmConfig {
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            // As the peer has them, where the host gives them to all.
            pages: Pages::Transparent,
            merge_group: None,
            kernel: KernelConfig {
                image: 0,
                cmdline: self.cmdline.clone(),
                initrd: Some(1),
            },
            serial: Some(2),
            devices: DeviceConfigs {
                rng: false,
                ..DeviceConfigs::default()
            },
        };
        let begin = Instant::now();
        let mut vmm = Vmm::start(products, LIMIT)?;
        vmm.call(Call::Configure(Box::new(config)), &fds)?;
        vmm.call(Call::Boot, &[])?;
        wait_for_word(serial, begin)
    }

    fn qemu(&self, qemu: &Path) -> Result<f64> {
        let mut command = Command::new(qemu);
        command
            .args(["-M", "microvm,accel=kvm", "-cpu", "host", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-m", &MEMORY_MIB.to_string(), "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd)
            .args(["-append", &self.cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let begin = Instant::now();
        let mut child = Running(command.spawn().context("run it")?);
        let serial = child.0.stdout.take().context("its output")?;
        wait_for_word(serial, begin)
    }
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds from `begin` until init has spoken.
fn wait_for_word(mut serial: impl Read, begin: Instant) -> Result<f64> {
    let mut text = Vec::new();
    let mut part = [0; 512];
    loop {
        let length = serial.read(&mut part).context("the guest's console")?;
        text.extend(&part[..length]);
        let said = String::from_utf8_lossy(&text);
        if said.contains(WORD) {
            return Ok(begin.elapsed().as_secs_f64() * 1000.0);
        }
        if length == 0 {
            bail!("the guest ended: {said}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_ends_is_told_from_one_that_speaks() {
        let begin = Instant::now();
        let said = format!("a line\n{WORD}\n");
        assert!(wait_for_word(said.as_bytes(), begin).is_ok());
        let error = wait_for_word(&b"Kernel panic"[..], begin).unwrap_err();
        assert!(error.to_string().contains("Kernel panic"));
    }
}
