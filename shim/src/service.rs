// SPDX-License-Identifier: Apache-2.0
//! The task service (containerd.task.v2 and v3, the same messages): one pod.

mod pod;

use std::{fs, sync::Arc};

use async_trait::async_trait;
use bulkhead_runtime::{
    io::StdioPaths,
    sandbox::{CreateRequest, Sandbox},
};
use bulkhead_shim_protocol::{
    runc::ProcessDetails,
    shim::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
        UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_ttrpc, shim_v3_ttrpc,
    task::ProcessInfo,
    Named,
};
use oci_spec::runtime::{LinuxResources, Process};
use protobuf::{
    well_known_types::{any::Any, empty::Empty},
    EnumOrUnknown, MessageField,
};
use ttrpc::asynchronous::TtrpcContext;

pub use self::pod::Pod;
use crate::{
    convert::{maybe_timestamp, rootfs_mount, status, timestamp},
    delete::STATE_DIR_FILE,
    error::CallError,
    metrics::metrics,
    options::Options,
    stdio,
};

/// Answers containerd.
pub struct Service {
    pod: Arc<Pod>,
}

/// An exec id as the runtime takes it.
fn exec(id: &str) -> Option<&str> {
    Some(id).filter(|id| !id.is_empty())
}

/// The JSON in an `Any`.
fn json<T: serde::de::DeserializeOwned>(
    what: &'static str,
    any: Option<&Any>,
) -> Result<T, CallError> {
    let value = any.map_or(&[][..], |any| &any.value);
    serde_json::from_slice(value).map_err(|source| CallError::Json(what, source))
}

