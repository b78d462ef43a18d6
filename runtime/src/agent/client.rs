// SPDX-License-Identifier: Apache-2.0
//! Requests to the agent, over the connection that it opened.

use std::{future::Future, time::Duration};

use bulkhead_agent_protocol::{agent, agent_ttrpc::AgentClient};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    asynchronous::{transport::Socket, Client},
    context::{self, Context},
};

use super::error::AgentError;
use crate::error::Error;

/// Making a container or a process, and taking one apart, touches many files
/// of an image for the first time; such a call may take longer by this factor.
const LONG: u32 = 3;

/// The connection's own deadline is the call's; this catches what it does not
/// cover, a guest that stops reading.
const SLACK: Duration = Duration::from_secs(1);

/// The guest's agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    timeout: Duration,
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
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident, $call:literal, $factor:expr;)*) => {
        impl Agent {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// The agent's answer, or that there is none.
                pub async fn $name(&self, request: agent::$request) -> Result<agent::$reply, Error> {
                    let limit = self.timeout * $factor;
                    within($call, limit, self.client.$name(context(limit), &request)).await
                }
            )*
        }
    };
}

calls! {
    /// Sets the guest up: clock, entropy, names, network, shared directory.
    setup_sandbox(SetupSandboxRequest) -> SetupSandboxReply, "set the guest up", LONG;
    /// Makes a container, up to its waiting first process.
    create_container(CreateContainerRequest) -> CreateContainerReply, "create container", LONG;
    /// Runs a container's program.
    start_container(StartContainerRequest) -> Empty, "start container", LONG;
    /// Makes and runs a further process.
    exec_process(ExecProcessRequest) -> ExecProcessReply, "run process", LONG;
    /// Sends a signal.
    signal_process(SignalProcessRequest) -> Empty, "send signal", 1;
    /// Sets a terminal's size.
    resize_pty(ResizePtyRequest) -> Empty, "resize terminal", 1;
    /// Lists a container's processes.
    list_processes(ContainerRequest) -> ListProcessesReply, "list processes", 1;
    /// A container's resource usage.
    stats_container(ContainerRequest) -> StatsReply, "read statistics", 1;
    /// Freezes a container.
    pause_container(ContainerRequest) -> Empty, "pause container", 1;
    /// Thaws a container.
    resume_container(ContainerRequest) -> Empty, "resume container", 1;
    /// Changes a container's limits.
    update_container(UpdateContainerRequest) -> Empty, "update container", 1;
    /// Removes a container.
    delete_container(ContainerRequest) -> Empty, "delete container", LONG;
    /// Forgets a further process.
    delete_process(ProcessRequest) -> Empty, "delete process", 1;
}

impl Agent {
    /// The agent at the other end of `stream`; a call may take `timeout`.
    pub fn new(stream: UnixStream, timeout: Duration) -> Self {
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        Self { client, timeout }
    }

    /// Waits for the end of a process, however long it takes.
    ///
    /// # Errors
    /// The agent's answer, or that the connection ended.
    pub async fn wait_process(
        &self,
        request: agent::WaitProcessRequest,
    ) -> Result<agent::WaitProcessReply, Error> {
        self.client
            .wait_process(Context::default(), &request)
            .await
            .map_err(|source| Error::Agent {
                call: "wait for process",
                source: source.into(),
            })
    }

    /// Powers the guest off. The answer may never come.
    ///
    /// # Errors
    /// The agent's answer, or that there is none within `limit`.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        let request = agent::Empty::new();
        within(
            "power the guest off",
            limit,
            self.client.shutdown(context(limit), &request),
        )
        .await
        .map(drop)
    }
}
