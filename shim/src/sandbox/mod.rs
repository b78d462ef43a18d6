// SPDX-License-Identifier: Apache-2.0
//! containerd's sandbox API (`containerd.runtime.sandbox.v1.Sandbox`, with
//! `sandboxer = "shim"`): a pod that is there before its first container, and
//! needs none that stands for it.

mod config;
mod metrics;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bulkhead_runtime::{
    config::Config,
    sandbox::{Exit, PodSpec, Sandbox},
};
use bulkhead_shim_protocol::{
    sandbox::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_ttrpc,
    types::{Metric, Platform},
    Named,
};
use protobuf::MessageField;
use tokio::sync::watch;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{
    calls::whole,
    convert,
    error::CallError,
    pod::{give_back, Pod},
    service::{answer, Call},
};

/// What containerd reads as a pod that takes containers, and as one that does
/// not.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// SIGTERM and SIGKILL, as Linux counts them.
const TERM: u32 = 15;
const KILL: u32 = 9;

/// Exit status of a machine that did not end by itself: as of a process that
/// was killed.
const KILLED: u32 = 137;

/// What the API has made of the pod.
#[derive(Debug)]
pub struct SandboxApi {
    stage: Mutex<Stage>,
    /// How the machine ended.
    exit: watch::Sender<Option<Exit>>,
}

impl Default for SandboxApi {
    fn default() -> Self {
        Self {
            stage: Mutex::default(),
            exit: watch::Sender::new(None),
        }
    }
}

#[derive(Debug, Default)]
enum Stage {
    /// The pod's containers come by the task service alone.
    #[default]
    Unused,
    /// Told what the pod is to be.
    Created(Box<Created>),
    /// Its machine is, or was, there; since when.
    Started(SystemTime),
}

#[derive(Debug, Clone)]
struct Created {
    bundle: PathBuf,
    config: Config,
    spec: PodSpec,
}

impl SandboxApi {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a sandbox, which has a shutdown of its own.
    pub fn is_used(&self) -> bool {
        !matches!(*self.stage(), Stage::Unused)
    }

    fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }
}

impl Pod {
    /// The sandbox that `StartSandbox` has started.
    ///
    /// # Errors
    /// It has not, or the shim is ending.
    pub fn started(&self) -> Result<Sandbox, CallError> {
        if let Stage::Created(_) = *self.sandbox_api.stage() {
            return Err(CallError::NotStarted);
        }
        self.running().ok_or(CallError::Stopping)
    }

    /// A call about this very sandbox.
    fn own(&self, id: &str) -> Result<(), CallError> {
        match id == self.identity.group && self.sandbox_api.is_used() {
            true => Ok(()),
            false => Err(CallError::NoSandbox(id.into())),
        }
    }

