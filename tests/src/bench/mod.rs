// SPDX-License-Identifier: Apache-2.0
//! Figures: what a start costs, in time, memory and bytes, beside peers that
//! are measured in the same run. All of them are taken in one box in virtual
//! time, where they do not depend on what else this machine does.

pub mod agent;
pub mod blk;
pub mod boot;
pub mod clone;
pub mod density;
pub mod devices;
pub mod files;
pub mod ksm;
pub mod kvm;
pub mod memory;
pub mod net;
pub mod peer;
pub mod pod;
pub mod size;
pub mod start;
pub mod vsock;

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};

use crate::containerd::Containerd;
use crate::image;
use crate::inside;
use crate::install::{Config, Products};

/// How long one command may take; virtual time is slow time.
pub const LIMIT: Duration = Duration::from_secs(300);

/// One figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// Its name; stays the same from run to run.
    pub name: String,
    /// Its value.
    pub value: f64,
    /// What it counts.
    pub unit: String,
    /// Who else was measured.
    pub peer: Option<String>,
    /// The peer's value.
    pub peer_value: Option<f64>,
    /// The value over the peer's.
    pub ratio: Option<f64>,
    /// How it was taken.
    pub how: String,
}

impl Figure {
    /// A figure without a peer.
    pub fn new(name: &str, value: f64, unit: &str, how: &str) -> Self {
        Self {
            name: name.into(),
            value,
            unit: unit.into(),
            peer: None,
            peer_value: None,
            ratio: None,
            how: how.into(),
        }
    }

    /// The same, beside a peer.
    #[must_use]
    pub fn beside(self, peer: &str, value: f64) -> Self {
        Self {
            peer: Some(peer.into()),
            peer_value: Some(value),
            ratio: (value > 0.0).then(|| self.value / value),
            ..self
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let mut line = format!("{:<16}{:>14.3} {:<12}", self.name, self.value, self.unit);
        if let (Some(peer), Some(value)) = (&self.peer, self.peer_value) {
            line.push_str(&format!("{peer} {value:.3}"));
        }
        if let Some(ratio) = self.ratio {
            line.push_str(&format!(", ratio {ratio:.2}"));
        }
        line
    }
}

/// The middle value.
///
/// # Errors
/// When there is none.
pub fn median(mut values: Vec<f64>) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => bail!("nothing was measured"),
        n if n % 2 == 1 => Ok(values[n / 2]),
        n => Ok((values[n / 2 - 1] + values[n / 2]) / 2.0),
    }
}

/// What the figures are taken with: a root file system and, for those that
/// want it, a private containerd, all in memory.
pub struct Bench {
    /// The build products.
    pub products: Products,
    /// A directory in memory.
    pub dir: PathBuf,
    /// Bulkhead's configuration.
    pub config: PathBuf,
    containerd: OnceCell<Containerd>,
}

impl Bench {
    /// Sets everything up.
    ///
    /// # Errors
    /// When something does not start.
    pub fn start() -> Result<Self> {
        let products = Products::find()?;
        products.check()?;
        let dir = inside::work_dir("bulkhead-bench");
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let config = dir.join("config.toml");
        settings(&products, &dir).write(&config)?;
        Ok(Self {
            products,
            dir,
            config,
            containerd: OnceCell::new(),
        })
    }

    /// containerd, with the image imported.
    ///
    /// # Errors
    /// When it does not start.
    pub fn containerd(&self) -> Result<&Containerd> {
        if let Some(containerd) = self.containerd.get() {
            return Ok(containerd);
        }
        let dir = self.dir.join("c");
        let containerd = Containerd::start(&dir, &self.products.bin_dir(), &self.config)?;
        containerd.import(&image::cached()?)?;
        Ok(self.containerd.get_or_init(|| containerd))
    }

    /// Changes Bulkhead's configuration for what is started from now on.
    ///
    /// # Errors
    /// Those of writing.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) -> Result<()> {
        let mut settings = settings(&self.products, &self.dir);
        change(&mut settings);
        settings.write(&self.config)
    }

    /// A root file system with busybox in it.
    ///
    /// # Errors
    /// Those of writing.
    pub fn rootfs(&self) -> Result<PathBuf> {
        let rootfs = self.dir.join("rootfs");
        if !rootfs.exists() {
            for below in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
                fs::create_dir_all(rootfs.join(below))?;
            }
            fs::copy("/bin/busybox", rootfs.join("bin/busybox")).context("copy busybox")?;
            for name in ["true", "sh", "sleep"] {
                std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(name))?;
            }
        }
        Ok(rootfs)
    }

    /// Ends everything.
    ///
    /// # Errors
    /// When something stays.
    pub fn stop(self) -> Result<()> {
        if let Some(containerd) = self.containerd.into_inner() {
            containerd.stop()?;
        }
        crate::containerd::remove_tree(&self.dir)
    }
}

