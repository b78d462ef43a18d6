// SPDX-License-Identifier: Apache-2.0
//! SetupSandbox: what makes a booted guest this pod's. Entropy comes first: it
//! is what a clone of a template must have before anything else happens. And
//! AddNetwork, for a pod whose network comes later.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_agent_protocol::{agent, SHARED_MOUNT};
use nix::mount::{mount, MsFlags};

use crate::container::plan::sysctl_path;
use crate::devices;
use crate::error::{AgentError, Context, Result};
use crate::netlink::Netlink;
use crate::sys::host;

/// When things happened, on CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug)]
pub struct Times {
    /// The agent's main was entered.
    pub start_ns: u64,
    /// The agent dialled the host.
    pub ready_ns: std::sync::atomic::AtomicU64,
}

/// Where the guest's own resolv.conf is; the image links /etc/resolv.conf here.
const RESOLV_CONF: &str = "/run/resolv.conf";

/// Does what the request says and tells about the guest.
///
/// # Errors
/// The step that failed; [`AgentError::Invalid`] names the field.
pub fn set_up(
    request: &agent::SetupSandboxRequest,
    times: &Times,
    in_guest: bool,
) -> Result<agent::SetupSandboxReply> {
    if in_guest {
        change_guest(request)?;
    } else if request != &agent::SetupSandboxRequest::default() {
        return Err(AgentError::Precondition(
            "outside a guest the machine is not the agent's to set up".into(),
        ));
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(agent::SetupSandboxReply {
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: release.trim().into(),
        agent_start_ns: times.start_ns,
        agent_ready_ns: times.ready_ns.load(std::sync::atomic::Ordering::Relaxed),
        ..Default::default()
    })
}

fn change_guest(request: &agent::SetupSandboxRequest) -> Result<()> {
    if !request.entropy.is_empty() {
        let random = File::open("/dev/urandom").step(|| "open /dev/urandom")?;
        host::add_entropy(random.as_fd(), &request.entropy).step(|| "add entropy")?;
    }
    if request.realtime_ns != 0 {
        host::set_realtime(request.realtime_ns).step(|| "set clock")?;
    }
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname).step(|| "set host name")?;
    }
    if !request.shared_tag.is_empty() {
        mount_shared(&request.shared_tag, request.shared_dax)?;
    }
    if !request.resolv_conf.is_empty() {
        fs::write(RESOLV_CONF, &request.resolv_conf).step(|| format!("write {RESOLV_CONF}"))?;
    }
    if request.shm_size != 0 {
        let options = format!("size={}", request.shm_size);
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(
            None::<&str>,
            "/dev/shm",
            None::<&str>,
            flags,
            Some(options.as_str()),
        )
        .step(|| "resize /dev/shm")?;
    }
    set_sysctls(request)?;
    set_network(&request.network)
}

/// Does what AddNetwork says.
///
/// # Errors
/// As of [`set_up`].
pub fn add_network(network: &agent::Network, in_guest: bool) -> Result<()> {
    devices::rescan(in_guest)?;
    set_network(network)
}

fn mount_shared(tag: &str, dax: bool) -> Result<()> {
    let target = Path::new(SHARED_MOUNT);
    fs::create_dir_all(target).step(|| format!("create {SHARED_MOUNT}"))?;
    // Containers' root file systems are below and take over the mount's flags:
    // set-uid programs and devices in an image must work.
    mount(
        Some(tag),
        target,
        Some("virtiofs"),
        MsFlags::empty(),
        dax.then_some("dax=always"),
    )
    .step(|| format!("mount virtiofs {tag:?} on {SHARED_MOUNT}"))
}

fn set_sysctls(request: &agent::SetupSandboxRequest) -> Result<()> {
    // In an order that does not change from run to run.
    let ordered: BTreeMap<_, _> = request.sysctls.iter().collect();
    for (name, value) in ordered {
        let path = sysctl_path(name)?;
        fs::write(&path, value).step(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Interfaces, then routes (gateways must be reachable first), then neighbours.
fn set_network(network: &agent::Network) -> Result<()> {
    let nothing = network.interfaces.is_empty()
        && network.routes.is_empty()
        && network.neighbours.is_empty()
        && network.rules.is_empty();
    if nothing {
        return Ok(());
    }
    let mut netlink = Netlink::open()?;
    for interface in &network.interfaces {
        netlink.set_interface(interface)?;
    }
    for route in &network.routes {
        netlink.add_route(route)?;
    }
    for rule in &network.rules {
        netlink.add_rule(rule)?;
    }
    for neighbour in &network.neighbours {
        netlink.add_neighbour(neighbour)?;
    }
    Ok(())
}
