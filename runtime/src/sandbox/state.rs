// SPDX-License-Identifier: Apache-2.0
//! The pod's state on the host. Nothing here waits: each change is made under
//! one short lock, and what happened is told while it is held, so that events
//! come in the order of the changes.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{mpsc::UnboundedSender, watch};

use super::{mirror::Following, work::Translated, Event, Exit, ProcessState, Status};
use crate::{
    error::Error,
    hooks::Lifecycle,
    io::{Copies, Stdio, StdioPaths},
    oci::Limits,
    operator::history::History,
    resource::journal::EntryId,
};

/// Status of processes that end with the virtual machine: as by SIGKILL.
pub const KILLED: u32 = 128 + 9;

/// Everything that changes.
#[derive(Debug)]
pub struct Pod {
    pub containers: BTreeMap<String, Container>,
    /// Why the virtual machine has ended.
    pub ended: Option<String>,
    /// Shutting down: nothing new begins.
    pub closing: bool,
    pub events: UnboundedSender<Event>,
    /// For whoever asks later.
    pub history: Arc<History>,
    /// What stands for every process on the host: the VMM.
    pub pid: u32,
    /// What the machine has beyond what it booted with.
    pub extra: Extra,
}

/// Processors and MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extra {
    pub vcpus: u8,
    pub memory_mib: u32,
}

/// Where a container is between being asked for and gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Creating,
    Exists,
    Deleting,
}

/// Whether a container is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frozen {
    No,
    Pausing,
    Yes,
}

#[derive(Debug)]
pub struct Container {
    pub bundle: PathBuf,
    pub phase: Phase,
    pub frozen: Frozen,
    pub init: Process,
    pub execs: BTreeMap<String, Process>,
    /// Its hooks on the host; none while it is being made.
    pub hooks: Option<Arc<Lifecycle>>,
    /// What keeps its copies of volumes up to date.
    pub mirrors: Vec<Following>,
    /// Its directory in the journal.
    pub entry: EntryId,
    /// What of its limits the machine's size depends on.
    pub limits: Limits,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Described (a further process), or made and waiting (a first one).
    Created,
    /// About to run.
    Starting,
    Running,
    Stopped,
}

/// A further process that has not been started.
#[derive(Debug)]
pub struct Described {
    pub work: Translated,
    pub stdio: Stdio,
}

#[derive(Debug)]
pub struct Process {
    pub stage: Stage,
    pub terminal: bool,
    pub paths: StdioPaths,
    pub described: Option<Box<Described>>,
    pub copies: Option<Arc<Copies>>,
    pub exit: watch::Sender<Option<Exit>>,
    /// Its start has failed: its end is no news.
    pub failed: bool,
    /// It has ended, which must not be told yet.
    held: Option<(Exit, bool)>,
}

impl Process {
    pub fn new(terminal: bool, paths: StdioPaths) -> Self {
        Self {
            stage: Stage::Created,
            terminal,
            paths,
            described: None,
            copies: None,
            exit: watch::Sender::new(None),
            failed: false,
            held: None,
        }
    }

    fn is_live(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Running)
    }
}

/// A process's name in messages.
pub fn label(id: &str, exec: Option<&str>) -> String {
    match exec {
        Some(exec) => format!("process {exec} of container {id}"),
        None => format!("container {id}"),
    }
}

impl Pod {
    pub fn container(&mut self, id: &str) -> Result<&mut Container, Error> {
        self.containers
            .get_mut(id)
            .filter(|container| container.phase != Phase::Creating)
            .ok_or_else(|| Error::NotFound(label(id, None)))
    }

    pub fn process(&mut self, id: &str, exec: Option<&str>) -> Result<&mut Process, Error> {
        let container = self.container(id)?;
        match exec {
            None => Ok(&mut container.init),
            Some(exec) => container
                .execs
                .get_mut(exec)
                .ok_or_else(|| Error::NotFound(label(id, Some(exec)))),
        }
    }

    /// Refuses what a pod that is going away cannot do any more.
    pub fn accepts(&self) -> Result<(), Error> {
        match &self.ended {
            Some(why) => Err(Error::VmEnded(why.clone())),
            None if self.closing => Err(Error::Precondition("the pod is shutting down".into())),
            None => Ok(()),
        }
    }

    /// Nobody listens any more: the front end is going.
    pub fn tell(&self, event: Event) {
        self.history.tell(&event);
        let _ = self.events.send(event);
    }

