// SPDX-License-Identifier: Apache-2.0
//! A guest without the runtime: the VMM, and the agent at the other end of its
//! connection.

use std::fs;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use bulkhead_agent_protocol::agent::{
    ContainerRequest, CreateContainerReply, CreateContainerRequest, DeviceNode, DialPortRequest,
    Empty, ExecProcessReply, ExecProcessRequest, Mirror, ProcessRequest, SetupSandboxRequest,
    StartContainerRequest, Stdio, WaitProcessRequest,
};
use bulkhead_agent_protocol::{oci, SHARED_MOUNT, SHARED_TAG};
use bulkhead_runtime::agent::{Agent, Expected, Streams};
use bulkhead_runtime::config;
use bulkhead_runtime::oci::{container, parse};
use bulkhead_vmm_api::{DeviceConfigs, DeviceMetrics, PlugConfig};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::install::Products;
use crate::vmm::{agent_socket, port_socket, stream_socket, Size, Vmm};

/// A booted guest with its shared directory mounted.
pub struct Guest {
    runtime: Runtime,
    // Ends before what it is connected to.
    agent: Agent,
    streams: Streams,
    vmm: Vmm,
    dir: PathBuf,
    limit: Duration,
}

/// What a process did.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit status.
    pub status: u32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
}

/// A container that runs.
pub struct Running {
    id: String,
    outputs: [Expected; 2],
}

impl Outcome {
    /// Its standard output, when it has succeeded.
    ///
    /// # Errors
    /// When it has not.
    pub fn ok(self) -> Result<Vec<u8>> {
        if self.status != 0 {
            bail!("exit status {}: {}", self.status, self.stderr.trim_end());
        }
        Ok(self.stdout)
    }
}

