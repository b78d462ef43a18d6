// SPDX-License-Identifier: Apache-2.0
//! `bulkhead density`: what each pod on this host costs of its memory, what they
//! share, and how many more would fit.

mod process;
mod report;
mod smaps;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_ksm_throttler::sysfs::{self, Ksm};
use serde::Serialize;

use self::process::{field, PAGE};
use crate::resource::cgroup;
use crate::sandbox::directory::{Directory, Identity};

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Places {
    /// Where sandboxes keep their state.
    pub state_dir: PathBuf,
    /// Of processes.
    pub proc: PathBuf,
    /// KSM's directory.
    pub ksm: PathBuf,
    /// Of control groups, version 2.
    pub cgroups: PathBuf,
}

impl Places {
    /// Of this host.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.into(),
            proc: "/proc".into(),
            ksm: sysfs::DIRECTORY.into(),
            cgroups: cgroup::v2_root().unwrap_or_default(),
        }
    }
}

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum DensityError {
    /// The list of sandboxes.
    #[error("{} cannot be read (runtime.state_dir); root can", path.display())]
    Sandboxes {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pod's process.
    #[error("memory of process {pid} cannot be looked at; root can")]
    Process {
        /// Which.
        pid: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The host's figures.
    #[error("{} cannot be read", path.display())]
    Host {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Everything that is told. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Density {
    /// By namespace and id.
    pub pods: Vec<Pod>,
    /// The host as a whole.
    pub host: Host,
    /// What pods need not have for themselves.
    pub shared: Shared,
    /// How many more would fit; none without a pod to go by.
    pub room: Option<Room>,
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pod {
    /// containerd's namespace, or what stands for it.
    pub namespace: String,
    /// Its id.
    pub id: String,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// The shim's process, or that of `bulkhead run`.
    pub shim_pid: u32,
    /// Memory that its guest may use.
    pub size: u64,
    /// Guest memory that it has touched and that is its own.
    pub guest: u64,
    /// Guest memory that it has touched.
    pub guest_resident: u64,
    /// The VMM's own memory beside the guest's.
    pub vmm: u64,
    /// The shim's own memory.
    pub shim: u64,
    /// Page tables of both processes, and those of the guest where the kernel
    /// tells.
    pub page_tables: u64,
    /// What else the host's kernel keeps for the pod; none: its control group
    /// does not tell.
    pub kernel: Option<u64>,
    /// All of that which is its own.
    pub own: u64,
    /// Pages of files that it maps and others too.
    pub file_shared: u64,
    /// What it would take more if it had those for itself.
    #[serde(skip)]
    file_saved: u64,
    /// Guest memory that is still that of the template it was cloned from, and
    /// that others have too.
    pub template_shared: u64,
    /// What it would take more if it had that for itself.
    #[serde(skip)]
    template_saved: u64,
    /// Guest memory that KSM has merged; none: the kernel does not tell.
    pub merged: Option<u64>,
    /// The merge group that it asked for.
    pub merge_group: Option<String>,
    /// Whether its memory is mergeable.
    pub mergeable: bool,
}

/// The host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Memory in all.
    pub memory: u64,
    /// What may still be used.
    pub available: u64,
    /// Page tables of all processes.
    pub page_tables: u64,
    /// Page tables of all guests; none: the kernel does not tell (before 6.0).
    pub guest_page_tables: Option<u64>,
}

/// What is shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shared {
    /// What pods would take more if each had the files' pages that it maps for
    /// itself: programs, libraries, the guest image.
    pub page_cache: u64,
    /// The same of guest memory that is still a template's.
    pub template: u64,
    /// What KSM saves on the whole host, of whoever's memory; none: no KSM.
    pub ksm: Option<u64>,
}

/// How many more would fit into what is available.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Room {
    /// What one more would cost that is like those that are there, on average.
    pub each: u64,
    /// Pods that are like those, on average.
    pub like_these: u64,
    /// The same if all, also those that are there, used all of their guests'
    /// memory and nothing was merged.
    pub all_used: u64,
}

impl Density {
    /// Looks.
    ///
    /// # Errors
    /// See [`DensityError`].
    pub fn take(places: &Places) -> Result<Self, DensityError> {
        let sandboxes =
            Directory::all(&places.state_dir).map_err(|source| DensityError::Sandboxes {
                path: places.state_dir.clone(),
                source,
            })?;
        let mut pods = Vec::new();
        for identity in sandboxes {
            let pid = identity.vmm_pid;
            match pod(places, identity) {
                Ok(Some(pod)) => pods.push(pod),
                Ok(None) => {}
                Err(source) => return Err(DensityError::Process { pid, source }),
            }
        }
        let path = places.proc.join("meminfo");
        let host = match fs::read_to_string(&path) {
            Ok(text) => host(&text),
            Err(source) => return Err(DensityError::Host { path, source }),
        };
        let shared = Shared {
            page_cache: pods.iter().map(|pod| pod.file_saved).sum(),
            template: pods.iter().map(|pod| pod.template_saved).sum(),
            ksm: Ksm::find(&places.ksm)
                .and_then(|ksm| ksm.counters())
                .ok()
                .map(|counters| counters.saved().saturating_mul(PAGE)),
        };
        Ok(Self {
            room: room(&pods, &host),
            pods,
            host,
            shared,
        })
    }
}

/// `None` when it is gone, or about to be.
fn pod(places: &Places, identity: Identity) -> io::Result<Option<Pod>> {
    let (vmm, shim) = (identity.vmm_pid, identity.pid);
    // Numbers come again; a VMM does not outlive its parent.
    if !process::is_child(&places.proc, vmm, shim) {
        return Ok(None);
    }
    let (Some(of_vmm), Some(of_shim)) = (
        process::sums(&places.proc, vmm)?,
        process::sums(&places.proc, shim)?,
    ) else {
        return Ok(None);
    };
    let charged = process::charged(&places.proc, &places.cgroups, vmm, &[vmm, shim]);
    let page_tables = process::page_tables(&places.proc, vmm)
        + process::page_tables(&places.proc, shim)
        + charged.map_or(0, |charged| charged.guest_tables);
    let kernel = charged.map(|charged| charged.other);
    let vmm_own = of_vmm.private;
    Ok(Some(Pod {
        namespace: identity.namespace,
        id: identity.id,
        vmm_pid: vmm,
        shim_pid: shim,
        size: u64::from(identity.memory_mib) << 20,
        guest: of_vmm.guest_private,
        guest_resident: of_vmm.guest_resident,
        vmm: vmm_own,
        shim: of_shim.private,
        page_tables,
        kernel,
        own: of_vmm.guest_private + vmm_own + of_shim.private + page_tables + kernel.unwrap_or(0),
        file_shared: of_vmm.file_shared + of_shim.file_shared,
        file_saved: of_vmm.file_saved + of_shim.file_saved,
        template_shared: of_vmm.template_shared,
        template_saved: of_vmm.template_saved,
        merged: process::merged(&places.proc, vmm),
        merge_group: identity.merge_group,
        mergeable: identity.mergeable,
    }))
}

fn host(meminfo: &str) -> Host {
    let value = |key| field(meminfo, key).and_then(smaps::kib);
    Host {
        memory: value("MemTotal").unwrap_or_default(),
        available: value("MemAvailable").unwrap_or_default(),
        page_tables: value("PageTables").unwrap_or_default(),
        guest_page_tables: value("SecPageTables"),
    }
}

fn room(pods: &[Pod], host: &Host) -> Option<Room> {
    let count = pods.len() as u64;
    let sum = |of: fn(&Pod) -> u64| pods.iter().map(of).sum::<u64>();
    let each = sum(|pod| pod.own).checked_div(count)?.max(1);
    // Beside the guest's memory.
    let around = sum(|pod| pod.own - pod.guest) / count;
    let full = (sum(|pod| pod.size) / count + around).max(1);
    let unused = sum(|pod| pod.size.saturating_sub(pod.guest));
    Some(Room {
        each,
        like_these: host.available / each,
        all_used: host.available.saturating_sub(unused) / full,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn density() -> Density {
        let pod = |id: &str, guest: u64| Pod {
            namespace: "default".into(),
            id: id.into(),
            vmm_pid: 3,
            shim_pid: 2,
            size: 256 << 20,
            guest,
            guest_resident: 40 << 20,
            vmm: 2 << 20,
            shim: 6 << 20,
            page_tables: 1 << 20,
            kernel: Some(1 << 20),
            own: guest + (10 << 20),
            file_shared: 9 << 20,
            file_saved: 8 << 20,
            template_shared: 5 << 20,
            template_saved: 4 << 20,
            merged: Some((40 << 20) - guest),
            merge_group: Some("red".into()),
            mergeable: true,
        };
        let pods = vec![pod("a", 40 << 20), pod("b", 10 << 20)];
        let host = host(
            "MemTotal:   2097152 kB\nMemAvailable:   1048576 kB\nPageTables:  4096 kB\nSecPageTables: 2048 kB\n",
        );
        Density {
            room: room(&pods, &host),
            pods,
            host,
            shared: Shared {
                page_cache: 16 << 20,
                template: 8 << 20,
                ksm: Some(30 << 20),
            },
        }
    }

    #[test]
    fn room_is_told_for_idle_and_for_busy_pods() {
        let density = density();
        assert_eq!(density.host.guest_page_tables, Some(2 << 20));
        let room = density.room.unwrap();
        assert_eq!(room.each, 35 << 20);
        assert_eq!(room.like_these, 1024 / 35);
        // 462 MiB of those that are there would be used, too.
        assert_eq!(room.all_used, (1024 - 462) / 266);
        assert_eq!(super::room(&[], &density.host), None);
    }

    #[test]
    fn sandboxes_without_a_machine_are_no_pods() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places::new(dir.path());
        let density = Density::take(&places).unwrap();
        assert!(density.pods.is_empty() && density.host.memory > 0);
        let directory = Directory::of(dir.path(), "default", "x");
        directory.create().unwrap();
        let identity = Identity {
            namespace: "default".into(),
            id: "x".into(),
            pid: std::process::id(),
            // Not this process's child.
            vmm_pid: std::process::id(),
            memory_mib: 256,
            ..Identity::default()
        };
        directory.identify(&identity).unwrap();
        assert!(Density::take(&places).unwrap().pods.is_empty());
    }
}
