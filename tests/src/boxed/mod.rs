// SPDX-License-Identifier: Apache-2.0
//! The KVM host in a box: a machine with SVM for hosts that have none.
//!
//! QEMU emulates an AMD processor that can virtualise; a distribution kernel
//! boots on it with `kvm_amd`; its root is this machine's file system, read
//! over 9p, with everything that is written kept in memory. Commands run in it
//! with their output, exit code and time limit passed through, many at once.
//!
//! ```no_run
//! use bulkhead_tests::boxed::{Command, KvmBox, Options};
//! let machine = KvmBox::start(Options::default())?;
//! let output = machine.run(&Command::new(["uname", "-r"]))?;
//! println!("{}", String::from_utf8_lossy(&output.stdout));
//! # Ok::<(), bulkhead_tests::boxed::BoxError>(())
//! ```

mod cache;
mod command;
use bulkhead_rootfs_builder::cpio;
pub mod daemon;
mod error;
pub mod hot;
pub mod initramfs;
mod kernel;
mod modules;
mod mux;
pub mod proto;
mod qemu;
mod tsc;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use cache::dir as cache_dir;
pub use cache::lock as lock_cache;
pub use command::{Command, Output};
pub use error::BoxError;
pub use kernel::{fetch as fetch_kernel, Flavour, Kernel};
pub use mux::{Event, Input, Mux, Session};
pub use proto::{Exit, Ready};

/// Lines of console in an error: a panic with its call trace takes about 60.
const CONSOLE_LINES: usize = 100;

/// How to build a box.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory in MiB; at most half of the host's is taken.
    pub memory_mib: u64,
    /// Processors. With more than one, QEMU's SVM loses and misdirects
    /// interrupts within seconds of two VMs running side by side: guests hang
    /// or triple-fault, and the box itself may panic.
    pub cpus: u32,
    /// Files and directories to read from a disk image instead of over 9p.
    pub hot: Vec<PathBuf>,
    /// Directories to put a tmpfs on, besides `/run`, `/tmp` and
    /// `/var/lib/containerd`; not on one that this program is in.
    pub tmpfs: Vec<PathBuf>,
    /// One processor with a clock that counts instructions.
    pub virtual_time: bool,
    /// Additional words for the kernel's command line.
    pub kernel_params: String,
    /// How long the boot may take.
    pub boot_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_mib: 6 << 10,
            cpus: 1,
            hot: Vec::new(),
            tmpfs: Vec::new(),
            virtual_time: false,
            kernel_params: String::new(),
            boot_limit: Duration::from_secs(180),
        }
    }
}

/// A box. Dropping it ends the machine, and so does the end of this process,
/// however it comes.
pub struct KvmBox {
    mux: Mux,
    ready: Ready,
    qemu: qemu::Qemu,
    boot_time: Duration,
}

impl KvmBox {
    /// Prepares what is missing (kernel, disk image) and boots.
    ///
    /// # Errors
    /// [`BoxError::Boot`] with the console's end when it does not come up;
    /// others when it cannot be prepared.
    pub fn start(options: Options) -> Result<Self, BoxError> {
        let kernel = kernel::fetch(kernel::Flavour::Generic)?;
        let hot = hot::image(&options.hot)?;
        // What runs in the box is read from where it is outside.
        let own = std::env::current_exe().unwrap_or_default();
        let plan = initramfs::Plan {
            modules_dir: kernel.modules.clone(),
            hot: hot.is_some(),
            tmpfs: ["/run", "/tmp", "/var/lib/containerd"]
                .iter()
                .map(PathBuf::from)
                .chain(options.tmpfs)
                .filter(|dir| !own.starts_with(dir))
                .collect(),
            modules: Vec::new(),
        };
        let initramfs = initramfs::build(&kernel, plan)?;
        let half = host_memory_mib() / 2;
        let machine = qemu::Machine {
            kernel,
            initramfs,
            hot,
            memory_mib: options.memory_mib.min(half).max(512),
            cpus: options.cpus,
            virtual_time: options.virtual_time,
            kernel_params: options.kernel_params,
        };
        let begin = Instant::now();
        let (qemu, stream) = machine.start()?;
        let (mux, boot) = Mux::new(stream)?;
        let Some(ready) = boot.wait(options.boot_limit) else {
            // When QEMU has ended, its last words are complete after this.
            let reason = match qemu.ended_within(Duration::from_secs(1)) {
                Some(status) => format!("the machine ended ({status})"),
                None => format!("no answer within {:?}", options.boot_limit),
            };
            return Err(BoxError::Boot {
                reason,
                console: qemu.console(CONSOLE_LINES),
            });
        };
        for warning in &ready.warnings {
            eprintln!("box: {warning}");
        }
        Ok(Self {
            mux,
            ready,
            qemu,
            boot_time: begin.elapsed(),
        })
    }

    /// Runs a command to its end and collects its output.
    ///
    /// # Errors
    /// [`BoxError::Spawn`] when it does not start; [`BoxError::Gone`] with the
    /// console's end when the box dies.
    pub fn run(&self, command: &Command) -> Result<Output, BoxError> {
        command.run(&self.mux).map_err(|e| self.explain(e))
    }

    /// Starts a command.
    ///
    /// # Errors
    /// As [`KvmBox::run`].
    pub fn spawn(&self, command: &Command) -> Result<Session, BoxError> {
        self.mux.spawn(&command.spec()).map_err(|e| self.explain(e))
    }

    /// Adds the console's end to the news that the box is gone.
    pub fn explain(&self, error: BoxError) -> BoxError {
        let BoxError::Gone(why) = error else {
            return error;
        };
        let status = self.qemu.ended_within(Duration::from_secs(2));
        let status = status.map_or(String::new(), |s| format!(" ({s})"));
        BoxError::Gone(format!(
            "{why}{status}\n--- end of its console ---\n{}",
            self.qemu.console(CONSOLE_LINES)
        ))
    }

    /// The connection, for what wants to share it.
    pub fn mux(&self) -> &Mux {
        &self.mux
    }

    /// The last lines of its console.
    pub fn console(&self) -> String {
        self.qemu.console(CONSOLE_LINES)
    }

    /// What the box said when it was up.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// QEMU's process id; `None` once it has ended.
    pub fn pid(&self) -> Option<u32> {
        self.qemu.pid()
    }

    /// Real time from QEMU's start to the box being ready.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// Ends the machine.
    pub fn stop(&self) {
        self.qemu.stop();
    }

    /// Waits for the machine to end by itself.
    pub fn ended_within(&self, limit: Duration) -> Option<String> {
        self.qemu.ended_within(limit)
    }
}

/// The memory of this machine in MiB.
fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().split(' ').next())
        .and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(4 << 20) / 1024
}