impl Service {
    /// Serves a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    fn sandbox(&self, id: &str) -> Result<Sandbox, CallError> {
        self.pod
            .sandbox()
            .ok_or_else(|| CallError::NoContainer(id.into()))
    }

    async fn create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse, CallError> {
        if !request.checkpoint.is_empty() {
            return Err(CallError::Unimplemented("restoring a checkpoint"));
        }
        let options = Options::parse(request.options.as_ref())?;
        let pod = self.pod.clone();
        // To its end, also when containerd gives up on it.
        let pid = tokio::spawn(async move { create(&pod, request, options).await }).await??;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, request: StartRequest) -> Result<StartResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let pid = sandbox
            .start_process(&request.id, exec(&request.exec_id))
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, request: StateRequest) -> Result<StateResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let state = sandbox.state(&request.id, exec(&request.exec_id))?;
        Ok(StateResponse {
            id: request.id,
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: EnumOrUnknown::new(status(state.status)),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.terminal,
            exit_status: state.exit_status,
            exited_at: maybe_timestamp(state.exited_at),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, request: WaitRequest) -> Result<WaitResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let exit = sandbox.wait(&request.id, exec(&request.exec_id)).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn kill(&self, request: KillRequest) -> Result<Empty, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let exec = exec(&request.exec_id);
        sandbox
            .kill(&request.id, exec, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, request: ExecProcessRequest) -> Result<Empty, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let process: Process = json("spec", request.spec.as_ref())?;
        let paths = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let opened = stdio::open_all(paths, request.terminal)?;
        sandbox
            .exec(&request.id, &request.exec_id, process, opened.stdio)
            .await?;
        self.pod
            .hold_stdin(&request.id, &request.exec_id, opened.hold);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, request: ResizePtyRequest) -> Result<Empty, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let exec = exec(&request.exec_id);
        // As runc's shim: no terminal, nothing to do.
        if !sandbox.state(&request.id, exec)?.terminal {
            return Ok(Empty::new());
        }
        let narrow = |value: u32, field: &str| {
            u16::try_from(value)
                .map_err(|_| CallError::Invalid(format!("{field}: {value} is too big")))
        };
        let (width, height) = (
            narrow(request.width, "width")?,
            narrow(request.height, "height")?,
        );
        sandbox.resize_pty(&request.id, exec, width, height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, request: CloseIORequest) -> Result<Empty, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        sandbox
            .close_stdin(&request.id, exec(&request.exec_id))
            .await?;
        if request.stdin {
            self.pod.release_stdin(&request.id, &request.exec_id);
        }
        Ok(Empty::new())
    }

    async fn pids(&self, request: PidsRequest) -> Result<PidsResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let mut processes = Vec::new();
        // Unknown ids only; the list of one that has ended is still asked for.
        let state = sandbox.state(&request.id, None)?;
        for (pid, exec) in sandbox.pids(&request.id).await.unwrap_or_default() {
            let mut info = ProcessInfo {
                pid,
                ..Default::default()
            };
            if let Some(exec_id) = exec {
                let details = ProcessDetails {
                    exec_id,
                    ..Default::default()
                };
                info.info = MessageField::some(details.to_any()?);
            }
            processes.push(info);
        }
        // A container without a process is taken for one that leaked when
        // containerd restarts.
        if processes.is_empty() {
            processes.push(ProcessInfo {
                pid: state.pid,
                ..Default::default()
            });
        }
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn stats(&self, request: StatsRequest) -> Result<StatsResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let stats = metrics(sandbox.stats(&request.id).await?);
        Ok(StatsResponse {
            stats: MessageField::some(stats.to_any()?),
            ..Default::default()
        })
    }

    async fn pause(&self, request: PauseRequest) -> Result<Empty, CallError> {
        self.sandbox(&request.id)?.pause(&request.id).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, request: ResumeRequest) -> Result<Empty, CallError> {
        self.sandbox(&request.id)?.resume(&request.id).await?;
        Ok(Empty::new())
    }

    async fn update(&self, request: UpdateTaskRequest) -> Result<Empty, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let resources: LinuxResources = json("resources", request.resources.as_ref())?;
        sandbox.update(&request.id, resources).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: CheckpointTaskRequest) -> Result<Empty, CallError> {
        Err(CallError::Unimplemented("Checkpoint"))
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse, CallError> {
        let sandbox = self.sandbox(&request.id)?;
        let deleted = sandbox.delete(&request.id, exec(&request.exec_id)).await?;
        self.pod.release_stdin(&request.id, &request.exec_id);
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    /// Also for names that are not known: containerd asks before it restores.
    async fn connect(&self, request: ConnectRequest) -> Result<ConnectResponse, CallError> {
        let task_pid = self
            .pod
            .sandbox()
            .and_then(|sandbox| sandbox.state(&request.id, None).ok())
            .map_or(0, |state| state.pid);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    /// Ignored as long as there are containers.
    async fn shutdown(&self, _: ShutdownRequest) -> Result<Empty, CallError> {
        let pod = self.pod.clone();
        tokio::spawn(async move { pod.shut_down_if_empty().await }).await?;
        Ok(Empty::new())
    }
}

async fn create(
    pod: &Arc<Pod>,
    request: CreateTaskRequest,
    options: Options,
) -> Result<u32, CallError> {
    let paths = StdioPaths {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    let opened = stdio::open_all(paths, request.terminal)?;
    let (sandbox, state_dir) = pod
        .started(request.bundle.as_ref(), options.config.as_deref())
        .await?;
    // For `delete`, should this process die.
    let note = std::path::Path::new(&request.bundle).join(STATE_DIR_FILE);
    if let Err(error) = fs::write(&note, state_dir.as_os_str().as_encoded_bytes()) {
        tracing::warn!(%error, path = %note.display(), "not written");
    }
    let created = sandbox
        .create(CreateRequest {
            id: request.id.clone(),
            bundle: request.bundle.into(),
            rootfs: request.rootfs.into_iter().map(rootfs_mount).collect(),
            stdio: opened.stdio,
        })
        .await;
    match created {
        Ok(pid) => {
            pod.hold_stdin(&request.id, "", opened.hold);
            Ok(pid)
        }
        Err(error) => {
            // The pod was made for this one.
            pod.give_up_if_empty().await;
            Err(error.into())
        }
    }
}

/// Both versions of the service are the same calls.
macro_rules! task {
    ($service:ident: $($method:ident($request:ident) -> $reply:ident;)+) => {
        #[async_trait]
        impl $service::Task for Service {
            $(
                async fn $method(
                    &self,
                    _: &TtrpcContext,
                    request: $request,
                ) -> ttrpc::Result<$reply> {
                    Service::$method(self, request).await.map_err(refused)
                }
            )+
        }
    };
    ($($calls:tt)+) => {
        task! { shim_ttrpc: $($calls)+ }
        task! { shim_v3_ttrpc: $($calls)+ }
    };
}

fn refused(error: CallError) -> ttrpc::Error {
    let error = ttrpc::Error::from(error);
    tracing::debug!(%error, "call refused");
    error
}

task! {
    state(StateRequest) -> StateResponse;
    create(CreateTaskRequest) -> CreateTaskResponse;
    start(StartRequest) -> StartResponse;
    delete(DeleteRequest) -> DeleteResponse;
    pids(PidsRequest) -> PidsResponse;
    pause(PauseRequest) -> Empty;
    resume(ResumeRequest) -> Empty;
    checkpoint(CheckpointTaskRequest) -> Empty;
    kill(KillRequest) -> Empty;
    exec(ExecProcessRequest) -> Empty;
    resize_pty(ResizePtyRequest) -> Empty;
    close_io(CloseIORequest) -> Empty;
    update(UpdateTaskRequest) -> Empty;
    wait(WaitRequest) -> WaitResponse;
    stats(StatsRequest) -> StatsResponse;
    connect(ConnectRequest) -> ConnectResponse;
    shutdown(ShutdownRequest) -> Empty;
}
