// SPDX-License-Identifier: Apache-2.0
//! The agent as a process on this machine, with a root file system of
//! busybox, and the host's side of its protocol.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_agent_protocol::agent_ttrpc::AgentClient;
use bulkhead_agent_protocol::{agent, oci};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use ttrpc::context::{self, Context};

const CGROUP_ROOT: &str = "/sys/fs/cgroup/unified";
const CGROUP_ROOT_PURE: &str = "/sys/fs/cgroup";
/// No single step of a test takes longer, on the slowest machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<UnixStream>>>>;

/// One agent with everything around it; gone when dropped.
pub struct Rig {
    pub directory: tempfile::TempDir,
    pub client: AgentClient,
    agent: Child,
    cgroup: PathBuf,
    waiting: Waiting,
    next_stream: AtomicU64,
}

/// Writes a program, or starts one, while no other test does. A child that is
/// made while a program is being written has it open until it executes its
/// own: the kernel would not run the program then (ETXTBSY).
pub fn alone<T>(work: impl FnOnce() -> T) -> T {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Where this machine has its cgroup v2 hierarchy.
pub fn cgroup_root() -> PathBuf {
    let pure = Path::new(CGROUP_ROOT_PURE);
    if pure.join("cgroup.procs").exists() {
        pure.into()
    } else {
        CGROUP_ROOT.into()
    }
}

impl Rig {
    /// Starts an agent.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts an agent with further arguments.
    pub async fn start_with(arguments: &[&str]) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let directory = tempfile::tempdir().unwrap();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroup_root().join(format!("bulkhead-test-{}-{number}", std::process::id()));
        let rpc = directory.path().join("rpc");
        let streams = directory.path().join("streams");
        let waiting = accept_streams(UnixListener::bind(&streams).unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
        command
            .arg("--test-socket")
            .arg(&rpc)
            .arg("--test-streams")
            .arg(&streams)
            .arg("--test-cgroup")
            .arg(&cgroup)
            .args(arguments);
        // SAFETY: prctl(2) is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let agent = alone(|| command.spawn().unwrap());
        let address = format!("unix://{}", rpc.display());
        let client = timeout(PATIENCE, async {
            loop {
                match ttrpc::r#async::Client::connect(&address).await {
                    Ok(client) => break AgentClient::new(client),
                    Err(_) => sleep(Duration::from_millis(5)).await,
                }
            }
        })
        .await
        .expect("the agent listens");
        Self {
            directory,
            client,
            agent,
            cgroup,
            waiting,
            next_stream: AtomicU64::new(1),
        }
    }

    /// A deadline for one call.
    pub fn context(&self) -> Context {
        context::with_duration(PATIENCE)
    }

    /// The pid of the agent.
    pub fn agent_pid(&self) -> u32 {
        self.agent.id()
    }

    /// The cgroup of a container.
    pub fn cgroup_of(&self, id: &str) -> PathBuf {
        self.cgroup.join("pod").join(id)
    }

    /// A fresh root file system: busybox, users, a few directories.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.directory.path().join(name);
        if root.exists() {
            return root;
        }
        for directory in [
            "bin",
            "dev",
            "etc",
            "proc",
            "root",
            "sys",
            "tmp",
            "home/user",
        ] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        alone(|| fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap());
        for applet in [
            "cat",
            "chmod",
            "dd",
            "echo",
            "env",
            "false",
            "grep",
            "head",
            "hostname",
            "id",
            "kill",
            "ls",
            "mknod",
            "mount",
            "ps",
            "pwd",
            "readlink",
            "seq",
            "setsid",
            "sh",
            "sha256sum",
            "sleep",
            "stat",
            "stty",
            "test",
            "touch",
            "tr",
            "true",
            "tty",
            "ulimit",
            "umount",
            "wc",
            "yes",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            root.join("etc/group"),
            "root:x:0:\nuser:x:1000:\nextra:x:2000:\n",
        )
        .unwrap();
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        root
    }

    /// A specification as containerd's for a plain container.
    pub fn spec(&self, name: &str, args: &[&str]) -> oci::Spec {
        spec(&self.rootfs(name), args)
    }

    /// Announces a stream; the agent's connection arrives at the receiver.
    pub fn stream(&self) -> (u64, oneshot::Receiver<UnixStream>) {
        let id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, sender);
        (id, receiver)
    }

    /// Creates a container whose standard streams are the returned ones.
    pub async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<Streams> {
        self.create_with(id, spec, Vec::new()).await
    }

    /// The same, with copies of directories of the host.
    pub async fn create_with(
        &self,
        id: &str,
        spec: oci::Spec,
        mirrors: Vec<agent::Mirror>,
    ) -> ttrpc::Result<Streams> {
        let terminal = spec.process.terminal;
        let (stdio, pending) = self.streams(terminal);
        let request = agent::CreateContainerRequest {
            container_id: id.into(),
            spec: Some(spec).into(),
            stdio: Some(stdio).into(),
            mirrors,
            ..Default::default()
        };
        let reply = self
            .client
            .create_container(self.context(), &request)
            .await?;
        Ok(pending.arrive(reply.pid).await)
    }

    /// Announces the streams of a process.
    pub fn streams(&self, terminal: bool) -> (agent::Stdio, Pending) {
        let stdin = self.stream();
        let mut stdio = agent::Stdio {
            stdin_stream: stdin.0,
            stdout_stream: stdin.0,
            ..Default::default()
        };
        let mut outputs = Vec::new();
        if !terminal {
            let (stdout, stderr) = (self.stream(), self.stream());
            stdio.stdout_stream = stdout.0;
            stdio.stderr_stream = stderr.0;
            outputs = vec![stdout.1, stderr.1];
        }
        (
            stdio,
            Pending {
                stdin: stdin.1,
                outputs,
            },
        )
    }

    pub async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = agent::StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .start_container(self.context(), &request)
            .await
            .map(drop)
    }

    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> ttrpc::Result<Streams> {
        let (stdio, pending) = self.streams(process.terminal);
        let request = agent::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: Some(process).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let reply = self.client.exec_process(self.context(), &request).await?;
        Ok(pending.arrive(reply.pid).await)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<agent::WaitProcessReply> {
        let request = agent::WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.wait_process(self.context(), &request).await
    }

    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: i32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let request = agent::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client
            .signal_process(self.context(), &request)
            .await
            .map(drop)
    }

    pub fn container(&self, id: &str) -> agent::ContainerRequest {
        agent::ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        }
    }

    pub async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        self.client
            .delete_container(self.context(), &self.container(id))
            .await
            .map(drop)
    }

    /// Creates, starts, feeds nothing, waits, deletes.
    pub async fn run(&self, id: &str, spec: oci::Spec) -> Outcome {
        let streams = self.create(id, spec).await.unwrap();
        self.start_container(id).await.unwrap();
        let outcome = self.outcome(id, "", streams).await;
        self.delete(id).await.unwrap();
        outcome
    }

    /// What a started process does until its end, without input.
    pub async fn outcome(&self, id: &str, exec_id: &str, streams: Streams) -> Outcome {
        let Streams {
            stdin,
            stdout,
            stderr,
            ..
        } = streams;
        drop(stdin);
        let (stdout, stderr, exit) =
            tokio::join!(read_all(stdout), read_all(stderr), self.wait(id, exec_id));
        Outcome {
            status: exit.unwrap().exit_status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Its containers die with it.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        for _ in 0..100 {
            remove_groups(&self.cgroup);
            if !self.cgroup.exists() {
                break;
            }
            let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

/// Streams that the agent has been told to open.
pub struct Pending {
    stdin: oneshot::Receiver<UnixStream>,
    outputs: Vec<oneshot::Receiver<UnixStream>>,
}

impl Pending {
    pub async fn arrive(self, pid: u32) -> Streams {
        let arrived = |stream: oneshot::Receiver<UnixStream>| async {
            timeout(PATIENCE, stream)
                .await
                .expect("the stream in time")
                .expect("the stream")
        };
        let stdin = arrived(self.stdin).await;
        let mut outputs = self.outputs.into_iter();
        Streams {
            pid,
            stdin: Some(stdin),
            stdout: match outputs.next() {
                Some(stream) => Some(arrived(stream).await),
                None => None,
            },
            stderr: match outputs.next() {
                Some(stream) => Some(arrived(stream).await),
                None => None,
            },
        }
    }
}

/// A process's streams. With a terminal `stdin` is both ways.
pub struct Streams {
    pub pid: u32,
    pub stdin: Option<UnixStream>,
    pub stdout: Option<UnixStream>,
    pub stderr: Option<UnixStream>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Standard output of a process that must have succeeded.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!((self.status, self.stderr.as_str()), (0, ""), "{self:?}");
        self.stdout
    }
}

/// Reads a stream to its end.
pub async fn read_all(stream: Option<UnixStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        timeout(PATIENCE, stream.read_to_end(&mut bytes))
            .await
            .expect("the end of the stream")
            .unwrap();
    }
    bytes
}

/// Reads until the text is there; gives all that was read.
pub async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = Vec::new();
    timeout(PATIENCE, async {
        while !String::from_utf8_lossy(&text).contains(wanted) {
            let mut buffer = [0; 1024];
            let count = stream.read(&mut buffer).await.unwrap();
            let so_far = String::from_utf8_lossy(&text).into_owned();
            assert_ne!(count, 0, "ended before {wanted:?}: {so_far:?}");
            text.extend(&buffer[..count]);
        }
    })
    .await
    .unwrap_or_else(|_| panic!("no {wanted:?} in time"));
    String::from_utf8_lossy(&text).into_owned()
}

