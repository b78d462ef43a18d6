// SPDX-License-Identifier: Apache-2.0
//! The network of a pod that gets it once its machine runs.
//!
//! Who leaves the network namespace to the runtime takes it from the process
//! that stands for the container, and sets it up only then: Docker (from
//! version 26 on) between the creation of a container and its start, the CRI
//! plugin of containerd 1.7 after the start of the one that stands for a pod
//! with a user namespace. So each start of a container looks at it until
//! something is there, and that is plugged.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use tokio::sync::Semaphore;

use super::{blocking, host::nics, Inner};
use crate::{
    error::{chain, Error},
    hypervisor::Hypervisor,
    resource::network::{self, Network},
};

/// A network namespace that had nothing in it when the machine was made.
#[derive(Debug)]
pub struct LateNetwork {
    netns: PathBuf,
    /// One looks at it at a time.
    turn: Semaphore,
    /// Set once something was there: whether the guest has it, or why not.
    taken: OnceLock<Result<(), String>>,
}

impl LateNetwork {
    /// The one at this path.
    pub fn new(netns: PathBuf) -> Self {
        Self {
            netns,
            turn: Semaphore::new(1),
            taken: OnceLock::new(),
        }
    }
}

/// Gives the guest its network, if that comes later and is there now.
///
/// # Errors
/// It cannot be had. The pod stays without, whoever asks again.
pub async fn take(inner: &Arc<Inner>) -> Result<(), Error> {
    let Some(late) = &inner.late else {
        return Ok(());
    };
    let turn = late.turn.acquire().await;
    let _turn = turn.map_err(|_| Error::Internal("the pod is gone".into()))?;
    if let Some(taken) = late.taken.get() {
        return taken.clone().map_err(Error::Internal);
    }
    let (pod, netns) = (inner.clone(), late.netns.clone());
    let attached = blocking(move || Ok(network::attach(&netns, &pod.journal)?)).await;
    let given = match attached {
        // It may still come.
        Ok(network) if network.nics.is_empty() => return Ok(()),
        Ok(network) => give(inner, network).await,
        Err(error) => Err(error),
    };
    let why = |error: &Error| format!("the pod's network cannot be had: {}", chain(error));
    let outcome = given.as_ref().copied().map_err(why);
    // Nobody else has the turn.
    let outcome = late.taken.get_or_init(|| outcome);
    outcome.clone().map_err(Error::Internal)
}

async fn give(inner: &Arc<Inner>, network: Network) -> Result<(), Error> {
    let count = network.nics.len();
    for nic in nics(network.nics, inner.config.hypervisor.vhost_net)? {
        inner.vm.plug_nic(nic).await?;
    }
    inner.agent.add_network(network.guest).await?;
    tracing::info!(
        sandbox = inner.id,
        interfaces = count,
        "network added to the running pod"
    );
    Ok(())
}
