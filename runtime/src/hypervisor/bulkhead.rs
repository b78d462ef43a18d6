// SPDX-License-Identifier: Apache-2.0
//! The driver of `bulkhead-vmm`: one process a machine, driven over a socket
//! that it inherits (see `bulkhead-vmm-api`).

mod watch;

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_vmm_api::{
    BalloonConfig, Call, Channel, ChannelError, DeviceConfigs, FdIndex, FsCache, FsConfig,
    KernelConfig, MemConfig, MemoryTarget, NetConfig, Outcome, Pages, PlugConfig, PmemConfig,
    Request, Timeline, VmConfig, VsockConfig,
};
use rustix::{
    fs::{fcntl_setfl, OFlags},
    pipe::{pipe_with, PipeFlags},
    process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal},
};
use tokio::{
    io::{unix::AsyncFd, Interest},
    sync::{oneshot, watch as watching},
};

use super::{error::HypervisorError, tail::Tail, Ending, Hypervisor, Machine, NicDevice, Vsock};
use crate::sys;

/// The guest's context id; every guest's is the same, for the sockets are the
/// host's own and not a kernel's.
const GUEST_CID: u32 = 3;

/// How much of the VMM's standard error is kept for the error, in bytes.
const STDERR_KEPT: usize = 2048;

/// A running `bulkhead-vmm`. Dropping it kills the process.
pub struct BulkheadVmm {
    inner: Arc<Inner>,
}

struct Inner {
    pid: u32,
    pidfd: OwnedFd,
    control: AsyncFd<Channel>,
    calls: Mutex<Calls>,
    ending: watching::Sender<Option<Ending>>,
    timeline: Mutex<Timeline>,
}

#[derive(Default)]
struct Calls {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Outcome>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn system(step: &'static str) -> impl Fn(io::Error) -> HypervisorError {
    move |source| HypervisorError::System { step, source }
}

/// Opens the guest kernel of the configuration.
///
/// # Errors
/// [`HypervisorError::File`] with the key and a remedy.
pub fn open_kernel(path: &Path) -> Result<OwnedFd, HypervisorError> {
    open(
        path,
        "hypervisor.kernel",
        "install the guest kernel, or set hypervisor.kernel in the configuration",
    )
}

/// Opens the guest image of the configuration.
///
/// # Errors
/// [`HypervisorError::File`] with the key and a remedy.
pub fn open_image(path: &Path) -> Result<OwnedFd, HypervisorError> {
    open(
        path,
        "hypervisor.image",
        "install the guest image, or set hypervisor.image in the configuration",
    )
}

fn open(path: &Path, key: &'static str, remedy: &'static str) -> Result<OwnedFd, HypervisorError> {
    let file = |source| HypervisorError::File {
        key,
        path: path.into(),
        remedy,
        source,
    };
    let opened = File::open(path).map_err(file)?;
    let meta = opened.metadata().map_err(file)?;
    if !meta.is_file() {
        return Err(file(io::Error::other("not a regular file")));
    }
    Ok(opened.into())
}

impl BulkheadVmm {
    /// Starts the process. It does nothing until it is told to boot.
    ///
    /// Call it on the runtime's own thread: the process dies with the thread
    /// that started it.
    ///
    /// # Errors
    /// When the binary cannot be run or KVM cannot be opened.
    pub fn spawn(binary: &Path, own_network: bool) -> Result<Self, HypervisorError> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(HypervisorError::Kvm)?;
        let (ours, theirs) = Channel::pair().map_err(system("make the control socket"))?;
        let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(system("make a pipe"))?;
        let mut command = Command::new(binary);
        if own_network {
            // Made here, for hooks to find before the machine is.
            command.args(["--network", "kept"]);
        }
        command
            .arg("--control-fd")
            .arg(std::os::fd::AsRawFd::as_raw_fd(&theirs).to_string())
            .current_dir("/")
            .env_clear()
            // Signals of a terminal are for the front end.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(their_stderr);
        sys::inherit_and_die_with_parent(&mut command, theirs.as_fd(), own_network);
        let spawned = sys::spawn_apart(&mut command);
        let child = spawned.map_err(|source| HypervisorError::Spawn {
            path: binary.into(),
            source,
        })?;
        // Its copies are the process's now: their end is to be noticed.
        drop(theirs);
        drop(command);

