// SPDX-License-Identifier: Apache-2.0
//! The ttrpc service. Handlers only pass messages on: ttrpc drops a handler
//! when its deadline passes or the connection ends, so no work may depend on
//! one finishing.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_agent_protocol::{agent, agent_ttrpc, SHARED_MOUNT};
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::TtrpcContext;

use crate::container::{Containers, Message, Work};
use crate::devices;
use crate::error::AgentError;
use crate::guest;
use crate::processors;
use crate::sandbox::{self, Times};
use crate::stdio;
use crate::steps::Steps;

/// Answers the host.
pub struct Service {
    containers: Containers,
    times: Arc<Times>,
    shutdown: mpsc::UnboundedSender<()>,
}

impl Service {
    /// A service over `containers`; a message on `shutdown` powers off.
    pub fn new(
        containers: Containers,
        times: Arc<Times>,
        shutdown: mpsc::UnboundedSender<()>,
    ) -> Self {
        Self {
            containers,
            times,
            shutdown,
        }
    }

    /// Makes a further process in a container.
    async fn work(&self, id: &str, work: Work) -> ttrpc::Result<agent::ExecProcessReply> {
        let steps = Steps::received();
        let made = self
            .containers
            .ask(id, |reply| Message::Exec(Box::new(work), steps, reply))
            .await?;
        Ok(agent::ExecProcessReply {
            pid: made.pid,
            steps: made.steps.to_protocol(),
            ..Default::default()
        })
    }

    async fn empty<F>(&self, id: &str, message: F) -> ttrpc::Result<agent::Empty>
    where
        F: FnOnce(oneshot::Sender<crate::error::Result<()>>) -> Message,
    {
        self.containers.ask(id, message).await?;
        Ok(agent::Empty::new())
    }
}

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        request: agent::SetupSandboxRequest,
    ) -> ttrpc::Result<agent::SetupSandboxReply> {
        Ok(sandbox::set_up(
            &request,
            &self.times,
            self.containers.shared().in_guest,
        )?)
    }

    async fn add_network(
        &self,
        _: &TtrpcContext,
        network: agent::Network,
    ) -> ttrpc::Result<agent::Empty> {
        sandbox::add_network(&network, self.containers.shared().in_guest)?;
        Ok(agent::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<agent::CreateContainerReply> {
        let made = self.containers.create(request, Steps::received()).await?;
        Ok(agent::CreateContainerReply {
            pid: made.pid,
            steps: made.steps.to_protocol(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: agent::StartContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.empty(&request.container_id, Message::Start).await
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: agent::ExecProcessRequest,
    ) -> ttrpc::Result<agent::ExecProcessReply> {
        let id = request.container_id.clone();
        self.work(&id, Work::Program(request)).await
    }

    async fn exec_guest(
        &self,
        _: &TtrpcContext,
        request: agent::ExecProcessRequest,
    ) -> ttrpc::Result<agent::ExecProcessReply> {
        let id = request.container_id.clone();
        self.work(&id, Work::Guest(request)).await
    }

    async fn copy_file(
        &self,
        _: &TtrpcContext,
        request: agent::CopyFileRequest,
    ) -> ttrpc::Result<agent::ExecProcessReply> {
        let id = request.container_id.clone();
        self.work(&id, Work::Copy(request)).await
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: agent::SignalProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let id = request.container_id.clone();
        self.empty(&id, |reply| Message::Signal(request, reply))
            .await
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: agent::WaitProcessRequest,
    ) -> ttrpc::Result<agent::WaitProcessReply> {
        let mut exit = self
            .containers
            .ask(&request.container_id, |reply| {
                Message::Wait(request.exec_id, reply)
            })
            .await?;
        let ended = exit.wait_for(Option::is_some).await;
        let Some(exit) = ended.ok().and_then(|exit| *exit) else {
            return Err(AgentError::Internal("the end of the process was lost".into()).into());
        };
        Ok(agent::WaitProcessReply {
            exit_status: exit.status,
            exited_at_ns: exit.at_ns,
            oom_killed: exit.oom_killed,
            ..Default::default()
        })
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: agent::ResizePtyRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let id = request.container_id.clone();
        self.empty(&id, |reply| Message::Resize(request, reply))
            .await
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ListProcessesReply> {
        Ok(self
            .containers
            .ask(&request.container_id, Message::List)
            .await?)
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::StatsReply> {
        Ok(self
            .containers
            .ask(&request.container_id, Message::Stats)
            .await?)
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.empty(&request.container_id, |reply| Message::Pause(true, reply))
            .await
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.empty(&request.container_id, |reply| Message::Pause(false, reply))
            .await
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let resources = Box::new(request.resources.unwrap_or_default());
        self.empty(&request.container_id, |reply| {
            Message::Update(resources, reply)
        })
        .await
    }

    async fn update_mirror(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateMirrorRequest,
    ) -> ttrpc::Result<agent::Empty> {
        let mirror = Box::new(request.mirror.unwrap_or_default());
        self.empty(&request.container_id, |reply| {
            Message::Mirror(mirror, reply)
        })
        .await
    }

    async fn announce(
        &self,
        _: &TtrpcContext,
        request: agent::AnnounceRequest,
    ) -> ttrpc::Result<agent::Empty> {
        guest::announce::announce(&request, Path::new(SHARED_MOUNT))?;
        Ok(agent::Empty::new())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.empty(&request.container_id, Message::Delete).await
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.empty(&request.container_id, |reply| {
            Message::DeleteProcess(request.exec_id, reply)
        })
        .await
    }

    async fn rescan_devices(
        &self,
        _: &TtrpcContext,
        _: agent::Empty,
    ) -> ttrpc::Result<agent::DevicesReply> {
        Ok(devices::rescan(self.containers.shared().in_guest)?)
    }

    async fn remove_device(
        &self,
        _: &TtrpcContext,
        request: agent::RemoveDeviceRequest,
    ) -> ttrpc::Result<agent::Empty> {
        devices::remove(&request, self.containers.shared().in_guest)?;
        Ok(agent::Empty::new())
    }

    async fn dial_port(
        &self,
        _: &TtrpcContext,
        request: agent::DialPortRequest,
    ) -> ttrpc::Result<agent::Empty> {
        stdio::port::dial(&self.containers.shared().dialer, &request).await?;
        Ok(agent::Empty::new())
    }

    async fn online_cpus(
        &self,
        _: &TtrpcContext,
        request: agent::OnlineCpusRequest,
    ) -> ttrpc::Result<agent::CpusReply> {
        let in_guest = self.containers.shared().in_guest;
        Ok(processors::set_online(&request, in_guest)?)
    }

    async fn stats_guest(
        &self,
        _: &TtrpcContext,
        _: agent::Empty,
    ) -> ttrpc::Result<agent::StatsGuestReply> {
        Ok(guest::stats::collect())
    }

    async fn kernel_log(
        &self,
        _: &TtrpcContext,
        request: agent::KernelLogRequest,
    ) -> ttrpc::Result<agent::KernelLogReply> {
        Ok(guest::log::read(&request)?)
    }

    async fn check(&self, _: &TtrpcContext, _: agent::Empty) -> ttrpc::Result<agent::Empty> {
        Ok(agent::Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: agent::Empty) -> ttrpc::Result<agent::Empty> {
        // The receiver lives as long as the agent.
        let _ = self.shutdown.send(());
        Ok(agent::Empty::new())
    }
}
