// SPDX-License-Identifier: Apache-2.0
//! The emulated machine: a QEMU that cannot outlive its owner.
//!
//! QEMU is started by a thread of its own that stays until QEMU ends, because
//! the parent-death signal follows the thread and not the process. Nothing is
//! left in the file system: the initramfs is an anonymous file, the console
//! and QEMU's messages are pipes, the port is a socket pair.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitid, Id, WaitPidFlag};
use nix::unistd::Pid;

use super::error::{errno_step, io_step, BoxError};
use super::kernel::Kernel;
use super::proto::PORT_NAME;
use super::tsc;
use crate::sys;

/// Bytes of console and messages that are kept.
const TAIL: usize = 32 << 10;

/// QEMU's SVM changes a processor's pending interrupts without its lock, so
/// that now and then one is lost. The next one makes up for it; but a machine
/// that has stopped its tick and waits for the lost one waits for ever. So the
/// tick never stops. In virtual time one thread does everything and none is
/// lost.
const PERIODIC_TICK: &str = " nohz=off highres=off";

/// The machine to build.
#[derive(Clone, Debug)]
pub struct Machine {
    /// What it boots.
    pub kernel: Kernel,
    /// The initramfs.
    pub initramfs: Vec<u8>,
    /// Disk image with hot files.
    pub hot: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Processors.
    pub cpus: u32,
    /// One processor whose clock counts instructions, for measurements.
    pub virtual_time: bool,
    /// Additional words for the kernel's command line.
    pub kernel_params: String,
}

impl Machine {
    fn arguments(&self, initrd: i32, port: i32) -> Vec<String> {
        let mut append = "console=ttyS0 quiet reboot=t panic=-1 mitigations=off \
             kvm.nx_huge_pages=never cryptomgr.notests random.trust_cpu=on"
            .to_owned();
        if !self.virtual_time {
            append.push_str(PERIODIC_TICK);
            // Nor is it to be doubted later, by a watchdog that is late itself.
            append.push_str(&format!(" tsc=reliable tsc_early_khz={}", tsc::khz()));
        }
        if !self.kernel_params.is_empty() {
            append.push(' ');
            append.push_str(&self.kernel_params);
        }
        let (machine, accel) = if self.virtual_time {
            ("pc", "tcg,thread=single")
        } else {
            ("q35", "tcg,thread=multi,tb-size=512")
        };
        let cpus = if self.virtual_time { 1 } else { self.cpus };
        let mut args: Vec<String> = [
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
            "-M",
            machine,
            "-accel",
            accel,
            "-cpu",
            "EPYC,+svm,+npt",
            "-smp",
            &cpus.to_string(),
            "-m",
            &format!("{}M", self.memory_mib),
            "-kernel",
            &self.kernel.image.to_string_lossy(),
            "-initrd",
            &format!("/proc/self/fd/{initrd}"),
            "-append",
            &append,
            "-fsdev",
            "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device",
            "virtio-9p-pci,fsdev=host,mount_tag=host",
            "-chardev",
            &format!("socket,id=port,fd={port}"),
            "-device",
            "virtio-serial-pci,max_ports=2",
            "-device",
            &format!("virtserialport,chardev=port,name={PORT_NAME}"),
        ]
        .map(str::to_owned)
        .to_vec();
        if self.virtual_time {
            args.extend(["-icount".to_owned(), "shift=1,sleep=off".to_owned()]);
        }
        if let Some(hot) = &self.hot {
            // QEMU doubles commas inside option values.
            let file = hot.to_string_lossy().replace(',', ",,");
            args.extend([
                "-drive".to_owned(),
                format!("if=none,id=hot,format=raw,readonly=on,file={file}"),
                "-device".to_owned(),
                "virtio-blk-pci,drive=hot".to_owned(),
            ]);
        }
        args
    }