/// What Bulkhead is configured to unless a measurement changes it.
fn settings(products: &Products, dir: &Path) -> Config {
    Config {
        merge_groups: vec!["red".into(), "blue".into()],
        ..products.config(&dir.join("state"))
    }
}

/// Tells how far a long measurement is.
pub fn progress(words: &str) {
    println!("  {words}");
}

/// Takes the figures of one group.
type Take = fn(&Bench) -> Result<Vec<Figure>>;

/// What is taken together, by the names of its figures.
const GROUPS: &[(&str, Take)] = &[
    (
        "agent-size, shim-size, vmm-size, kernel-size",
        size::figures,
    ),
    ("boot-exits", boot::exits),
    (
        "boot-syscalls, boot-create-vm, boot-gsi-routing, boot-memslots",
        boot::syscalls,
    ),
    ("vmm-boot", peer::boot),
    ("vmm-boot-stock", peer::boot_stock),
    (
        "snapshot-create, vmm-restore, vmm-restore-call, restore-exits, restore-faults, vmm-private, vmm-private-clone",
        clone::figures,
    ),
    ("blk-4k, blk-1m", blk::figures),
    ("fs-open, fs-read-cached", files::figures),
    ("vsock-rtt, vsock-both-ways", vsock::figures),
    ("net-exits-per-mib", net::figures),
    ("ctr-run, boot, boot-kernel", start::ctr_run),
    ("run", start::run),
    ("host-private, guest-private", memory::figures),
    (
        "pod-start, pod-exec, pod-delete, pod-start-rpcs, pod-start-processes, shim-private",
        pod::figures,
    ),
];

/// The same, of many pods at once, and of crun in a guest, where nothing is
/// fast in virtual time: they take long, so only when asked for.
const ON_REQUEST: &[(&str, Take)] = &[
    ("agent-create, agent-exec, agent-rpc", agent::figures),
    (
        "pod-memory, pod-memory-ksm, pod-memory-huge, ksm-across-groups",
        density::figures,
    ),
    ("ksm-page-seconds, ksm-cpu, ksm-idle-cpu", ksm::figures),
];

/// Environment variable with a part of the names of the figures to take, or
/// several with commas between; those of single pods are without it.
const ONLY: &str = "BULKHEAD_BENCH";

/// Takes all figures; each is told as soon as it is there, and so is each that
/// could not be taken.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(tell: &mut dyn FnMut(Result<Figure>)) -> Result<()> {
    let bench = Bench::start()?;
    let only = std::env::var(ONLY).unwrap_or_default();
    let on_request = ON_REQUEST.iter().filter(|_| !only.is_empty());
    for (names, take) in GROUPS.iter().chain(on_request) {
        if !only.split(',').any(|part| names.contains(part)) {
            continue;
        }
        match take(&bench).context(*names) {
            Ok(figures) => figures.into_iter().for_each(|figure| tell(Ok(figure))),
            Err(error) => tell(Err(error)),
        }
    }
    bench.stop()
}

/// Writes the figures as JSON.
///
/// # Errors
/// Those of writing.
pub fn write(path: &Path, figures: &[Figure]) -> Result<()> {
    let text = serde_json::to_string_pretty(figures)?;
    fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]).unwrap(), 2.0);
        assert_eq!(median(vec![4.0, 1.0]).unwrap(), 2.5);
        assert!(median(vec![]).is_err());
    }

    #[test]
    fn a_ratio_is_to_the_peer() {
        let figure = Figure::new("x", 3.0, "ms", "").beside("runc", 2.0);
        assert_eq!(figure.ratio, Some(1.5));
        assert!(figure.line().contains("runc 2.000, ratio 1.50"));
        assert_eq!(Figure::new("x", 3.0, "ms", "").beside("p", 0.0).ratio, None);
    }
}
