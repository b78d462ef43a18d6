// SPDX-License-Identifier: Apache-2.0
//! The calls of the task service.
//!
//! A client that gives up on a call makes the server drop it. What changes
//! something therefore runs as a task of its own, to its end.

use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};

use bulkhead_runtime::{
    error::chain,
    io::StdioPaths,
    sandbox::{CreateRequest, Status, Work, FILE_COPY, GUEST_COMMAND},
};
use bulkhead_shim_protocol::{runc::ProcessDetails, shim, task::ProcessInfo, Named};
use oci_spec::runtime::LinuxResources;
use protobuf::{well_known_types::any::Any, EnumOrUnknown, MessageField};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::{
    convert,
    error::CallError,
    metrics,
    options::Options,
    pod::Pod,
    stdio::{self, Owner, Streams},
};

/// A further process's id; none: the container's first one.
fn exec(id: &str) -> Option<&str> {
    Some(id).filter(|id| !id.is_empty())
}

fn json<T: DeserializeOwned>(what: &'static str, any: &MessageField<Any>) -> Result<T, CallError> {
    match any.as_ref() {
        Some(any) => {
            bulkhead_runtime::oci::parse(&any.value).map_err(|source| CallError::Json(what, source))
        }
        None => Err(CallError::Invalid(format!("{what} is missing"))),
    }
}

/// What a further process is to do, by the type of its description: of
/// containerd's, or of `bulkhead cp` and `bulkhead exec --guest`.
fn work(spec: &MessageField<Any>) -> Result<Work, CallError> {
    Ok(match spec.as_ref().map(|any| any.type_url.as_str()) {
        Some(GUEST_COMMAND) => Work::Guest(json("the command", spec)?),
        Some(FILE_COPY) => Work::Copy(json("the file", spec)?),
        _ => Work::Program(json("the process's specification", spec)?),
    })
}

/// Runs to its end even when nobody waits any more.
pub async fn whole<T: Send + 'static>(
    call: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> Result<T, CallError> {
    tokio::spawn(call).await?
}

impl Pod {
    /// `Create`.
    pub async fn create(
        self: &Arc<Self>,
        request: shim::CreateTaskRequest,
    ) -> Result<shim::CreateTaskResponse, CallError> {
        let pod = self.clone();
        let pid = whole(async move { pod.make(request).await }).await?;
        Ok(shim::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn make(self: &Arc<Self>, request: shim::CreateTaskRequest) -> Result<u32, CallError> {
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(CallError::Unimplemented("creating from a checkpoint"));
        }
        if request.id.is_empty() {
            return Err(CallError::Invalid("the container has no id".into()));
        }
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(CallError::Invalid(format!(
                "bundle {:?} is not an absolute path",
                request.bundle
            )));
        }
        let options = Options::parse(request.options.as_ref())?;
        let config = options.configuration()?;
        let paths = StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let (stdio, streams) =
            stdio::open(self.owner(&request.id), request.terminal, paths).await?;
        // From here on there may be something to clean up.
        self.record(&bundle, &config, 0);
        let (sandbox, started) = match self.sandbox_api.is_used() {
            true => (self.started()?, false),
            false => self.sandbox_for(&bundle, config.clone(), None).await?,
        };
        let created = sandbox
            .create(CreateRequest {
                id: request.id.clone(),
                bundle: bundle.clone(),
                rootfs: request
                    .rootfs
                    .into_iter()
                    .map(convert::rootfs_mount)
                    .collect(),
                stdio,
            })
            .await;
        match created {
            Ok(pid) => {
                self.keep(&request.id, None, streams);
                self.record(&bundle, &config, pid);
                Ok(pid)
            }
            Err(error) => {
                if started {
                    self.unwind(&sandbox).await;
                }
                Err(error.into())
            }
        }
    }

    fn owner<'a>(&'a self, container: &'a str) -> Owner<'a> {
        Owner {
            namespace: &self.identity.namespace,
            container,
        }
    }

