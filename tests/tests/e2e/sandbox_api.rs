// SPDX-License-Identifier: Apache-2.0
//! containerd's sandbox API, called as containerd 2 calls it, at a shim of its
//! own: so it is seen to work beside any containerd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_shim_protocol::metrics::Metrics;
use bulkhead_shim_protocol::sandbox::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
    SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
    WaitSandboxRequest,
};
use bulkhead_shim_protocol::sandbox_ttrpc::SandboxClient;
use bulkhead_shim_protocol::shim::{CreateTaskRequest, DeleteRequest, StartRequest, WaitRequest};
use bulkhead_shim_protocol::shim_v3_ttrpc::TaskClient;
use bulkhead_shim_protocol::Named as _;
use bulkhead_tests::proc;
use protobuf::Message as _;
use serde_json::json;
use tokio::net::UnixStream;
use ttrpc::asynchronous::{transport::Socket, Client};
use ttrpc::{context, Code};

use crate::context::{same, until, Context, LIMIT};
use crate::host::rootfs;
use crate::runner::{tests, Test};
use crate::vmm::runtime;

pub const TESTS: &[Test] = tests![a_sandbox_by_the_sandbox_api];

/// Namespace of containerd's, and name of the sandbox and of its network.
const NAMESPACE: &str = "bh-api";
const SANDBOX: &str = "bh-api-pod";

/// How long the shim may take to answer, on a busy machine.
const CALL: Duration = Duration::from_secs(120);

/// What a kill leaves as a status.
const KILLED: u32 = 128 + 9;

/// Of one call to a shim.
pub fn limit() -> context::Context {
    context::with_duration(CALL)
}

/// A network namespace, gone when dropped.
struct Netns;

impl Netns {
    fn make() -> Result<Self> {
        proc::run(Command::new("ip").args(["netns", "add", SANDBOX]), LIMIT)?.ok()?;
        Ok(Self)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = proc::run(Command::new("ip").args(["netns", "del", SANDBOX]), LIMIT);
    }
}

/// A directory that is made empty.
pub fn fresh(path: PathBuf) -> Result<PathBuf> {
    if path.exists() {
        fs::remove_dir_all(&path)?;
    }
    fs::create_dir_all(&path)?;
    Ok(path)
}

/// The shim that `start` leaves behind: where it listens.
pub fn start_shim(context: &Context, namespace: &str, id: &str, bundle: &Path) -> Result<PathBuf> {
    let mut start = Command::new(context.products.program("containerd-shim-bulkhead-v2"));
    start
        .args(["-namespace", namespace, "-id", id])
        .args(["-address", "/run/bh-api/none.sock", "start"])
        .env("BULKHEAD_CONFIG", context.dir.join("config.toml"))
        .current_dir(bundle);
    let address = proc::run(&mut start, LIMIT)?.ok()?.out();
    // A line, or what bootstrap says of version 3 on.
    let address = match address.strip_prefix('{') {
        Some(_) => {
            let said: serde_json::Value = serde_json::from_str(&address)?;
            said["address"].as_str().context("an address")?.to_owned()
        }
        None => address,
    };
    let path = address.strip_prefix("unix://").context("a Unix socket")?;
    Ok(path.into())
}

fn code(error: &ttrpc::Error) -> Option<Code> {
    match error {
        ttrpc::Error::RpcStatus(status) => Some(status.code()),
        _ => None,
    }
}

async fn figures(client: &SandboxClient) -> Result<Metrics> {
    let request = SandboxMetricsRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    let answer = client.sandbox_metrics(limit(), &request).await?;
    same(answer.metrics.id.as_str(), SANDBOX)?;
    let data = &answer.metrics.data;
    same(data.type_url.as_str(), Metrics::TYPE_URL)?;
    Ok(Metrics::parse_from_bytes(&data.value)?)
}

/// A bundle whose program says a word and stays.
fn container_bundle(context: &Context) -> Result<PathBuf> {
    let bundle = fresh(context.dir.join("api-container"))?;
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "cwd": "/",
            "args": ["/bin/sh", "-c", "echo up; exec /bin/busybox sleep 1000"],
            "env": ["PATH=/bin"],
        },
        "root": { "path": rootfs(context)? },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": SANDBOX,
        },
        "linux": {
            "namespaces": [{ "type": "pid" }, { "type": "mount" }],
            "cgroupsPath": "/bh-api/one",
        },
    });
    fs::write(bundle.join("config.json"), spec.to_string())?;
    Ok(bundle)
}

