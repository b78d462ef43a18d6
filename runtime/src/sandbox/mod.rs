// SPDX-License-Identifier: Apache-2.0
//! The pod: one virtual machine and the containers in it.

mod types;

use std::path::Path;

use bulkhead_agent_protocol::agent::StatsReply;
use oci_spec::runtime::{LinuxResources, Process};
use tokio::sync::mpsc::UnboundedReceiver;

pub use self::types::*;
use crate::{config::Config, error::Error, io::Stdio};

/// A running pod. A handle: clones are the same pod.
#[derive(Debug, Clone)]
pub struct Sandbox {}

fn later<T>() -> Result<T, Error> {
    Err(Error::Unimplemented("this".into()))
}

#[allow(missing_docs, unused_variables)]
impl Sandbox {
    pub async fn start(
        config: Config,
        request: SandboxRequest,
    ) -> Result<(Sandbox, UnboundedReceiver<Event>), Error> {
        later()
    }
    pub fn hypervisor_pid(&self) -> u32 {
        0
    }
    pub async fn create(&self, request: CreateRequest) -> Result<u32, Error> {
        later()
    }
    pub async fn start_process(&self, id: &str, exec: Option<&str>) -> Result<u32, Error> {
        later()
    }
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Process,
        stdio: Stdio,
    ) -> Result<(), Error> {
        later()
    }
    pub fn state(&self, id: &str, exec: Option<&str>) -> Result<ProcessState, Error> {
        later()
    }
    pub async fn wait(&self, id: &str, exec: Option<&str>) -> Result<Exit, Error> {
        later()
    }
    pub async fn kill(
        &self,
        id: &str,
        exec: Option<&str>,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        later()
    }
    pub async fn resize_pty(
        &self,
        id: &str,
        exec: Option<&str>,
        width: u16,
        height: u16,
    ) -> Result<(), Error> {
        later()
    }
    pub async fn close_stdin(&self, id: &str, exec: Option<&str>) -> Result<(), Error> {
        later()
    }
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>, Error> {
        later()
    }
    pub async fn stats(&self, id: &str) -> Result<StatsReply, Error> {
        later()
    }
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        later()
    }
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        later()
    }
    pub async fn update(&self, id: &str, resources: LinuxResources) -> Result<(), Error> {
        later()
    }
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> Result<Deleted, Error> {
        later()
    }
    pub fn containers(&self) -> Vec<String> {
        Vec::new()
    }
    pub async fn shutdown(&self) -> Result<(), Error> {
        later()
    }
}

/// Gives back everything that a dead sandbox had taken.
///
/// # Errors
/// What could not be given back.
pub fn recover(state_dir: &Path, namespace: &str, id: &str) -> Result<(), Error> {
    let _ = (state_dir, namespace, id);
    later()
}
