// SPDX-License-Identifier: Apache-2.0
//! The pod's network: each interface of its namespace gets a tap, and all
//! traffic between the two is redirected by tc, so that the guest has the
//! interface's hardware address, addresses and routes and any CNI plugin
//! works unchanged. The host's interface keeps its configuration but sees no
//! packet: its ingress goes to the tap.
//!
//! Netlink work runs on a thread of its own that has entered the namespace;
//! no other thread of the process ever changes its namespace.

pub mod loopback;
mod netlink;
mod scan;
mod sys;

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::agent;
use nix::sched::{setns, unshare, CloneFlags};
use serde::{Deserialize, Serialize};

use self::netlink::Netlink;
use super::journal::{Journal, Resource};

/// Prefix of the taps' names; the number of the pod's interface follows.
const TAP_PREFIX: &str = "bhtap";

/// What one network interface of the guest is connected to.
#[derive(Debug)]
pub struct Nic {
    /// The tap, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The guest's hardware address: that of the pod's interface.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u16,
}

/// A pod's network as the guest is to have it.
#[derive(Debug, Default)]
pub struct Network {
    /// For the machine, in the order of the interfaces' index in the namespace.
    pub nics: Vec<Nic>,
    /// What the agent sets up. Its routes are in the order to add them: those of
    /// links first.
    pub guest: agent::Network,
}

/// Why a pod's network could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace cannot be entered.
    #[error("network namespace {} cannot be entered", path.display())]
    Namespace {
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The spec names the host's own namespace.
    #[error("network namespace {} is the host's own: host networking is not possible in a microVM", path.display())]
    HostNetwork {
        /// Its path.
        path: PathBuf,
    },
    /// A netlink request failed.
    #[error("{step}")]
    Netlink {
        /// What was tried, with the interface's name.
        step: String,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// Any other system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for NetworkError {
    fn from(source: io::Error) -> Self {
        Self::System {
            step: "resource journal could not be written".into(),
            source,
        }
    }
}

/// Gives the guest what the network namespace `netns` has. Blocks.
///
/// # Errors
/// What was taken until then stays in the journal and is released with it.
pub fn attach(netns: &Path, journal: &Journal) -> Result<Network, NetworkError> {
    if is_own_namespace(netns) {
        return Err(NetworkError::HostNetwork { path: netns.into() });
    }
    let namespace = NamespaceId::of(netns);
    within(netns, |netlink| async move {
        let scan = scan::scan(&netlink).await?;
        let mut network = Network {
            nics: Vec::with_capacity(scan.links.len()),
            guest: agent::Network {
                interfaces: Vec::with_capacity(scan.links.len()),
                routes: scan.routes,
                rules: scan.rules,
                neighbours: scan.neighbours,
                ..Default::default()
            },
        };
        for (number, link) in scan.links.into_iter().enumerate() {
            let name = format!("{TAP_PREFIX}{number}");
            journal.record(Resource::Tap {
                netns: netns.into(),
                namespace,
                name: name.clone(),
            })?;
            let tap = sys::open_tap(&name).map_err(|source| NetworkError::System {
                step: format!("tap {name} could not be made (is /dev/net/tun there?)"),
                source,
            })?;
            let tap_index = netlink.index_of(&name).await?;
            netlink.bring_up(tap_index, &name, link.mtu).await?;
            journal.record(Resource::TrafficRedirect {
                netns: netns.into(),
                namespace,
                device: link.name.clone(),
            })?;
            netlink.redirect(link.index, &link.name, tap_index).await?;
            netlink.redirect(tap_index, &name, link.index).await?;
            network.nics.push(Nic {
                tap,
                mac: link.mac,
                mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
            });
            network.guest.interfaces.push(link.guest);
        }
        Ok(network)
    })
}

/// Tries in a namespace of its own, which vanishes with the thread, whether a
/// tap can be made and traffic redirected to it.
pub fn probe() -> Result<(), NetworkError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetworkError::System {
                step: "network namespace could not be made".into(),
                source: error.into(),
            })?;
            let taps = ["bhprobe0", "bhprobe1"];
            let mut open = Vec::new();
            for name in taps {
                open.push(sys::open_tap(name).map_err(|source| NetworkError::System {
                    step: format!("tap {name} could not be made (is /dev/net/tun there?)"),
                    source,
                })?);
            }
            drive(|netlink| async move {
                let from = netlink.index_of(taps[0]).await?;
                let to = netlink.index_of(taps[1]).await?;
                netlink.redirect(from, taps[0], to).await
            })
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Removes a tap; nothing when it or its namespace is gone.
pub fn remove_tap(netns: &Path, name: &str) -> io::Result<()> {
    release(
        netns,
        |netlink| async move { netlink.remove_link(name).await },
    )
}

/// Removes the ingress qdisc of `device`, with its filters.
pub fn remove_redirect(netns: &Path, device: &str) -> io::Result<()> {
    release(netns, |netlink| async move {
        netlink.remove_ingress(device).await
    })
}

fn release<'a, F>(netns: &'a Path, work: impl FnOnce(Netlink) -> F + Send + 'a) -> io::Result<()>
where
    F: std::future::Future<Output = Result<(), NetworkError>>,
{
    // A namespace that is gone took everything in it along. One that was
    // never more than a mount point (a file on a tmpfs) cannot be entered.
    match within(netns, work) {
        Ok(()) | Err(NetworkError::Namespace { .. }) => Ok(()),
        Err(error) => Err(io::Error::other(crate::error::chain(&error))),
    }
}

fn is_own_namespace(netns: &Path) -> bool {
    let own = NamespaceId::of(Path::new("/proc/self/ns/net"));
    own.is_some() && NamespaceId::of(netns) == own
}

/// Tells a namespace from another that has come to its path since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// Of what is at the path now.
    pub fn of(netns: &Path) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let found = std::fs::metadata(netns).ok()?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
        })
    }
}

/// Runs `work` on a thread inside the namespace.
fn within<T, F>(netns: &Path, work: impl FnOnce(Netlink) -> F + Send) -> Result<T, NetworkError>
where
    T: Send,
    F: std::future::Future<Output = Result<T, NetworkError>>,
{
    let namespace_error = |source| NetworkError::Namespace {
        path: netns.into(),
        source,
    };
    let file = File::open(netns).map_err(namespace_error)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET)
                .map_err(|error| namespace_error(error.into()))?;
            drive(work)
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Runs `work` with a netlink connection in this thread's namespace.
fn drive<T, F>(work: impl FnOnce(Netlink) -> F) -> Result<T, NetworkError>
where
    F: std::future::Future<Output = Result<T, NetworkError>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|source| NetworkError::System {
            step: "netlink thread could not start".into(),
            source,
        })?;
    runtime.block_on(async move { work(Netlink::connect()?).await })
}

#[cfg(test)]
mod tests;
