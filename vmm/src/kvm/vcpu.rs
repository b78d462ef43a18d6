// SPDX-License-Identifier: Apache-2.0
//! vCPU threads.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, AtomicU32, Ordering},
        Arc, Condvar, Mutex, MutexGuard,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::ExitReason;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::unistd::gettid;
use vmm_sys_util::signal::{register_signal_handler, Killable, SIGRTMIN};

use super::{exits::ExitCounters, gathered::Gathered};
use crate::{
    bus::Bus,
    confine::{self, seccomp::Worker},
    memory::THREAD_STACK,
    power::OnEnd,
};

/// How long a vCPU may take to leave the guest when it is told to.
const STOP_WITHIN: Duration = Duration::from_secs(1);
/// How often it is told.
const KICK_EVERY: Duration = Duration::from_millis(1);

/// The buses a vCPU's accesses go to.
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// What all vCPU threads share.
pub struct Shared {
    /// Address spaces.
    pub buses: Buses,
    /// Writes that are on their way there.
    pub gathered: Gathered,
    /// Exit counters, of each vCPU.
    pub exits: Vec<ExitCounters>,
    /// The threads' ids, of each vCPU; 0: it has not started.
    pub ids: Vec<AtomicU32>,
    /// Called when the guest, or KVM, ends the machine.
    pub on_end: OnEnd,
    /// Where the threads rest while the machine is paused.
    pub rest: Rest,
    /// Set to make the threads leave.
    pub stop: AtomicBool,
}

impl Shared {
    /// Lets writes arrive that KVM has gathered.
    pub fn drain(&self) {
        self.gathered.drain(|port, address, data| match port {
            true => self.buses.pio.write(address, data),
            false => self.buses.mmio.write(address, data),
        });
    }
}

/// Where vCPU threads rest while the machine is paused.
#[derive(Debug, Default)]
pub struct Rest {
    /// Looked at before every entry to the guest.
    asked: AtomicBool,
    resting: Mutex<usize>,
    changed: Condvar,
}

impl Rest {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.resting.lock().expect("no holder of the lock panics")
    }

    /// A vCPU thread's: until the machine goes on.
    fn here(&self) {
        let mut resting = self.lock();
        *resting += 1;
        self.changed.notify_all();
        while self.asked.load(Ordering::SeqCst) {
            resting = self
                .changed
                .wait(resting)
                .expect("no holder of the lock panics");
        }
        *resting -= 1;
    }

    /// Makes vCPU threads rest from their start, until [`Self::end`].
    pub fn before_start(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Waits until `count` threads rest; each is about to, or ends the process.
    pub fn wait_for(&self, count: usize) {
        let resting = self.lock();
        let resting = self
            .changed
            .wait_while(resting, |resting| *resting < count)
            .expect("no holder of the lock panics");
        drop(resting);
    }

    /// Whether a pause is asked for.
    fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Makes `threads` rest. False when one of them does not within a second,
    /// or has ended: then they go on.
    pub fn begin(&self, threads: &[VcpuThread]) -> bool {
        self.asked.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + STOP_WITHIN;
        let mut resting = self.lock();
        while *resting < threads.len() {
            if Instant::now() >= deadline || threads.iter().any(VcpuThread::has_ended) {
                drop(resting);
                self.end();
                return false;
            }
            // Repeated: a signal that comes just before KVM_RUN is lost.
            threads.iter().for_each(VcpuThread::kick);
            resting = self
                .changed
                .wait_timeout(resting, KICK_EVERY)
                .expect("no holder of the lock panics")
                .0;
        }
        true
    }

    /// Lets them go on.
    pub fn end(&self) {
        let resting = self.lock();
        self.asked.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        drop(resting);
    }
}

/// A running vCPU.
pub struct VcpuThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the signal that takes a vCPU out of the guest.
pub fn install_kick_signal() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), nothing).map_err(Into::into)
}

impl VcpuThread {
    /// Lets vCPU `index` run on a thread of its own, which holds the lock
    /// whenever it does not rest. It does not run before [`Rest::end`] where
    /// [`Rest::before_start`] was called.
    pub fn spawn(index: u8, vcpu: Arc<Mutex<VcpuFd>>, shared: Arc<Shared>) -> io::Result<Self> {
        let inner = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(THREAD_STACK)
            .spawn(move || {
                confine::enter(Worker::Vcpu);
                let id = u32::try_from(gettid().as_raw()).unwrap_or(0);
                inner.ids[usize::from(index)].store(id, Ordering::Relaxed);
                inner.rest.here();
                run(&vcpu, &inner, &inner.exits[usize::from(index)]);
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Takes it out of the guest, if it is there.
    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // It may have ended this moment.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for VcpuThread {
    /// Stops the thread, without hanging on one that cannot leave the guest.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.rest.end();
        if thread.thread().id() == std::thread::current().id() {
            return;
        }
        let deadline = Instant::now() + STOP_WITHIN;
        while !thread.is_finished() && Instant::now() < deadline {
            // Repeated: a signal that comes just before KVM_RUN is lost.
            let _ = thread.kill(SIGRTMIN());
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().expect("a vCPU that panicked ended the process")
}

/// Finishes what the last exit began (an access's second half is done at the
/// next entry), without running the guest.
fn finish_exit(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // Comes back at once, interrupted.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

fn run(shared_vcpu: &Mutex<VcpuFd>, shared: &Shared, exits: &ExitCounters) {
    let mut vcpu = lock(shared_vcpu);
    let reason = loop {
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if shared.rest.asked() {
            finish_exit(&mut vcpu);
            drop(vcpu);
            shared.rest.here();
            vcpu = lock(shared_vcpu);
            // The guest is not to take the pause for a hang of its own. Fails
            // where it has no such clock.
            let _ = vcpu.kvmclock_ctrl();
            continue;
        }
        let exit = vcpu.run();
        exits.count(&exit);
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                shared.drain();
                shared.buses.pio.read(u64::from(port), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                shared.drain();
                shared.buses.pio.write(u64::from(port), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.drain();
                shared.buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.drain();
                shared.buses.mmio.write(address, data);
            }
            Ok(VcpuExit::Shutdown) => break ExitReason::TripleFault,
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => break ExitReason::PowerOff,
                KVM_SYSTEM_EVENT_RESET => break ExitReason::Reset,
                KVM_SYSTEM_EVENT_CRASH => break ExitReason::Panic,
                _ => break ExitReason::KvmError,
            },
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(exit) => {
                tracing::error!(exit = ?exit, "vCPU cannot go on");
                break ExitReason::KvmError;
            }
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {}
                _ => {
                    tracing::error!(%error, "KVM_RUN failed");
                    break ExitReason::KvmError;
                }
            },
        }
    };
    (shared.on_end)(reason);
}
