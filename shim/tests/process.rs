// SPDX-License-Identifier: Apache-2.0
//! The binary as containerd runs it: `start` with its input and its reply, the
//! shim that it leaves behind, what that answers, its end, and `delete`. No
//! virtual machine is needed for any of this.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use bulkhead_shim_protocol::{
    bootstrap::{BootstrapParams, BootstrapResult},
    shim::{
        CheckpointTaskRequest, ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse,
        KillRequest, PidsRequest, ShutdownRequest, StateRequest,
    },
    shim_ttrpc, shim_v3_ttrpc,
    types::RuntimeInfo,
};
use protobuf::Message;
use rustix::fs::{mkfifoat, Mode, OFlags, CWD};
use ttrpc::{asynchronous::Client, context, Code};

const LIMIT: Duration = Duration::from_secs(20);

/// A bundle and everything else below one directory. What is left of a shim
/// is killed with it.
struct Host {
    root: tempfile::TempDir,
    pids: Vec<u32>,
    /// containerd's end of the log.
    log: File,
}

impl Host {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let bundle = root.path().join("bundle");
        fs::create_dir(&bundle).unwrap();
        let fifo = bundle.join("log");
        mkfifoat(CWD, &fifo, Mode::from_raw_mode(0o600)).unwrap();
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = rustix::fs::open(&fifo, flags, Mode::empty())
            .unwrap()
            .into();
        let config = format!(
            "[hypervisor]\nkernel = {:?}\n[runtime]\nstate_dir = {:?}\n",
            root.path().join("no-kernel"),
            root.path().join("state")
        );
        fs::write(root.path().join("config.toml"), config).unwrap();
        Self {
            root,
            pids: Vec::new(),
            log,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn bundle(&self) -> PathBuf {
        self.path("bundle")
    }

    fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"))
            .args(["-namespace", "ns", "-id", "c1", "-publish-binary", "/x"])
            .arg("-address")
            .arg(self.path("sock"))
            .args(arguments)
            .current_dir(self.bundle())
            .env("BULKHEAD_CONFIG", self.path("config.toml"))
            .env_remove("TTRPC_ADDRESS")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        // Returns only once nobody holds its standard output any more.
        child.wait_with_output().unwrap()
    }

