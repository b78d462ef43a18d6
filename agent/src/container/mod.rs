// SPDX-License-Identifier: Apache-2.0
//! Containers. Each is an actor: a task that owns the container's state and
//! takes one message at a time. What may take long (setting a child up,
//! waiting for an exit) runs on tasks of its own that report back, so that one
//! container never waits for another, and a stuck child can still be killed.

mod actor;
pub mod caps;
pub mod copy;
pub mod hooks;
pub mod limits;
pub mod mounts;
pub mod namespaces;
mod notify;
pub mod numbers;
pub mod plan;
pub mod process;
pub mod state;
pub mod user;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_agent_protocol::{agent, oci};
use tokio::sync::{mpsc, oneshot};

use crate::error::{AgentError, Result};
use crate::steps::Steps;
use namespaces::PidNamespace;
use process::{ExitWatch, Process, Shared};

/// Where the answer to a message goes.
type Reply<T> = oneshot::Sender<Result<T>>;

/// A process that was made.
#[derive(Debug)]
pub struct Made {
    /// Its id in the guest's root pid namespace.
    pub pid: u32,
    /// What was done for it.
    pub steps: Steps,
}

/// A further process of a container, as it is asked for.
#[derive(Debug)]
pub enum Work {
    /// ExecProcess.
    Program(agent::ExecProcessRequest),
    /// ExecGuest.
    Guest(agent::ExecProcessRequest),
    /// CopyFile.
    Copy(agent::CopyFileRequest),
}

impl Work {
    /// The process's name.
    fn exec_id(&self) -> &str {
        match self {
            Self::Program(request) | Self::Guest(request) => &request.exec_id,
            Self::Copy(request) => &request.exec_id,
        }
    }
}

/// What can be asked of a container.
#[derive(Debug)]
pub enum Message {
    /// StartContainer.
    Start(Reply<()>),
    /// A further process, with what has been done of it.
    Exec(Box<Work>, Steps, Reply<Made>),
    /// SignalProcess.
    Signal(agent::SignalProcessRequest, Reply<()>),
    /// WaitProcess for the named process (empty: the first one).
    Wait(String, Reply<ExitWatch>),
    /// ResizePty.
    Resize(agent::ResizePtyRequest, Reply<()>),
    /// ListProcesses.
    List(Reply<agent::ListProcessesReply>),
    /// StatsContainer.
    Stats(Reply<agent::StatsReply>),
    /// PauseContainer (`true`) and ResumeContainer.
    Pause(bool, Reply<()>),
    /// UpdateContainer.
    Update(Box<oci::Resources>, Reply<()>),
    /// UpdateMirror.
    Mirror(Box<agent::Mirror>, Reply<()>),
    /// DeleteContainer.
    Delete(Reply<()>),
    /// DeleteProcess.
    DeleteProcess(String, Reply<()>),
    /// The process by which the container's pid namespace is joined; `None`:
    /// its processes are numbered with the agent.
    PidNamespace(Reply<Option<Process>>),
    /// From the actor's own tasks.
    Own(actor::Own),
}

/// All containers of the guest.
#[derive(Clone, Debug)]
pub struct Containers {
    shared: Arc<Shared>,
    // Held for a look-up or an insertion, never across an await.
    actors: Arc<Mutex<HashMap<String, mpsc::UnboundedSender<Message>>>>,
}

impl Containers {
    /// None yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            actors: Arc::default(),
        }
    }

    /// What everything in the agent shares.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    fn actors(&self) -> MutexGuard<'_, HashMap<String, mpsc::UnboundedSender<Message>>> {
        self.actors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a container up to where its process waits to be started. `steps`:
    /// what was done for it already.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] for a wrong request, [`AgentError::AlreadyExists`],
    /// or the step that failed; nothing is left then.
    pub async fn create(
        &self,
        request: agent::CreateContainerRequest,
        steps: Steps,
    ) -> Result<Made> {
        let id = request.container_id.clone();
        check_name(&id, "container_id")?;
        let spec = request
            .spec
            .as_ref()
            .ok_or_else(|| AgentError::Invalid("spec: missing".into()))?;
        let plan = plan::container(spec, &id)?;
        let neighbour = match &plan.namespaces.pid {
            PidNamespace::Of(other) => self.ask(other, Message::PidNamespace).await?,
            PidNamespace::Guest | PidNamespace::Own => None,
        };
        let (reply, answer) = oneshot::channel();
        {
            let mut actors = self.actors();
            if actors.contains_key(&id) {
                return Err(AgentError::AlreadyExists(format!("container {id}")));
            }
            let mailbox = actor::start(
                self.clone(),
                id.clone(),
                plan,
                neighbour,
                request.stdio.into_option(),
                &request.mirrors,
                (steps, reply),
            )?;
            actors.insert(id, mailbox);
        }
        answered(answer).await
    }

    /// Asks a container and waits for its answer.
    ///
    /// # Errors
    /// [`AgentError::NotFound`] without such a container, else the container's
    /// own.
    pub async fn ask<T>(&self, id: &str, message: impl FnOnce(Reply<T>) -> Message) -> Result<T> {
        let mailbox = self.actors().get(id).cloned();
        let not_found = || AgentError::NotFound(format!("container {id}"));
        let mailbox = mailbox.ok_or_else(not_found)?;
        let (reply, answer) = oneshot::channel();
        mailbox.send(message(reply)).map_err(|_| not_found())?;
        match answer.await {
            Ok(result) => result,
            // Deleted while the message was on its way.
            Err(_) => Err(not_found()),
        }
    }

    fn forget(&self, id: &str) {
        self.actors().remove(id);
    }
}

async fn answered<T>(answer: oneshot::Receiver<Result<T>>) -> Result<T> {
    answer
        .await
        .unwrap_or_else(|_| Err(AgentError::Internal("the container's task ended".into())))
}

/// Names become directories: letters, digits, `_`, `.`, `-`, not led by a dot
/// or a dash, at most 128 characters.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn check_name(name: &str, field: &str) -> Result<()> {
    let letters = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    let first = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if letters && first && name.len() <= 128 {
        Ok(())
    } else {
        Err(AgentError::Invalid(format!("{field}: bad name {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
        for good in ["a", "web-1", "0f.e_d", &"x".repeat(128)] {
            assert!(check_name(good, "id").is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            "-x",
            "a\0",
            "é",
            &"x".repeat(129),
        ] {
            assert!(check_name(bad, "id").is_err(), "{bad}");
        }
    }
}