    fn create_sandbox(
        &self,
        request: &CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse, CallError> {
        if request.sandbox_id != self.identity.group {
            return Err(CallError::NoSandbox(request.sandbox_id.clone()));
        }
        let bundle = PathBuf::from(&request.bundle_path);
        if !bundle.is_absolute() {
            return Err(CallError::Invalid(format!(
                "bundle_path {:?} is not an absolute path",
                request.bundle_path
            )));
        }
        let created = Created {
            config: self.identity.options.configuration()?,
            spec: config::pod_spec(request)?,
            bundle,
        };
        let mut stage = self.sandbox_api.stage();
        if !matches!(*stage, Stage::Unused) || self.running().is_some() {
            let name = format!("sandbox {}", request.sandbox_id);
            return Err(bulkhead_runtime::Error::AlreadyExists(name).into());
        }
        *stage = Stage::Created(Box::new(created));
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        self: Arc<Self>,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse, CallError> {
        self.own(&request.sandbox_id)?;
        let created = match &*self.sandbox_api.stage() {
            Stage::Created(created) => created.clone(),
            _ => return Err(CallError::Invalid("the sandbox was started before".into())),
        };
        let Created {
            bundle,
            config,
            spec,
        } = *created;
        self.record(&bundle, &config, 0);
        let (sandbox, _) = self
            .sandbox_for(&bundle, config.clone(), Some(spec))
            .await?;
        let pid = sandbox.hypervisor_pid();
        self.record(&bundle, &config, pid);
        let created_at = SystemTime::now();
        *self.sandbox_api.stage() = Stage::Started(created_at);
        let pod = self.clone();
        tokio::spawn(async move {
            let status = match sandbox.ended().await {
                true => 0,
                false => KILLED,
            };
            pod.sandbox_api.exit.send_replace(Some(Exit {
                status,
                at: SystemTime::now(),
            }));
        });
        Ok(StartSandboxResponse {
            pid,
            created_at: MessageField::some(convert::timestamp(created_at)),
            ..Default::default()
        })
    }

    /// Ends all containers, then the machine. The shim stays, and knows how
    /// they ended.
    async fn stop_sandbox(
        self: Arc<Self>,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse, CallError> {
        self.own(&request.sandbox_id)?;
        let Some(sandbox) = self.running() else {
            return Ok(StopSandboxResponse::new());
        };
        let patience = Duration::from_secs(request.timeout_secs.into());
        let deadline = tokio::time::Instant::now() + patience;
        for (signal, until) in [(TERM, Some(deadline)), (KILL, None)] {
            let containers = sandbox.containers();
            for id in &containers {
                // One that has ended needs none.
                let _ = sandbox.kill(id, None, signal, false).await;
            }
            if let Some(deadline) = until.filter(|_| !patience.is_zero()) {
                for id in &containers {
                    let _ = tokio::time::timeout_at(deadline, sandbox.wait(id, None)).await;
                }
            }
        }
        give_back(&sandbox).await;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse, CallError> {
        self.own(&request.sandbox_id)?;
        let mut exits = self.sandbox_api.exit.subscribe();
        // The sender is in `self`: it does not go.
        let exit = exits.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        let exit = exit.ok_or(CallError::Stopping)?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    fn sandbox_status(
        &self,
        request: &SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse, CallError> {
        self.own(&request.sandbox_id)?;
        let exit = self.sandbox_api.exit();
        let sandbox = self.running();
        let created_at = match &*self.sandbox_api.stage() {
            Stage::Started(at) => Some(*at),
            _ => None,
        };
        let ready = sandbox.is_some() && created_at.is_some() && exit.is_none();
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id.clone(),
            pid: sandbox.map_or(0, |sandbox| sandbox.hypervisor_pid()),
            state: if ready { READY } else { NOT_READY }.into(),
            created_at: convert::maybe_timestamp(created_at),
            exited_at: convert::maybe_timestamp(exit.map(|exit| exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_metrics(
        &self,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse, CallError> {
        self.own(&request.sandbox_id)?;
        let sandbox = self.started()?;
        let mut all = Vec::new();
        for id in sandbox.containers() {
            // One that goes meanwhile counts for nothing.
            if let Ok(stats) = sandbox.stats(&id).await {
                all.push(crate::metrics::metrics(stats));
            }
        }
        Ok(SandboxMetricsResponse {
            metrics: MessageField::some(Metric {
                timestamp: MessageField::some(convert::timestamp(SystemTime::now())),
                id: request.sandbox_id,
                data: MessageField::some(metrics::sum(all).to_any()?),
                ..Default::default()
            }),
            ..Default::default()
        })
    }
}

/// Serves a pod's sandbox API.
struct Api(Arc<Pod>);

/// The service, for a server.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    sandbox_ttrpc::create_sandbox(Arc::new(Api(pod.clone())))
}

#[async_trait]
impl sandbox_ttrpc::Sandbox for Api {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.0.called();
        let created = self.0.create_sandbox(&request);
        answer("CreateSandbox", &request.sandbox_id, created)
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let call = Call::begin("StartSandbox", context, &request.sandbox_id, "");
        let started = whole(self.0.clone().start_sandbox(request)).await;
        call.answer(started)
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        let platform = self.0.own(&request.sandbox_id).map(|()| PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".into(),
                architecture: "amd64".into(),
                ..Default::default()
            }),
            ..Default::default()
        });
        answer("Platform", &request.sandbox_id, platform)
    }

    async fn stop_sandbox(
        &self,
        context: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let call = Call::begin("StopSandbox", context, &request.sandbox_id, "");
        let stopped = whole(self.0.clone().stop_sandbox(request)).await;
        call.answer(stopped)
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let id = request.sandbox_id.clone();
        answer("WaitSandbox", &id, self.0.wait_sandbox(request).await)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let status = self.0.sandbox_status(&request);
        answer("SandboxStatus", &request.sandbox_id, status)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        let pong = self
            .0
            .own(&request.sandbox_id)
            .map(|()| PingResponse::new());
        answer("PingSandbox", &request.sandbox_id, pong)
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        // Also of one that has never been created: nothing is left of it.
        let pod = self.0.clone();
        let ended = whole(async move {
            pod.end().await;
            Ok(ShutdownSandboxResponse::new())
        });
        answer("ShutdownSandbox", &request.sandbox_id, ended.await)
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let id = request.sandbox_id.clone();
        answer("SandboxMetrics", &id, self.0.sandbox_metrics(request).await)
    }
}