async fn before_it_starts(client: &SandboxClient, bundle: &Path) -> Result<()> {
    let ping = PingRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    match client.ping_sandbox(limit(), &ping).await {
        Err(error) if code(&error) == Some(Code::NOT_FOUND) => {}
        other => bail!("a sandbox that has not been created answers {other:?}"),
    }
    let create = CreateSandboxRequest {
        sandbox_id: SANDBOX.into(),
        bundle_path: bundle.to_string_lossy().into_owned(),
        netns_path: format!("/run/netns/{SANDBOX}"),
        ..Default::default()
    };
    client.create_sandbox(limit(), &create).await?;
    match client.create_sandbox(limit(), &create).await {
        Err(error) if code(&error) == Some(Code::ALREADY_EXISTS) => {}
        other => bail!("creating it again is answered by {other:?}"),
    }
    client.ping_sandbox(limit(), &ping).await?;
    let platform = PlatformRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    let answer = client.platform(limit(), &platform).await?;
    same(
        (
            answer.platform.os.as_str(),
            answer.platform.architecture.as_str(),
        ),
        ("linux", "amd64"),
    )
}

async fn state(client: &SandboxClient) -> Result<String> {
    let request = SandboxStatusRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    Ok(client.sandbox_status(limit(), &request).await?.state)
}

async fn lives_and_ends(context: &Context, socket: &Path, bundle: &Path) -> Result<()> {
    let stream = UnixStream::connect(socket).await?;
    let client = Client::new(Socket::new(stream));
    let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
    before_it_starts(&sandbox, bundle).await?;
    let start = StartSandboxRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    let started = sandbox.start_sandbox(limit(), &start).await?;
    ensure!(started.pid > 1, "process {}", started.pid);
    same(state(&sandbox).await?.as_str(), "SANDBOX_READY")?;
    let empty = figures(&sandbox).await?;
    same(empty.pids.current, 0)?;

    let out = context.dir.join("api-container.out");
    let create = CreateTaskRequest {
        id: "one".into(),
        bundle: container_bundle(context)?.to_string_lossy().into_owned(),
        stdout: format!("file://{}", out.display()),
        ..Default::default()
    };
    task.create(limit(), &create).await?;
    let start = StartRequest {
        id: "one".into(),
        ..Default::default()
    };
    task.start(limit(), &start).await?;
    until(LIMIT, "the container's word", || {
        Ok(fs::read_to_string(&out).unwrap_or_default() == "up\n")
    })?;
    let busy = figures(&sandbox).await?;
    ensure!(busy.pids.current >= 1, "{busy:?}");
    ensure!(busy.memory.usage > 0 && busy.cpu.usage_usec > 0, "{busy:?}");

    let stop = StopSandboxRequest {
        sandbox_id: SANDBOX.into(),
        timeout_secs: 1,
        ..Default::default()
    };
    sandbox.stop_sandbox(limit(), &stop).await?;
    let wait = WaitSandboxRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    same(sandbox.wait_sandbox(limit(), &wait).await?.exit_status, 0)?;
    same(state(&sandbox).await?.as_str(), "SANDBOX_NOTREADY")?;
    // How its container ended can still be asked.
    let wait = WaitRequest {
        id: "one".into(),
        ..Default::default()
    };
    let status = task.wait(limit(), &wait).await?.exit_status;
    ensure!([KILLED, 128 + 15].contains(&status), "status {status}");
    let delete = DeleteRequest {
        id: "one".into(),
        ..Default::default()
    };
    same(task.delete(limit(), &delete).await?.exit_status, status)?;
    let shutdown = ShutdownSandboxRequest {
        sandbox_id: SANDBOX.into(),
        ..Default::default()
    };
    sandbox.shutdown_sandbox(limit(), &shutdown).await?;
    Ok(())
}

fn a_sandbox_by_the_sandbox_api(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    // What stays: a directory, and the mount that the first namespace makes.
    rootfs(context)?;
    drop(Netns::make()?);
    let before = context.listing()?;
    let bundle = fresh(context.dir.join("api-sandbox"))?;
    // What the shim writes its log to, where there is one.
    let log = bundle.join("log");
    fs::write(&log, "")?;
    let netns = Netns::make()?;
    let socket = start_shim(context, NAMESPACE, SANDBOX, &bundle)?;
    let lived = runtime()?.block_on(lives_and_ends(context, &socket, &bundle));
    lived
        .and_then(|()| until(LIMIT, "the shim's end", || Ok(!socket.exists())))
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let pid: u32 = fs::read_to_string(bundle.join("shim.pid"))?
        .trim()
        .parse()?;
    until(LIMIT, "the shim's process to end", || {
        Ok(!Path::new(&format!("/proc/{pid}")).exists())
    })?;
    drop(netns);
    context.nothing_left(&before, LIMIT)
}