impl Guest {
    /// Boots one with `memory_mib` MiB; `dir` is its directory. No step may
    /// take longer than `limit`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(products: &Products, dir: &Path, memory_mib: u32, limit: Duration) -> Result<Self> {
        let size = Size {
            memory_mib,
            ..Size::default()
        };
        let guest = Self::up(products, dir, limit, |vmm| {
            vmm.boot_sized(products, dir, size)?;
            vmm.wait_ready()
        })?;
        guest.set_up(SHARED_TAG)?;
        Ok(guest)
    }

    /// One that `start` brings up, until its agent has called: [`Self::set_up`]
    /// is left to do. `dir` is its directory. No step may take longer than
    /// `limit`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn up(
        products: &Products,
        dir: &Path,
        limit: Duration,
        start: impl FnOnce(&mut Vmm) -> Result<()>,
    ) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (calls, dials) = {
            let _guard = runtime.enter();
            (
                UnixListener::bind(agent_socket(dir))?,
                UnixListener::bind(stream_socket(dir))?,
            )
        };
        let mut vmm = Vmm::start(products, limit)?;
        start(&mut vmm)?;
        let patient = config::Agent {
            rpc_timeout_ms: u64::try_from(limit.as_millis())?,
            ..config::Agent::default()
        };
        let (agent, streams) = runtime.block_on(async {
            let (stream, _) = timeout(limit, calls.accept()).await??;
            anyhow::Ok((Agent::new(stream, &patient), Streams::new(dials)))
        })?;
        Ok(Self {
            runtime,
            agent,
            streams,
            vmm,
            dir: dir.to_owned(),
            limit,
        })
    }

    /// One that goes on where another one was saved, with `dir` of its own and
    /// what `more` adds for the devices that were plugged there; without its
    /// shared directory.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn clone_with(
        products: &Products,
        dir: &Path,
        (state, memory): (&Path, &Path),
        limit: Duration,
        more: impl FnOnce(&mut DeviceConfigs, &mut Vec<OwnedFd>),
    ) -> Result<Self> {
        let guest = Self::up(products, dir, limit, |vmm| {
            vmm.clone_with(state, memory, products, dir, more)?;
            vmm.wait_clone()
        })?;
        guest.set_up("")?;
        Ok(guest)
    }

    /// Has its agent make a sandbox of it, with the shared directory of that
    /// tag. Without one the guest can be saved.
    ///
    /// # Errors
    /// The agent's.
    pub fn set_up(&self, tag: &str) -> Result<()> {
        self.set_up_with(SetupSandboxRequest {
            shared_tag: tag.into(),
            ..Default::default()
        })
    }

    /// As [`Self::set_up`], with all that can be said of it.
    ///
    /// # Errors
    /// The agent's.
    pub fn set_up_with(&self, mut request: SetupSandboxRequest) -> Result<()> {
        request.entropy = vec![7; 32];
        self.wait_for(self.agent.setup_sandbox(request)).map(drop)
    }

    /// Its agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Plugs a device, and has the guest find it; its slot, and what the guest
    /// calls it.
    ///
    /// # Errors
    /// When the VMM refuses, or the guest has no driver for it.
    pub fn plug(&mut self, config: PlugConfig, fd: OwnedFd) -> Result<(u8, DeviceNode)> {
        let slot = self.vmm.plug(config, fd)?;
        let found = self.wait_for(self.agent.rescan_devices(Empty::new()))?;
        let address = format!("0000:00:{slot:02x}.0");
        let mut devices = found.devices.into_iter();
        let device = devices.find(|device| device.address == address);
        let node = device.and_then(|device| device.nodes.into_iter().next());
        let node = node.with_context(|| format!("nothing works with {address}"))?;
        Ok((slot, node))
    }

    /// What a device of it has done.
    ///
    /// # Errors
    /// When there is none in that slot.
    pub fn metrics(&mut self, slot: u8) -> Result<DeviceMetrics> {
        let devices = self.vmm.status()?.devices;
        let device = devices.iter().find(|device| device.slot == slot);
        Ok(device
            .with_context(|| format!("slot {slot} is empty"))?
            .metrics)
    }

    /// The shared directory on the host.
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// Its VMM.
    pub fn vmm(&mut self) -> &mut Vmm {
        &mut self.vmm
    }

    /// The VMM's process.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Its directory on the host.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The Unix socket that the guest's connections to a port of the host go to.
    pub fn port(&self, port: u32) -> PathBuf {
        port_socket(&self.dir, port).into()
    }

    /// A stream to a TCP port of the guest's loopback interface.
    ///
    /// # Errors
    /// When nothing listens there.
    pub async fn dial(&self, port: u16) -> Result<UnixStream> {
        let stream = self.streams.expect();
        let request = DialPortRequest {
            port: port.into(),
            stream: stream.id(),
            ..Default::default()
        };
        self.agent.dial_port(request).await?;
        let stream = stream.arrival(self.limit).await.context("a stream")?;
        Ok(UnixStream::from_std(stream.into())?)
    }

    /// What the guest's kernel and agent have written.
    pub fn console(&self) -> String {
        fs::read_to_string(self.dir.join("console")).unwrap_or_default()
    }

    /// Waits for a call.
    ///
    /// # Errors
    /// The call's.
    pub fn wait_for<T>(
        &self,
        call: impl Future<Output = Result<T, bulkhead_runtime::error::Error>>,
    ) -> Result<T> {
        let done = self.runtime.block_on(call);
        done.map_err(|error| anyhow::Error::new(error).context("in the guest"))
    }

    /// Waits for anything else of the guest.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Creates a container whose output nobody wants.
    ///
    /// # Errors
    /// The agent's.
    pub fn create(&self, id: &str, spec: oci::Spec) -> Result<CreateContainerReply> {
        self.wait_for(self.agent.create_container(creation(id, spec, None)))
    }

    /// Starts a container.
    ///
    /// # Errors
    /// The agent's.
    pub fn start(&self, id: &str) -> Result<()> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.wait_for(self.agent.start_container(request)).map(drop)
    }

    /// Removes a container; kills it when it runs.
    ///
    /// # Errors
    /// The agent's.
    pub fn delete(&self, id: &str) -> Result<()> {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.wait_for(self.agent.delete_container(request))
            .map(drop)
    }

    /// Runs a container to its end.
    ///
    /// # Errors
    /// When it does not.
    pub fn run(&self, id: &str, spec: oci::Spec) -> Result<(CreateContainerReply, Outcome)> {
        let (reply, running) = self.begin(id, spec, Vec::new())?;
        Ok((reply, self.end(running)?))
    }

    /// Starts a container, whose specification may speak of `mirrors`.
    ///
    /// # Errors
    /// The agent's.
    pub fn begin(
        &self,
        id: &str,
        spec: oci::Spec,
        mirrors: Vec<Mirror>,
    ) -> Result<(CreateContainerReply, Running)> {
        let outputs = [self.streams.expect(), self.streams.expect()];
        let mut request = creation(id, spec, Some(stdio(&outputs)));
        request.mirrors = mirrors;
        let reply = self.wait_for(self.agent.create_container(request))?;
        self.start(id)?;
        let id = id.into();
        Ok((reply, Running { id, outputs }))
    }

    /// Waits for the end of what [`Self::begin`] has begun.
    ///
    /// # Errors
    /// When there is none.
    pub fn end(&self, running: Running) -> Result<Outcome> {
        self.block_on(self.outcome(&running.id, "", running.outputs))
    }

    /// Runs a further process in a container to its end.
    ///
    /// # Errors
    /// When it does not.
    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> Result<(ExecProcessReply, Outcome)> {
        self.block_on(self.exec_async(id, exec_id, process))
    }

    /// Has the agent forget such a process, which has ended.
    ///
    /// # Errors
    /// The agent's.
    pub fn forget(&self, id: &str, exec_id: &str) -> Result<()> {
        let request = ProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.wait_for(self.agent.delete_process(request)).map(drop)
    }

    /// As [`Self::exec`], beside others.
    ///
    /// # Errors
    /// When it does not.
    pub async fn exec_async(
        &self,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> Result<(ExecProcessReply, Outcome)> {
        let outputs = [self.streams.expect(), self.streams.expect()];
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process).into(),
            stdio: Some(stdio(&outputs)).into(),
            ..Default::default()
        };
        let reply = self.agent.exec_process(request).await?;
        Ok((reply, self.outcome(id, exec_id, outputs).await?))
    }

    async fn outcome(&self, id: &str, exec_id: &str, outputs: [Expected; 2]) -> Result<Outcome> {
        let mut read = Vec::new();
        for output in outputs {
            let stream = output.arrival(self.limit).await.context("a stream")?;
            let mut stream = UnixStream::from_std(stream.into())?;
            let mut bytes = Vec::new();
            timeout(self.limit, stream.read_to_end(&mut bytes))
                .await
                .context("the end of a stream")??;
            read.push(bytes);
        }
        let request = WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let exit = timeout(self.limit, self.agent.wait_process(request));
        let exit = exit.await.context("the end of a process")??;
        let stderr = read.pop().unwrap_or_default();
        Ok(Outcome {
            status: exit.exit_status,
            stdout: read.pop().unwrap_or_default(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }
}

fn creation(id: &str, spec: oci::Spec, stdio: Option<Stdio>) -> CreateContainerRequest {
    CreateContainerRequest {
        container_id: id.into(),
        spec: Some(spec).into(),
        stdio: stdio.into(),
        ..Default::default()
    }
}

fn stdio(outputs: &[Expected; 2]) -> Stdio {
    Stdio {
        stdout_stream: outputs[0].id(),
        stderr_stream: outputs[1].id(),
        ..Default::default()
    }
}

/// A bundle's configuration as the runtime translates it, with the directory
/// `root` of the shared one as its root.
///
/// # Errors
/// What the runtime says.
pub fn specification(config: &serde_json::Value, id: &str, root: &str) -> Result<oci::Spec> {
    let spec = parse(config.to_string().as_bytes()).context("parse the configuration")?;
    let mut spec = container(&spec, id, None)?.spec;
    spec.root.mut_or_insert_default().path = format!("{SHARED_MOUNT}/{root}");
    Ok(spec)
}
