// SPDX-License-Identifier: Apache-2.0
//! Requests to the agent, over the connection that it opened.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_agent_protocol::{agent, agent_ttrpc::AgentClient};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    asynchronous::{transport::Socket, Client},
    context::{self, Context},
};

use super::error::AgentError;
use crate::{config, error::Error};

/// The connection's own deadline is the call's; this catches what it does not
/// cover, a guest that stops reading.
const SLACK: Duration = Duration::from_secs(1);
const WAIT: &str = "wait for process";
const SHUTDOWN: &str = "power the guest off";

/// The guest's agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    timeout: Duration,
    /// By how much longer making and taking apart may take.
    long: u32,
    calls: Calls,
}

/// How many calls were made, by what they are called in errors.
#[derive(Debug, Clone, Default)]
struct Calls(Arc<Mutex<BTreeMap<&'static str, u64>>>);

impl Calls {
    fn count(&self, call: &'static str) {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *calls.entry(call).or_default() += 1;
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

fn context(timeout: Duration) -> Context {
    context::with_timeout(i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX))
}

async fn within<T>(
    call: &'static str,
    limit: Duration,
    request: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, Error> {
    let answer = match timeout(limit + SLACK, request).await {
        Ok(answer) => answer.map_err(AgentError::from),
        Err(_) => Err(AgentError::Timeout(limit.as_millis())),
    };
    answer.map_err(|source| Error::Agent { call, source })
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident, $call:literal, $factor:ident;)*) => {
        impl Agent {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// The agent's answer, or that there is none.
                pub async fn $name(&self, request: agent::$request) -> Result<agent::$reply, Error> {
                    let limit = self.$factor();
                    self.calls.count($call);
                    within($call, limit, self.client.$name(context(limit), &request)).await
                }
            )*
        }
    };
}

calls! {
    /// Sets the guest up: clock, entropy, names, network, shared directory.
    setup_sandbox(SetupSandboxRequest) -> SetupSandboxReply, "set the guest up", long;
    /// Takes a network that came later.
    add_network(Network) -> Empty, "add the network", long;
    /// Makes a container, up to its waiting first process.
    create_container(CreateContainerRequest) -> CreateContainerReply, "create container", long;
    /// Runs a container's program.
    start_container(StartContainerRequest) -> Empty, "start container", long;
    /// Makes and runs a further process.
    exec_process(ExecProcessRequest) -> ExecProcessReply, "run process", long;
    /// Makes and runs a process of the guest itself.
    exec_guest(ExecProcessRequest) -> ExecProcessReply, "run process in the guest", long;
    /// Copies a file of a container.
    copy_file(CopyFileRequest) -> ExecProcessReply, "copy file", long;
    /// The guest's figures.
    stats_guest(Empty) -> StatsGuestReply, "read the guest's statistics", short;
    /// The guest kernel's log.
    kernel_log(KernelLogRequest) -> KernelLogReply, "read the kernel's log", short;
    /// Sends a signal.
    signal_process(SignalProcessRequest) -> Empty, "send signal", short;
    /// Sets a terminal's size.
    resize_pty(ResizePtyRequest) -> Empty, "resize terminal", short;
    /// Lists a container's processes.
    list_processes(ContainerRequest) -> ListProcessesReply, "list processes", short;
    /// A container's resource usage.
    stats_container(ContainerRequest) -> StatsReply, "read statistics", short;
    /// Freezes a container.
    pause_container(ContainerRequest) -> Empty, "pause container", short;
    /// Thaws a container.
    resume_container(ContainerRequest) -> Empty, "resume container", short;
    /// Changes a container's limits.
    update_container(UpdateContainerRequest) -> Empty, "update container", short;
    /// Brings a copy of a directory up to date.
    update_mirror(UpdateMirrorRequest) -> Empty, "update a volume's copy", short;
    /// Tells of changes that the host has made in volumes.
    announce(AnnounceRequest) -> Empty, "announce changes of volumes", short;
    /// Removes a container.
    delete_container(ContainerRequest) -> Empty, "delete container", long;
    /// Connects a stream to a port of the pod's loopback interface.
    dial_port(DialPortRequest) -> Empty, "connect to a port", short;
    /// Does nothing, to see whether it answers.
    check(Empty) -> Empty, "check", short;
    /// Forgets a further process.
    delete_process(ProcessRequest) -> Empty, "delete process", short;
    /// Looks for devices that were plugged.
    rescan_devices(Empty) -> DevicesReply, "look for devices", long;
    /// Uses so many processors.
    online_cpus(OnlineCpusRequest) -> CpusReply, "use processors", long;
    /// Lets go of a device that is to be unplugged.
    remove_device(RemoveDeviceRequest) -> Empty, "remove device", long;
}

impl Agent {
    /// The agent at the other end of `stream`; how long calls may take is as
    /// configured.
    pub fn new(stream: UnixStream, config: &config::Agent) -> Self {
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        Self {
            client,
            timeout: config.rpc_timeout(),
            long: config.long_call_factor,
            calls: Calls::default(),
        }
    }

    /// How many calls were made so far, by what they are called in errors.
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        let calls = self.calls.0.lock();
        calls.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn short(&self) -> Duration {
        self.timeout
    }

    fn long(&self) -> Duration {
        self.timeout.saturating_mul(self.long)
    }

    /// Waits for the end of a process, however long it takes.
    ///
    /// # Errors
    /// The agent's answer, or that the connection ended.
    pub async fn wait_process(
        &self,
        request: agent::WaitProcessRequest,
    ) -> Result<agent::WaitProcessReply, Error> {
        self.calls.count(WAIT);
        self.client
            .wait_process(Context::default(), &request)
            .await
            .map_err(|source| Error::Agent {
                call: WAIT,
                source: source.into(),
            })
    }

    /// Powers the guest off. The answer may never come.
    ///
    /// # Errors
    /// The agent's answer, or that there is none within `limit`.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let request = agent::Empty::new();
        self.calls.count(SHUTDOWN);
        within(
            SHUTDOWN,
            limit,
            self.client.shutdown(context(limit), &request),
        )
        .await
        .map(drop)
    }
}