pub async fn write(stream: &mut UnixStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

fn accept_streams(listener: UnixListener) -> Waiting {
    let waiting = Waiting::default();
    let own = waiting.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let own = own.clone();
            tokio::spawn(async move {
                let Ok(id) = stream.read_u64_le().await else {
                    return;
                };
                if let Some(sender) = own.lock().unwrap().remove(&id) {
                    let _ = sender.send(stream);
                }
            });
        }
    });
    waiting
}

/// The code and the text of an error that must have come.
#[track_caller]
pub fn status<T>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Ok(_) => panic!("no error"),
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().into()),
        Err(other) => panic!("{other}"),
    }
}

pub fn mount(destination: &str, kind: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: kind.into(),
        options: options.iter().map(|option| (*option).into()).collect(),
        ..Default::default()
    }
}

pub fn bind(source: &Path, destination: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        source: source.to_str().unwrap().into(),
        ..mount(destination, "bind", options)
    }
}

/// The capabilities that containerd gives by default.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

pub fn process(args: &[&str]) -> oci::Process {
    let capabilities: Vec<String> = DEFAULT_CAPABILITIES.map(String::from).to_vec();
    oci::Process {
        args: args.iter().map(|arg| (*arg).into()).collect(),
        env: vec!["PATH=/bin:/usr/bin".into()],
        cwd: "/".into(),
        capabilities: Some(oci::Capabilities {
            bounding: capabilities.clone(),
            effective: capabilities.clone(),
            permitted: capabilities,
            ..Default::default()
        })
        .into(),
        no_new_privileges: true,
        ..Default::default()
    }
}