    /// Starts it. The stream is the owner's end of the port.
    ///
    /// # Errors
    /// When QEMU cannot be executed or descriptors cannot be made.
    pub fn start(self) -> Result<(Qemu, UnixStream), BoxError> {
        let mut initrd = File::from(
            memfd_create(c"bulkhead-box-initramfs", MFdFlags::MFD_CLOEXEC)
                .map_err(errno_step("make an anonymous file"))?,
        );
        initrd
            .write_all(&self.initramfs)
            .map_err(io_step("write the initramfs"))?;
        let (ours, theirs) = UnixStream::pair().map_err(io_step("make a socket pair"))?;
        let theirs = OwnedFd::from(theirs);
        let args = self.arguments(initrd.as_raw_fd(), theirs.as_raw_fd());
        let keep = vec![initrd.as_raw_fd(), theirs.as_raw_fd()];

        let shared = Arc::new(Shared::default());
        let (tell, told) = std::sync::mpsc::channel();
        let owner = Arc::clone(&shared);
        thread::Builder::new()
            .name("box-owner".into())
            .spawn(move || {
                let mut command = Command::new("qemu-system-x86_64");
                command
                    .args(args)
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                sys::tie_to_this_thread(&mut command, keep);
                let spawned = command.spawn();
                drop((initrd, theirs));
                let mut child = match spawned {
                    Ok(child) => child,
                    Err(error) => {
                        // The receiver waits for exactly one message.
                        let _ = tell.send(Err(error));
                        return;
                    }
                };
                let pid = Pid::from_raw(child.id() as i32);
                owner.lock().pid = Some(pid);
                let readers = [
                    child.stdout.take().map(|out| owner.follow(out)),
                    child.stderr.take().map(|err| owner.follow(err)),
                ];
                let _ = tell.send(Ok(()));
                // Wait first and reap under the lock, so that `stop` never
                // signals a number that belongs to somebody else by then.
                while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
                    == Err(nix::Error::EINTR)
                {}
                {
                    let mut state = owner.lock();
                    state.pid = None;
                    state.status = child.wait().ok().map(|s| s.to_string());
                }
                for reader in readers.into_iter().flatten() {
                    let _ = reader.join();
                }
                owner.lock().ended = true;
                owner.ended.notify_all();
            })
            .map_err(io_step("start a thread"))?;
        match told.recv() {
            Ok(Ok(())) => Ok((Qemu { shared }, ours)),
            Ok(Err(source)) => Err(BoxError::Io {
                what: "run qemu-system-x86_64".into(),
                source,
            }),
            Err(_) => Err(BoxError::Gone("its owner thread ended".into())),
        }
    }
}

#[derive(Default)]
struct State {
    pid: Option<Pid>,
    status: Option<String>,
    ended: bool,
    tail: VecDeque<u8>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the end of what comes out of `stream`.
    fn follow(self: &Arc<Self>, mut stream: impl Read + Send + 'static) -> thread::JoinHandle<()> {
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buf) {
                let tail = &mut shared.lock().tail;
                tail.extend(&buf[..n]);
                let surplus = tail.len().saturating_sub(TAIL);
                tail.drain(..surplus);
            }
        })
    }
}

/// A running QEMU. Dropping it ends it.
pub struct Qemu {
    shared: Arc<Shared>,
}

impl Qemu {
    /// Its process id; `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.shared.lock().pid.map(|p| p.as_raw() as u32)
    }

    /// The last `lines` lines of the console and QEMU's own messages.
    pub fn console(&self, lines: usize) -> String {
        let bytes: Vec<u8> = self.shared.lock().tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        // Said at every start of parts of the processor that nobody misses.
        let noise = "TCG doesn't support requested feature";
        let all: Vec<&str> = text.lines().filter(|l| !l.contains(noise)).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// How QEMU ended, when it has within `limit`.
    pub fn ended_within(&self, limit: Duration) -> Option<String> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .ended
            .wait_timeout_while(state, limit, |s| !s.ended)
            .unwrap_or_else(PoisonError::into_inner);
        state
            .ended
            .then(|| state.status.clone().unwrap_or_else(|| "unknown".into()))
    }

    /// Ends it. The box has nothing of its own to save.
    pub fn stop(&self) {
        {
            let state = self.shared.lock();
            if let Some(pid) = state.pid {
                // It may have ended this moment; the number is still ours.
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
        self.ended_within(Duration::from_secs(10));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.stop();
    }
}
