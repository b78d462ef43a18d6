// SPDX-License-Identifier: Apache-2.0
//! The task service in both its versions. Every method is written out: those
//! that are not would be answered with "not found", which means something else
//! to containerd.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use bulkhead_runtime::{error::chain, spans::Span, ErrorKind};
use bulkhead_shim_protocol::{shim, shim_ttrpc, shim_v3_ttrpc};
use protobuf::well_known_types::empty::Empty;
use ttrpc::asynchronous::{Service, TtrpcContext};

use crate::{error::CallError, pod::Pod, sandbox};

/// Serves a pod.
struct Task(Arc<Pod>);

/// Both versions, and the sandbox API, for a server.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let task = Arc::new(Task(pod.clone()));
    let mut services = shim_ttrpc::create_task(task.clone());
    services.extend(shim_v3_ttrpc::create_task(task));
    services.extend(sandbox::services(pod));
    services
}

/// The answer to a call, and what is to be known of it here.
pub fn answer<T>(call: &'static str, id: &str, result: Result<T, CallError>) -> ttrpc::Result<T> {
    match &result {
        Ok(_) => tracing::debug!(call, id, "answered"),
        // Asked often, just to be sure that something is gone.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            tracing::debug!(call, id, error = chain(error), "refused");
        }
        Err(error) => tracing::info!(call, id, error = chain(error), "refused"),
    }
    Ok(result?)
}

/// A call that changes something: what [`answer`] does, and a span for it.
pub struct Call {
    name: &'static str,
    id: String,
    span: Option<Span>,
}

impl Call {
    /// It has just come.
    pub fn begin(name: &'static str, context: &TtrpcContext, id: &str, exec: &str) -> Self {
        let mut span = Span::of_call(name, &context.metadata);
        if let Some(span) = &mut span {
            span.attribute("container.id", id);
            span.attribute("bulkhead.exec.id", exec);
        }
        Self {
            name,
            id: id.into(),
            span,
        }
    }

    /// The answer to it.
    pub fn answer<T>(self, result: Result<T, CallError>) -> ttrpc::Result<T> {
        if let Some(span) = self.span {
            span.end(result.as_ref().err().map(|error| chain(error)));
        }
        answer(self.name, &self.id, result)
    }
}

fn empty((): ()) -> Empty {
    Empty::new()
}

macro_rules! task {
    ($service:ident) => {
        #[async_trait]
        impl $service::Task for Task {
            async fn state(
                &self,
                _: &TtrpcContext,
                request: shim::StateRequest,
            ) -> ttrpc::Result<shim::StateResponse> {
                self.0.called();
                answer("State", &request.id, self.0.state(&request))
            }

            async fn create(
                &self,
                context: &TtrpcContext,
                request: shim::CreateTaskRequest,
            ) -> ttrpc::Result<shim::CreateTaskResponse> {
                self.0.called();
                let call = Call::begin("Create", context, &request.id, "");
                call.answer(self.0.create(request).await)
            }

            async fn start(
                &self,
                context: &TtrpcContext,
                request: shim::StartRequest,
            ) -> ttrpc::Result<shim::StartResponse> {
                let call = Call::begin("Start", context, &request.id, &request.exec_id);
                call.answer(self.0.start(request).await)
            }

            async fn delete(
                &self,
                context: &TtrpcContext,
                request: shim::DeleteRequest,
            ) -> ttrpc::Result<shim::DeleteResponse> {
                let call = Call::begin("Delete", context, &request.id, &request.exec_id);
                call.answer(self.0.delete(request).await)
            }

            async fn pids(
                &self,
                _: &TtrpcContext,
                request: shim::PidsRequest,
            ) -> ttrpc::Result<shim::PidsResponse> {
                let id = request.id.clone();
                answer("Pids", &id, self.0.pids(request).await)
            }

            async fn pause(
                &self,
                context: &TtrpcContext,
                request: shim::PauseRequest,
            ) -> ttrpc::Result<Empty> {
                let call = Call::begin("Pause", context, &request.id, "");
                call.answer(self.0.pause(request).await.map(empty))
            }

            async fn resume(
                &self,
                context: &TtrpcContext,
                request: shim::ResumeRequest,
            ) -> ttrpc::Result<Empty> {
                let call = Call::begin("Resume", context, &request.id, "");
                call.answer(self.0.resume(request).await.map(empty))
            }

            async fn checkpoint(
                &self,
                _: &TtrpcContext,
                request: shim::CheckpointTaskRequest,
            ) -> ttrpc::Result<Empty> {
                answer("Checkpoint", &request.id, self.0.checkpoint().map(empty))
            }

            async fn kill(
                &self,
                context: &TtrpcContext,
                request: shim::KillRequest,
            ) -> ttrpc::Result<Empty> {
                let call = Call::begin("Kill", context, &request.id, &request.exec_id);
                call.answer(self.0.kill(request).await.map(empty))
            }

            async fn exec(
                &self,
                context: &TtrpcContext,
                request: shim::ExecProcessRequest,
            ) -> ttrpc::Result<Empty> {
                let call = Call::begin("Exec", context, &request.id, &request.exec_id);
                call.answer(self.0.exec(request).await.map(empty))
            }

            async fn resize_pty(
                &self,
                _: &TtrpcContext,
                request: shim::ResizePtyRequest,
            ) -> ttrpc::Result<Empty> {
                let id = request.id.clone();
                answer(
                    "ResizePty",
                    &id,
                    self.0.resize_pty(request).await.map(empty),
                )
            }

            async fn close_io(
                &self,
                _: &TtrpcContext,
                request: shim::CloseIORequest,
            ) -> ttrpc::Result<Empty> {
                let id = request.id.clone();
                answer("CloseIO", &id, self.0.close_io(request).await.map(empty))
            }

            async fn update(
                &self,
                context: &TtrpcContext,
                request: shim::UpdateTaskRequest,
            ) -> ttrpc::Result<Empty> {
                let call = Call::begin("Update", context, &request.id, "");
                call.answer(self.0.update(request).await.map(empty))
            }

            async fn wait(
                &self,
                _: &TtrpcContext,
                request: shim::WaitRequest,
            ) -> ttrpc::Result<shim::WaitResponse> {
                let id = request.id.clone();
                answer("Wait", &id, self.0.wait(request).await)
            }

            async fn stats(
                &self,
                _: &TtrpcContext,
                request: shim::StatsRequest,
            ) -> ttrpc::Result<shim::StatsResponse> {
                let id = request.id.clone();
                answer("Stats", &id, self.0.stats(request).await)
            }

            async fn connect(
                &self,
                _: &TtrpcContext,
                request: shim::ConnectRequest,
            ) -> ttrpc::Result<shim::ConnectResponse> {
                self.0.called();
                answer("Connect", &request.id, Ok(self.0.connect(&request)))
            }

            async fn shutdown(
                &self,
                _: &TtrpcContext,
                request: shim::ShutdownRequest,
            ) -> ttrpc::Result<Empty> {
                answer("Shutdown", &request.id, self.0.shut_down().await.map(empty))
            }
        }
    };
}

task!(shim_ttrpc);
task!(shim_v3_ttrpc);