    pub fn state(&mut self, id: &str, exec: Option<&str>) -> Result<ProcessState, Error> {
        let pid = self.pid;
        let container = self.container(id)?;
        let (bundle, frozen) = (container.bundle.clone(), container.frozen);
        let process = self.process(id, exec)?;
        let exit = *process.exit.borrow();
        Ok(ProcessState {
            id: exec.unwrap_or(id).to_owned(),
            bundle,
            pid: match (exec, process.stage) {
                (Some(_), Stage::Created) => 0,
                _ => pid,
            },
            status: match (process.stage, frozen) {
                (Stage::Stopped, _) => Status::Stopped,
                (Stage::Running, Frozen::Yes) => Status::Paused,
                (Stage::Running, Frozen::Pausing) => Status::Pausing,
                (Stage::Running, Frozen::No) => Status::Running,
                (Stage::Created | Stage::Starting, _) => Status::Created,
            },
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at),
            terminal: process.terminal,
            stdio: process.paths.clone(),
        })
    }

    /// A process runs now. What it did meanwhile is told after that.
    pub fn started(&mut self, id: &str, exec: Option<&str>) {
        let pid = self.pid;
        let Ok(process) = self.process(id, exec) else {
            return;
        };
        // The virtual machine may have ended.
        if process.stage == Stage::Stopped {
            return;
        }
        process.stage = Stage::Running;
        self.tell(Event::Started {
            id: id.into(),
            exec: exec.map(Into::into),
            pid,
        });
        self.release_held(id, exec);
    }

    /// A process could not be started. Of its end nobody is told.
    pub fn start_failed(&mut self, id: &str, exec: Option<&str>, status: u32) {
        let Ok(process) = self.process(id, exec) else {
            return;
        };
        if process.stage == Stage::Stopped {
            return;
        }
        process.failed = true;
        let at = SystemTime::now();
        self.finish(id, exec, Exit { status, at }, false);
    }

    /// A process has ended. `oom`: the guest's OOM killer ended a process of
    /// the container.
    pub fn exited(&mut self, id: &str, exec: Option<&str>, exit: Exit, oom: bool) {
        let Ok(process) = self.process(id, exec) else {
            return;
        };
        match process.stage {
            Stage::Stopped => return,
            Stage::Starting => {
                process.held = Some((exit, oom));
                return;
            }
            Stage::Created | Stage::Running => {}
        }
        if exec.is_none() && self.has_live_execs(id) {
            if let Ok(container) = self.container(id) {
                container.init.held = Some((exit, oom));
            }
            return;
        }
        self.finish(id, exec, exit, oom);
        if exec.is_some() && !self.has_live_execs(id) {
            self.release_held(id, None);
        }
    }

    /// Whether the container's end is known and waits for that of its further
    /// processes.
    pub fn end_is_held(&self, id: &str) -> bool {
        self.containers
            .get(id)
            .is_some_and(|container| container.init.held.is_some())
    }

    /// The container is gone from the guest: what is left of its further
    /// processes went with it.
    pub fn give_up_on_execs(&mut self, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return;
        };
        let live: Vec<String> = container
            .execs
            .iter()
            .filter(|(_, process)| process.is_live())
            .map(|(exec, _)| exec.clone())
            .collect();
        let exit = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        for exec in live {
            self.finish(id, Some(&exec), exit, false);
        }
        self.release_held(id, None);
    }

    /// The virtual machine has ended, and everything in it.
    pub fn machine_ended(&mut self, why: String) {
        if self.ended.is_none() {
            self.history
                .tell_sandbox("sandbox-ended", Some(why.clone()));
        }
        self.ended = Some(why);
        let exit = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        let containers: Vec<(String, Vec<String>)> = self
            .containers
            .iter()
            .filter(|(_, container)| container.phase != Phase::Creating)
            .map(|(id, container)| (id.clone(), container.execs.keys().cloned().collect()))
            .collect();
        for (id, execs) in containers {
            for exec in execs {
                let live = self
                    .process(&id, Some(&exec))
                    .is_ok_and(|process| process.is_live());
                if live {
                    self.finish(&id, Some(&exec), exit, false);
                }
            }
            self.finish(&id, None, exit, false);
        }
    }

    fn has_live_execs(&self, id: &str) -> bool {
        self.containers
            .get(id)
            .is_some_and(|container| container.execs.values().any(Process::is_live))
    }

    fn release_held(&mut self, id: &str, exec: Option<&str>) {
        let held = match self.process(id, exec) {
            Ok(process) if process.stage != Stage::Starting => process.held.take(),
            _ => None,
        };
        if let Some((exit, oom)) = held {
            self.exited(id, exec, exit, oom);
        }
    }

    fn finish(&mut self, id: &str, exec: Option<&str>, exit: Exit, oom: bool) {
        let pid = self.pid;
        let Ok(process) = self.process(id, exec) else {
            return;
        };
        if process.stage == Stage::Stopped {
            return;
        }
        // What a machine's end interrupts has a better end on record.
        let (exit, oom) = process.held.take().unwrap_or((exit, oom));
        process.stage = Stage::Stopped;
        process.described = None;
        if let Some(copies) = &process.copies {
            copies.end_input();
        }
        let silent = process.failed;
        process.exit.send_replace(Some(exit));
        if silent {
            return;
        }
        if oom {
            self.tell(Event::Oom { id: id.into() });
        }
        self.tell(Event::Exited {
            id: id.into(),
            exec: exec.map(Into::into),
            pid,
            status: exit.status,
            at: exit.at,
        });
    }
}

/// A guest's wall clock stamp, nanoseconds since the epoch; the guest may say
/// anything.
pub fn wall_clock(ns: i64) -> SystemTime {
    match u64::try_from(ns) {
        Ok(ns) if ns > 0 => UNIX_EPOCH + Duration::from_nanos(ns),
        _ => SystemTime::now(),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