        let pid = child.id();
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.expect("a child has a positive process id");
        let pidfd = pidfd_open(raw, PidfdFlags::NONBLOCK)
            .map_err(io::Error::from)
            .map_err(system("watch the VMM"))?;
        let watched = pidfd
            .try_clone()
            .and_then(|fd| sys::watch(fd, Interest::READABLE).map_err(|(_, error)| error))
            .map_err(system("watch the VMM"))?;
        fcntl_setfl(&ours, OFlags::NONBLOCK)
            .map_err(io::Error::from)
            .map_err(system("set up the control socket"))?;
        let control = sys::watch(ours, Interest::READABLE | Interest::WRITABLE)
            .map_err(|(_, error)| system("watch the control socket")(error))?;
        let (ending, _) = watching::channel(None);
        let inner = Arc::new(Inner {
            pid,
            pidfd,
            control,
            calls: Mutex::default(),
            ending,
            timeline: Mutex::default(),
        });
        let tail = Tail::new(STDERR_KEPT);
        let said = tokio::spawn(watch::log_stderr(stderr, tail.clone(), pid));
        tokio::spawn(watch::watch(inner.clone(), child, watched, tail, said));
        Ok(Self { inner })
    }
}

impl Drop for BulkheadVmm {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Inner {
    /// Sends a request; its outcome arrives at the receiver.
    async fn send(
        &self,
        call: Call,
        fds: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Outcome>, HypervisorError> {
        let (outcome, arrives) = oneshot::channel();
        let id = {
            let mut calls = lock(&self.calls);
            calls.last += 1;
            let id = calls.last;
            calls.waiting.insert(id, outcome);
            id
        };
        let request = Request { id, call };
        loop {
            match self.control.get_ref().send(&request, fds) {
                Ok(()) => return Ok(arrives),
                Err(error) if error.would_block() => {
                    let ready = self.control.writable().await;
                    ready
                        .map_err(system("wait for the control socket"))?
                        .clear_ready();
                }
                // The process is about to be seen to have ended.
                Err(ChannelError::Closed) => return Ok(arrives),
                Err(error) => {
                    lock(&self.calls).waiting.remove(&id);
                    return Err(HypervisorError::Control(error));
                }
            }
        }
    }

    async fn done(
        &self,
        call: &'static str,
        arrives: oneshot::Receiver<Outcome>,
    ) -> Result<(), HypervisorError> {
        match arrives.await {
            Ok(Outcome::Done | Outcome::Status(_) | Outcome::Plugged(_)) => Ok(()),
            Ok(Outcome::Failed(failure)) => Err(HypervisorError::Refused { call, failure }),
            Err(_) => Err(HypervisorError::Ended(self.ended().await)),
        }
    }

    async fn ended(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        let found = match ending.wait_for(Option::is_some).await {
            Ok(ending) => ending.clone(),
            Err(_) => None,
        };
        found.expect("the watch holds an ending, and its sender is in self")
    }
}

#[async_trait]
impl Hypervisor for BulkheadVmm {
    fn pid(&self) -> u32 {
        self.inner.pid
    }

    async fn boot(&self, machine: Machine) -> Result<(), HypervisorError> {
        let (config, fds) = describe(&machine);
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
        // Back to back: one wake-up for both answers.
        let configured = self
            .inner
            .send(Call::Configure(Box::new(config)), &fds)
            .await?;
        let booted = self.inner.send(Call::Boot, &[]).await?;
        drop(machine);
        self.inner.done("configure", configured).await?;
        self.inner.done("boot", booted).await
    }

    async fn plug_nic(&self, nic: NicDevice) -> Result<(), HypervisorError> {
        let mut fds = Vec::new();
        let config = net_config(&nic, &mut |fd| {
            fds.push(fd.as_fd());
            (fds.len() - 1) as FdIndex
        });
        let call = Call::Plug(Box::new(PlugConfig::Net(config)));
        let answer = self.inner.send(call, &fds).await?;
        // The VMM has its own: guest memory is there as long as somebody has one.
        drop(nic);
        self.inner.done("plug", answer).await
    }