/// As containerd's `ctr run` writes it.
pub fn spec(rootfs: &Path, args: &[&str]) -> oci::Spec {
    let namespaces = ["pid", "ipc", "uts", "mount", "network", "cgroup"];
    let masked = [
        "/proc/acpi",
        "/proc/asound",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/sys/firmware",
        "/proc/scsi",
    ];
    let read_only = [
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    ];
    oci::Spec {
        version: "1.1.0".into(),
        process: Some(process(args)).into(),
        root: Some(oci::Root {
            path: rootfs.to_str().unwrap().into(),
            ..Default::default()
        })
        .into(),
        mounts: vec![
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev",
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
            mount(
                "/dev/pts",
                "devpts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                    "gid=5",
                ],
            ),
            mount(
                "/dev/shm",
                "tmpfs",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "/run",
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
            mount(
                "/sys/fs/cgroup",
                "cgroup",
                &["ro", "nosuid", "noexec", "nodev"],
            ),
        ],
        linux: Some(oci::Linux {
            namespaces: namespaces
                .iter()
                .map(|kind| oci::Namespace {
                    type_: (*kind).into(),
                    ..Default::default()
                })
                .collect(),
            masked_paths: masked.map(String::from).to_vec(),
            readonly_paths: read_only.map(String::from).to_vec(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

/// Drives all futures to their ends.
pub async fn join_all<F: std::future::Future<Output = ()> + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|cx| {
        futures.retain_mut(|future| std::pin::Pin::new(future).poll(cx).is_pending());
        if futures.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
