// SPDX-License-Identifier: Apache-2.0
//! The machine's size follows its containers' limits: processors and memory
//! come before a higher limit does, and go after a lower one.

use std::time::Duration;

use bulkhead_agent_protocol::agent::OnlineCpusRequest;
use oci_spec::runtime::LinuxResources;
use tokio::{
    sync::SemaphorePermit,
    time::{sleep, Instant},
};

use super::{state::Extra, Inner};
use crate::{
    error::{chain, Error},
    hypervisor::Hypervisor,
    oci::Limits,
};

/// How often the guest is looked at that plugs memory, or unplugs it.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A change of the machine's size; there is one at a time.
pub struct Resize<'a> {
    inner: &'a Inner,
    limits: Limits,
    now: Extra,
    wanted: Extra,
    _alone: SemaphorePermit<'a>,
}

impl<'a> Resize<'a> {
    /// What changes when the container `id` gets these resources.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn begin(
        inner: &'a Inner,
        id: &str,
        resources: &LinuxResources,
    ) -> Result<Self, Error> {
        let closed = |_| Error::Internal("nobody closes the semaphore".into());
        let alone = inner.extra.acquire().await.map_err(closed)?;
        let overhead = inner.config.hypervisor.overhead_mib;
        let mut pod = inner.pod();
        let limits = pod.container(id)?.limits.changed(Some(resources));
        let all = pod.containers.iter();
        let all = all.map(|(other, container)| match other == id {
            true => limits,
            false => container.limits,
        });
        let (vcpus, memory_mib) = inner.size.extra_for(all, overhead);
        let now = pod.extra;
        drop(pod);
        Ok(Self {
            inner,
            limits,
            now,
            wanted: Extra { vcpus, memory_mib },
            _alone: alone,
        })
    }

    /// Gives the guest what it is to have more.
    ///
    /// # Errors
    /// It does not take it; then it has what it had before.
    pub async fn grow(&self) -> Result<(), Error> {
        let grown = async {
            if self.wanted.memory_mib > self.now.memory_mib {
                self.set_memory(self.wanted.memory_mib).await?;
            }
            if self.wanted.vcpus > self.now.vcpus {
                self.set_vcpus(self.wanted.vcpus).await?;
            }
            Ok(())
        };
        let grown = grown.await;
        if grown.is_err() {
            self.undo().await;
        }
        grown
    }

    /// Takes back what [`Self::grow`] gave.
    pub async fn undo(&self) {
        self.shrink(self.wanted, self.now).await;
    }

    /// The container `id` has its new limits: takes back what the guest has more.
    pub async fn finish(self, id: &str) {
        {
            let mut pod = self.inner.pod();
            pod.extra = self.wanted;
            if let Ok(container) = pod.container(id) {
                container.limits = self.limits;
            }
        }
        self.shrink(self.now, self.wanted).await;
        if self.now != self.wanted {
            tracing::info!(
                sandbox = self.inner.id,
                vcpus = self.inner.size.vcpus + self.wanted.vcpus,
                memory_mib = self.inner.size.memory_mib + self.wanted.memory_mib,
                "machine resized"
            );
        }
    }

    /// Takes back what is less. A guest that cannot let go has it for longer;
    /// its containers' own limits hold in any case.
    async fn shrink(&self, before: Extra, after: Extra) {
        if after.vcpus < before.vcpus {
            if let Err(error) = self.set_vcpus(after.vcpus).await {
                self.keeps("processors", &error);
            }
        }
        if after.memory_mib < before.memory_mib {
            if let Err(error) = self.set_memory(after.memory_mib).await {
                self.keeps("memory", &error);
            }
        }
    }

    fn keeps(&self, what: &str, error: &Error) {
        let error = chain(error);
        tracing::warn!(
            sandbox = self.inner.id,
            what,
            error,
            "guest does not give back"
        );
    }

    async fn set_vcpus(&self, extra: u8) -> Result<(), Error> {
        let count = u32::from(self.inner.size.vcpus + extra);
        let request = OnlineCpusRequest {
            count,
            ..Default::default()
        };
        let reply = self.inner.agent.online_cpus(request).await?;
        if reply.online == count {
            return Ok(());
        }
        Err(Error::Internal(format!(
            "linux.resources.cpu: the guest uses {} processors, and {count} were to be",
            reply.online
        )))
    }

    /// Asks for memory, and waits until the guest has taken it or given it back.
    async fn set_memory(&self, mib: u32) -> Result<(), Error> {
        let vm = &self.inner.vm;
        vm.set_extra_memory(mib).await?;
        let patience = self.inner.config.agent.rpc_timeout();
        let deadline = Instant::now() + patience;
        loop {
            let has = vm.extra_memory().await?;
            if has == mib {
                break;
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout(format!(
                    "linux.resources.memory: the guest has {has} MiB beyond its first ones, \
                     and {mib} were to be, after {} ms (agent.rpc_timeout_ms)",
                    patience.as_millis()
                )));
            }
            sleep(LOOK_EVERY).await;
        }
        // What it has emptied goes.
        Ok(vm.set_extra_memory(mib).await?)
    }
}