    async fn set_extra_memory(&self, mib: u32) -> Result<(), HypervisorError> {
        let call = Call::Memory(MemoryTarget { mib });
        let answer = self.inner.send(call, &[]).await?;
        self.inner.done("memory", answer).await
    }

    async fn extra_memory(&self) -> Result<u32, HypervisorError> {
        let answer = self.inner.send(Call::Status, &[]).await?;
        match answer.await {
            Ok(Outcome::Status(status)) => Ok(status.memory.map_or(0, |memory| memory.plugged_mib)),
            Ok(Outcome::Failed(failure)) => Err(HypervisorError::Refused {
                call: "status",
                failure,
            }),
            // No other outcome answers this call.
            Ok(Outcome::Done | Outcome::Plugged(_)) => Ok(0),
            Err(_) => Err(HypervisorError::Ended(self.inner.ended().await)),
        }
    }

    fn ending(&self) -> watching::Receiver<Option<Ending>> {
        self.inner.ending.subscribe()
    }

    fn timeline(&self) -> Timeline {
        *lock(&self.inner.timeline)
    }

    async fn shutdown(&self, patience: Duration) {
        let orderly = async {
            // Whatever it answers, what counts is its end.
            if self.inner.send(Call::Shutdown, &[]).await.is_ok() {
                self.inner.ended().await;
            }
        };
        if tokio::time::timeout(patience, orderly).await.is_err() {
            tracing::warn!(pid = self.inner.pid, "VMM does not stop: killed");
        }
        self.kill();
        self.inner.ended().await;
    }

    fn kill(&self) {
        // Gone already: nothing to do. The pid cannot mean another process.
        let _ = pidfd_send_signal(&self.inner.pidfd, Signal::KILL);
    }
}

fn net_config<'n>(nic: &'n NicDevice, pass: &mut dyn FnMut(&'n OwnedFd) -> FdIndex) -> NetConfig {
    NetConfig {
        id: nic.id.clone(),
        tap: pass(&nic.tap),
        mac: nic.mac,
        mtu: Some(nic.mtu),
        vhost: nic.vhost.as_ref().map(pass),
        ..NetConfig::default()
    }
}

/// The machine as the VMM's message, with the descriptors in their order.
fn describe(machine: &Machine) -> (VmConfig, Vec<&OwnedFd>) {
    let mut fds: Vec<&OwnedFd> = Vec::new();
    let mut pass = |fd| -> FdIndex {
        fds.push(fd);
        // A machine has a few descriptors; the channel refuses more than 64.
        (fds.len() - 1) as FdIndex
    };
    let Vsock {
        listener,
        path,
        ready_port,
    } = &machine.vsock;
    let config = VmConfig {
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        pages: machine.pages,
        merge_group: machine.merge_group.as_ref().map(&mut pass),
        kernel: KernelConfig {
            image: pass(&machine.kernel),
            cmdline: machine.cmdline.clone(),
            initrd: None,
        },
        serial: Some(pass(&machine.console)),
        devices: DeviceConfigs {
            pmem: vec![PmemConfig {
                id: "image".into(),
                file: pass(&machine.image),
                read_only: true,
            }],
            fs: vec![FsConfig {
                tag: bulkhead_agent_protocol::SHARED_TAG.into(),
                directory: pass(&machine.shared),
                cache: FsCache::Auto,
                dax_mib: machine.dax_mib,
                host_locks: machine.host_locks,
            }],
            vsock: Some(VsockConfig {
                cid: GUEST_CID,
                listener: Some(pass(listener)),
                uds_path: path.to_string_lossy().into_owned(),
                ready_port: Some(*ready_port),
            }),
            net: machine
                .nics
                .iter()
                .map(|nic| net_config(nic, &mut pass))
                .collect(),
            // Nothing of reserved pages is given back.
            balloon: (machine.free_page_reporting && machine.pages != Pages::Huge)
                .then(BalloonConfig::default),
            mem: (machine.extra_memory_mib > 0).then_some(MemConfig {
                max_mib: machine.extra_memory_mib,
            }),
            ..DeviceConfigs::default()
        },
    };
    (config, fds)
}