    /// `Start`.
    pub async fn start(
        self: &Arc<Self>,
        request: shim::StartRequest,
    ) -> Result<shim::StartResponse, CallError> {
        let pod = self.clone();
        let pid = whole(async move {
            let (id, exec) = (&request.id, exec(&request.exec_id));
            let pid = pod.sandbox(id)?.start_process(id, exec).await?;
            if let Some(Err(error)) = pod.with_streams(id, exec, Streams::begin) {
                // It runs. What it does not get is told where it can be.
                tracing::warn!(id, exec, error = chain(&error), "no standard input");
                pod.with_streams(id, exec, Streams::ended);
            }
            Ok(pid)
        })
        .await?;
        Ok(shim::StartResponse {
            pid,
            ..Default::default()
        })
    }

    /// `State`. Nobody is asked: containerd waits two seconds for it.
    pub fn state(&self, request: &shim::StateRequest) -> Result<shim::StateResponse, CallError> {
        let exec = exec(&request.exec_id);
        let state = self.sandbox(&request.id)?.state(&request.id, exec)?;
        Ok(shim::StateResponse {
            id: request.id.clone(),
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: state.pid,
            status: EnumOrUnknown::new(convert::status(state.status)),
            stdin: state.stdio.stdin,
            stdout: state.stdio.stdout,
            stderr: state.stdio.stderr,
            terminal: state.terminal,
            exit_status: state.exit_status,
            exited_at: convert::maybe_timestamp(state.exited_at),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        })
    }

