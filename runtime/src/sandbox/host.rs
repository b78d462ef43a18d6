// SPDX-License-Identifier: Apache-2.0
//! What a pod takes from the host before its machine boots: mounts, cgroups,
//! network, sockets. Each is in the journal before it is there.

use std::{
    fs::{File, Permissions},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::PathBuf,
};

use oci_spec::runtime::Spec;

use super::{blocking, directory::Directory, SandboxRequest};
use crate::{
    config,
    error::{Error, Step},
    hypervisor::{bulkhead::BulkheadVmm, Hypervisor, NicDevice},
    resource::{
        cgroup::SandboxCgroup,
        journal::{Journal, Resource},
        mount,
        network::{self, Network, Nic},
        process,
    },
};

/// Makes the shared directory a mount that passes on what is mounted below it
/// later: the VMM looks at it from a mount namespace of its own.
pub fn share(directory: &Directory, journal: &Journal) -> Result<(), Error> {
    let shared = directory.shared();
    let step = || format!("mount {} on itself", shared.display());
    let target = shared.clone();
    journal.record(Resource::Mount { target }).step(step)?;
    mount::share(&shared).step(step)
}

/// Makes the pod's cgroup, and puts this process there, where the VMM is born
/// then, or else into one of those beside the pods. The pod's, if the VMM has
/// still to be moved to it.
pub fn place(
    config: &config::Runtime,
    request: &SandboxRequest,
    spec: &Spec,
    journal: &Journal,
) -> Result<Option<SandboxCgroup>, Error> {
    let path = spec
        .linux()
        .as_ref()
        .and_then(|l| l.cgroups_path().as_ref());
    let Some(path) = path.map(|path| path.to_string_lossy()) else {
        return Ok(None);
    };
    let pods = SandboxCgroup::create(&path, journal)
        .step(|| format!("linux.cgroupsPath: make the cgroup {path}"))?;
    let Some(pods) = pods else { return Ok(None) };
    if config.sandbox_cgroup_only {
        pods.join().step(|| format!("move to the cgroup {path}"))?;
        return Ok(None);
    }
    let beside = format!(
        "{}/{}-{}",
        config.overhead_cgroup, request.namespace, request.id
    );
    let step = || format!("runtime.overhead_cgroup: move to the cgroup {beside}");
    if let Some(beside) = SandboxCgroup::create(&beside, journal).step(step)? {
        beside.join().step(step)?;
    }
    Ok(Some(pods))
}

/// Writes the VMM's process down, and puts it into the pod's cgroup if it is not
/// there.
pub fn adopt(
    vm: &BulkheadVmm,
    cgroup: Option<SandboxCgroup>,
    journal: &Journal,
) -> Result<(), Error> {
    let pid = vm.pid();
    // It dies with this process, and is found again by its start time.
    if let Some(start_time) = process::start_time(pid).step(|| "look at the VMM")? {
        journal
            .record(Resource::Process { pid, start_time })
            .step(|| "write the journal")?;
    }
    cgroup.map_or(Ok(()), |cgroup| {
        cgroup.add(pid).step(|| "move the VMM to the pod's cgroup")
    })
}

/// The VMM's network namespace.
pub fn open_network(vmm: u32) -> Result<File, Error> {
    let path = format!("/proc/{vmm}/ns/net");
    File::open(&path).step(|| format!("open {path}"))
}

/// Takes the pod's network over, where it has one.
pub async fn attach(netns: Option<PathBuf>, journal: Journal) -> Result<(Journal, Network), Error> {
    let Some(netns) = netns else {
        return Ok((journal, Network::default()));
    };
    blocking(move || {
        let network = network::attach(&netns, &journal)?;
        Ok((journal, network))
    })
    .await
}

/// Interfaces for a machine that has none, whose packets the host's kernel moves
/// or does not.
pub fn nics(nics: Vec<Nic>, vhost_net: bool) -> Result<Vec<NicDevice>, Error> {
    const VHOST: &str = "/dev/vhost-net";
    let numbered = nics.into_iter().enumerate();
    let device = |(number, nic): (usize, Nic)| {
        let open = || File::options().read(true).write(true).open(VHOST);
        let vhost = vhost_net.then(open).transpose();
        Ok(NicDevice {
            id: format!("net{number}"),
            tap: nic.tap,
            mac: nic.mac,
            mtu: nic.mtu,
            vhost: vhost
                .step(|| format!("open {VHOST} (hypervisor.vhost_net)"))?
                .map(Into::into),
        })
    };
    numbered.map(device).collect()
}

/// A socket in the pod's directory, for the VMM to connect to.
pub fn listen(path: PathBuf) -> Result<UnixListener, Error> {
    let listening = || format!("listen on {} (runtime.state_dir)", path.display());
    let listener = UnixListener::bind(&path).step(listening)?;
    // For the VMM, which is a user of its own; the directory keeps others out.
    std::fs::set_permissions(&path, Permissions::from_mode(0o666)).step(listening)?;
    Ok(listener)
}

/// The same, for the event loop.
pub fn watched(listener: UnixListener) -> Result<tokio::net::UnixListener, Error> {
    let set_up = || {
        listener.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(listener)
    };
    set_up().step(|| "watch a socket")
}