    /// `start` as containerd 2.3 runs it; returns the address.
    fn start(&mut self) -> String {
        let input = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            containerd_grpc_address: self.path("sock").to_str().unwrap().into(),
            socket_dir: Some(self.path("s").to_str().unwrap().into()),
            ..Default::default()
        };
        let output = self.run(&["start"], &input.write_to_bytes().unwrap());
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.is_empty(), "{text}");
        let reply = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!((reply.version, reply.protocol.as_str()), (3, "ttrpc"));
        let written = fs::read_to_string(self.bundle().join("address")).unwrap();
        assert_eq!(written, reply.address);
        let pid = fs::read_to_string(self.bundle().join("shim.pid")).unwrap();
        self.pids.push(pid.parse().unwrap());
        reply.address
    }

    fn shim(&self) -> u32 {
        *self.pids.last().unwrap()
    }

    fn wait_for_end(&self, pid: u32) {
        let begin = Instant::now();
        while is_shim(pid) {
            assert!(begin.elapsed() < LIMIT, "the shim does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("s")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn log(&mut self) -> String {
        let mut bytes = vec![0; 1 << 16];
        let length = self.log.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

/// Whether it runs: a zombie has no command line.
fn is_shim(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains("containerd-shim-bulkhead-v2")
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.pids.iter().filter(|pid| is_shim(**pid)) {
            let raw = i32::try_from(*pid).ok();
            if let Some(pid) = raw.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

async fn client(address: &str) -> shim_ttrpc::TaskClient {
    shim_ttrpc::TaskClient::new(Client::connect(address).await.unwrap())
}

fn limit() -> context::Context {
    context::with_timeout(i64::try_from(LIMIT.as_nanos()).unwrap())
}

fn status<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> (Code, String) {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code.unwrap(), status.message),
        other => panic!("no status: {other:?}"),
    }
}

fn create(bundle: &Path) -> CreateTaskRequest {
    CreateTaskRequest {
        id: "c1".into(),
        bundle: bundle.to_str().unwrap().into(),
        ..Default::default()
    }
}

fn named<T: Default>(set: impl FnOnce(&mut T)) -> T {
    let mut request = T::default();
    set(&mut request);
    request
}

async fn shut_down(client: &shim_ttrpc::TaskClient) {
    let request = named::<ShutdownRequest>(|r| r.id = "c1".into());
    client.shutdown(limit(), &request).await.unwrap();
}

#[tokio::test]
async fn a_shim_is_started_found_called_and_ended() {
    let mut host = Host::new();
    let address = host.start();
    let pid = host.shim();
    assert_eq!(host.sockets().len(), 1, "the socket alone");
    // The same one for the next container of the pod.
    assert_eq!(host.start(), address);
    assert_eq!(host.shim(), pid);

    let v2 = client(&address).await;
    let v3 = shim_v3_ttrpc::TaskClient::new(Client::connect(&address).await.unwrap());
    let connect = named::<ConnectRequest>(|r| r.id = "c1".into());
    let connected = v2.connect(limit(), &connect).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (pid, 0));
    // In a session of its own: before it answers, not before `start` returns.
    let raw = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap());
    assert_eq!(rustix::process::getsid(raw).unwrap(), raw.unwrap());
    let connected = v3.connect(limit(), &connect).await.unwrap();
    assert_eq!(connected.shim_pid, pid);

    let state = named::<StateRequest>(|r| r.id = "c1".into());
    let (code, text) = status(v2.state(limit(), &state).await);
    assert_eq!(
        (code, text.as_str()),
        (Code::NOT_FOUND, "container \"c1\" not found")
    );
    let (code, _) = status(v3.state(limit(), &state).await);
    assert_eq!(code, Code::NOT_FOUND);
    let kill = named::<KillRequest>(|r| r.id = "c1".into());
    assert_eq!(status(v2.kill(limit(), &kill).await).0, Code::NOT_FOUND);
    let pids = named::<PidsRequest>(|r| r.id = "c1".into());
    assert_eq!(status(v2.pids(limit(), &pids).await).0, Code::NOT_FOUND);
    let delete = named::<DeleteRequest>(|r| r.id = "c1".into());
    assert_eq!(status(v2.delete(limit(), &delete).await).0, Code::NOT_FOUND);
    let checkpoint = CheckpointTaskRequest::default();
    let (code, _) = status(v3.checkpoint(limit(), &checkpoint).await);
    assert_eq!(code, Code::UNIMPLEMENTED);

    shut_down(&v2).await;
    // Before the answer, so that a pod of this name can be started at once.
    assert_eq!(host.sockets(), [""; 0].map(PathBuf::from));
    host.wait_for_end(pid);
}

#[tokio::test]
async fn a_container_that_cannot_be_created_tells_why_and_leaves_nothing() {
    let mut host = Host::new();
    let address = host.start();
    let pid = host.shim();
    let client = client(&address).await;
    let bundle = host.bundle();

    let (code, text) = status(client.create(limit(), &create(&bundle)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(
        text.contains("config.json") && text.contains("No such file"),
        "{text}"
    );

    fs::write(bundle.join("config.json"), "{ \"ociVersion\": ").unwrap();
    let (code, text) = status(client.create(limit(), &create(&bundle)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("EOF while parsing"), "{text}");

    let spec = r#"{"ociVersion":"1.0.2","process":{"args":["true"],"cwd":"/","user":{"uid":0,"gid":0}},"root":{"path":"rootfs"},"linux":{}}"#;
    fs::write(bundle.join("config.json"), spec).unwrap();
    let (code, text) = status(client.create(limit(), &create(&bundle)).await);
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("hostNetwork"), "{text}");

    let own = r#""linux":{"namespaces":[{"type":"network"}]}"#;
    let spec = spec.replace(r#""linux":{}"#, own);
    fs::write(bundle.join("config.json"), spec).unwrap();
    let (_, text) = status(client.create(limit(), &create(&bundle)).await);
    assert!(
        text.contains("no-kernel") && text.contains("hypervisor.kernel"),
        "{text}"
    );

    let mut request = create(&bundle);
    request.stdout = "weird:///x".into();
    let (code, text) = status(client.create(limit(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("\"weird\""), "{text}");

    let mut request = create(&bundle);
    request.checkpoint = "/x".into();
    let (code, _) = status(client.create(limit(), &request).await);
    assert_eq!(code, Code::UNIMPLEMENTED);

    fs::write(host.path("config.toml"), "[runtime]\nstate_dri = \"/x\"\n").unwrap();
    let (code, text) = status(client.create(limit(), &create(&bundle)).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(
        text.contains("did you mean \"runtime.state_dir\""),
        "{text}"
    );

    let left = fs::read_dir(host.path("state/s")).map_or(0, Iterator::count);
    assert_eq!(left, 0);
    shut_down(&client).await;
    host.wait_for_end(pid);
    let log = host.log();
    assert!(log.contains("level=info msg=\"refused\""), "{log}");
    assert!(log.contains("namespace=ns sandbox=c1"), "{log}");
}

#[tokio::test]
async fn delete_of_a_shim_that_was_killed() {
    let mut host = Host::new();
    host.start();
    let raw = rustix::process::Pid::from_raw(i32::try_from(host.shim()).unwrap());
    rustix::process::kill_process(raw.unwrap(), rustix::process::Signal::KILL).unwrap();
    host.wait_for_end(host.shim());
    let bundle = host.bundle();
    for _ in 0..2 {
        let output = host.run(&["-bundle", bundle.to_str().unwrap(), "delete"], b"");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        let reply = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(reply.exit_status, 137);
        assert!(reply.exited_at.seconds > 1_700_000_000);
        assert_eq!(host.sockets().len(), 0);
    }
    // And the name can be used again.
    let address = host.start();
    shut_down(&client(&address).await).await;
    host.wait_for_end(host.shim());
}

#[tokio::test]
async fn delete_of_a_shim_that_lives_ends_it() {
    let mut host = Host::new();
    host.start();
    let bundle = host.bundle();
    let output = host.run(&["-bundle", bundle.to_str().unwrap(), "delete"], b"");
    assert!(output.status.success());
    host.wait_for_end(host.shim());
    assert_eq!(host.sockets().len(), 0);
}

#[tokio::test]
async fn delete_of_a_shim_that_hangs_kills_it() {
    let mut host = Host::new();
    host.start();
    let raw = rustix::process::Pid::from_raw(i32::try_from(host.shim()).unwrap());
    rustix::process::kill_process(raw.unwrap(), rustix::process::Signal::STOP).unwrap();
    let begin = Instant::now();
    let output = host.run(&["delete"], b"");
    assert!(output.status.success());
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    host.wait_for_end(host.shim());
    assert_eq!(host.sockets().len(), 0);
}

#[tokio::test]
async fn a_shim_that_is_terminated_leaves_nothing() {
    let mut host = Host::new();
    let address = host.start();
    // Answers, so it has got as far as watching signals.
    let request = ConnectRequest::default();
    let client = client(&address).await;
    client.connect(limit(), &request).await.unwrap();
    let raw = rustix::process::Pid::from_raw(i32::try_from(host.shim()).unwrap());
    rustix::process::kill_process(raw.unwrap(), rustix::process::Signal::TERM).unwrap();
    host.wait_for_end(host.shim());
    assert_eq!(host.sockets().len(), 0);
}

#[test]
fn what_goes_wrong_goes_to_standard_error() {
    let host = Host::new();
    for (arguments, input, text) in [
        (&["-nope", "x", "start"][..], &b""[..], "-nope"),
        (&["start"][..], &b"\xff\xff"[..], "standard input"),
        (&["serve"][..], &b""[..], "not a listening socket"),
    ] {
        let output = host.run(arguments, input);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{said}"
        );
        assert!(said.contains(text), "{said}");
    }
}

#[test]
fn information_and_version() {
    let host = Host::new();
    let output = host.run(&["-info"], b"");
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.bulkhead.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    let output = host.run(&["-v"], b"");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
}