    /// `Wait`.
    pub async fn wait(&self, request: shim::WaitRequest) -> Result<shim::WaitResponse, CallError> {
        let exec = exec(&request.exec_id);
        let exit = self.sandbox(&request.id)?.wait(&request.id, exec).await?;
        Ok(shim::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    /// `Kill`.
    pub async fn kill(&self, request: shim::KillRequest) -> Result<(), CallError> {
        let exec = exec(&request.exec_id);
        let sandbox = self.sandbox(&request.id)?;
        Ok(sandbox
            .kill(&request.id, exec, request.signal, request.all)
            .await?)
    }

    /// `Exec`: describes a further process.
    pub async fn exec(
        self: &Arc<Self>,
        request: shim::ExecProcessRequest,
    ) -> Result<(), CallError> {
        if request.exec_id.is_empty() {
            return Err(CallError::Invalid("the process has no id".into()));
        }
        let work = work(&request.spec)?;
        let pod = self.clone();
        whole(async move {
            let (id, exec_id) = (&request.id, &request.exec_id);
            let sandbox = pod.sandbox(id)?;
            if sandbox.state(id, Some(exec_id)).is_ok() {
                let name = format!("process {exec_id} of container {id}");
                return Err(bulkhead_runtime::Error::AlreadyExists(name).into());
            }
            let paths = StdioPaths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            };
            let (stdio, streams) = stdio::open(pod.owner(id), request.terminal, paths).await?;
            sandbox.exec(id, exec_id, work, stdio).await?;
            pod.keep(id, Some(exec_id), streams);
            Ok(())
        })
        .await
    }

    /// `ResizePty`.
    pub async fn resize_pty(&self, request: shim::ResizePtyRequest) -> Result<(), CallError> {
        let (id, exec) = (&request.id, exec(&request.exec_id));
        let sandbox = self.sandbox(id)?;
        let state = sandbox.state(id, exec)?;
        if !state.terminal {
            return Ok(());
        }
        if state.status == Status::Stopped {
            return Err(CallError::Ended(id.clone()));
        }
        let side = |length: u32| {
            u16::try_from(length).map_err(|_| {
                CallError::Invalid(format!("a terminal cannot be {length} wide or high"))
            })
        };
        let (width, height) = (side(request.width)?, side(request.height)?);
        Ok(sandbox.resize_pty(id, exec, width, height).await?)
    }

    /// `CloseIO`.
    pub async fn close_io(&self, request: shim::CloseIORequest) -> Result<(), CallError> {
        let (id, exec) = (&request.id, exec(&request.exec_id));
        self.sandbox(id)?.close_stdin(id, exec).await?;
        if request.stdin {
            self.with_streams(id, exec, Streams::close_input);
        }
        Ok(())
    }

    /// `Pids`. containerd takes a container without any for a leak, so there
    /// is always at least the process that stands for it on the host.
    pub async fn pids(&self, request: shim::PidsRequest) -> Result<shim::PidsResponse, CallError> {
        let id = &request.id;
        let sandbox = self.sandbox(id)?;
        let state = sandbox.state(id, None)?;
        // containerd allows five seconds for that and more when it is started.
        let limit = Duration::from_millis(sandbox.config().shim.pids_timeout_ms);
        let mut pids = match timeout(limit, sandbox.pids(id)).await {
            Ok(Ok(pids)) => pids,
            Ok(Err(error)) => {
                tracing::debug!(id, error = chain(&error), "processes not listed");
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        if pids.is_empty() {
            pids.push((state.pid, None));
        }
        let mut processes = Vec::with_capacity(pids.len());
        for (pid, exec_id) in pids {
            let info = match exec_id {
                Some(exec_id) => Some(
                    ProcessDetails {
                        exec_id,
                        ..Default::default()
                    }
                    .to_any()?,
                ),
                None => None,
            };
            processes.push(ProcessInfo {
                pid,
                info: MessageField::from_option(info),
                ..Default::default()
            });
        }
        Ok(shim::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    /// `Stats`.
    pub async fn stats(
        &self,
        request: shim::StatsRequest,
    ) -> Result<shim::StatsResponse, CallError> {
        let stats = self.sandbox(&request.id)?.stats(&request.id).await?;
        Ok(shim::StatsResponse {
            stats: MessageField::some(metrics::metrics(stats).to_any()?),
            ..Default::default()
        })
    }

    /// `Pause`.
    pub async fn pause(&self, request: shim::PauseRequest) -> Result<(), CallError> {
        Ok(self.sandbox(&request.id)?.pause(&request.id).await?)
    }

    /// `Resume`.
    pub async fn resume(&self, request: shim::ResumeRequest) -> Result<(), CallError> {
        Ok(self.sandbox(&request.id)?.resume(&request.id).await?)
    }

    /// `Update`.
    pub async fn update(&self, request: shim::UpdateTaskRequest) -> Result<(), CallError> {
        let id = &request.id;
        let sandbox = self.sandbox(id)?;
        if sandbox.state(id, None)?.status == Status::Stopped {
            return Err(CallError::Ended(id.clone()));
        }
        let resources: LinuxResources = json("the resources", &request.resources)?;
        Ok(sandbox.update(id, resources).await?)
    }

    /// `Delete`.
    pub async fn delete(
        self: &Arc<Self>,
        request: shim::DeleteRequest,
    ) -> Result<shim::DeleteResponse, CallError> {
        let pod = self.clone();
        let deleted = whole(async move {
            let (id, exec) = (&request.id, exec(&request.exec_id));
            let sandbox = pod.sandbox(id)?;
            let state = sandbox.state(id, exec)?;
            if matches!(state.status, Status::Stopped | Status::Created) {
                // The client has read all that it wants: without this, output
                // that nobody reads would be waited for.
                pod.with_streams(id, exec, Streams::release_output);
            }
            let deleted = sandbox.delete(id, exec).await?;
            pod.drop_streams(id, exec);
            Ok(deleted)
        })
        .await?;
        Ok(shim::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: MessageField::some(convert::timestamp(deleted.exit.at)),
            ..Default::default()
        })
    }

    /// `Connect`: always answered, containerd looks with it whether there is a
    /// shim.
    pub fn connect(&self, request: &shim::ConnectRequest) -> shim::ConnectResponse {
        let state = self
            .sandbox(&request.id)
            .and_then(|sandbox| Ok(sandbox.state(&request.id, None)?));
        shim::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: state.map_or(0, |state| state.pid),
            ..Default::default()
        }
    }

    /// `Checkpoint`.
    ///
    /// # Errors
    /// Always.
    pub fn checkpoint(&self) -> Result<(), CallError> {
        Err(CallError::Unimplemented("checkpointing a container"))
    }

    /// `Shutdown`: answered when everything has been given back, so that a pod
    /// of the same name can be started at once.
    pub async fn shut_down(self: &Arc<Self>) -> Result<(), CallError> {
        let pod = self.clone();
        whole(async move {
            pod.shutdown().await;
            Ok(())
        })
        .await
    }
}
