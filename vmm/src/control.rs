// SPDX-License-Identifier: Apache-2.0
//! Serves the control socket: the life of one VM, from `configure` to the
//! reason it ended.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, OnceLock},
};

use bulkhead_vmm_api::{
    Call, Channel, ChannelError, Event, ExitReason, Failure, FailureKind, FromVmm, Outcome,
    PlugConfig, PluggedDevice, Reply, Request, RestoreConfig, SnapshotFiles, Status, VmState,
};
use nix::{
    errno::Errno,
    poll::{poll, PollFd, PollFlags, PollTimeout},
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    builder::{BuildError, Callbacks, Host, Machine},
    config::{self, Devices, Resources, RestoreResources},
    confine::jail,
    timeline::{Moment, Stamps},
    virtio::fs,
};

/// How the machine ended, and a descriptor that says that it has, or that it
/// wants attention.
struct End {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl End {
    /// Keeps the first reason.
    fn set(&self, reason: ExitReason) {
        let mut slot = self.reason.lock().expect("no holder of the lock panics");
        if slot.is_none() {
            *slot = Some(reason);
            // Cannot overflow: it happens once.
            let _ = self.event.write(1);
        }
    }

    fn get(&self) -> Option<ExitReason> {
        *self.reason.lock().expect("no holder of the lock panics")
    }
}

enum Stage {
    Unconfigured,
    Configured(Box<Resources>),
    Running(Box<Machine>),
}

impl Stage {
    fn state(&self) -> VmState {
        match self {
            Self::Unconfigured => VmState::Unconfigured,
            Self::Configured(_) => VmState::Configured,
            Self::Running(machine) if machine.is_paused() => VmState::Paused,
            Self::Running(_) => VmState::Running,
        }
    }
}

/// A VM and its control connection.
pub struct Server {
    channel: Arc<Channel>,
    stamps: Arc<Stamps>,
    end: Arc<End>,
    host: Option<Arc<Host>>,
    stage: Stage,
}

/// The channel, for the last words of a thread that panics.
static LAST_WORDS: OnceLock<Arc<Channel>> = OnceLock::new();

impl Server {
    /// Serves `channel`.
    pub fn new(channel: Channel, stamps: Arc<Stamps>) -> io::Result<Self> {
        let channel = Arc::new(channel);
        let _ = LAST_WORDS.set(Arc::clone(&channel));
        Ok(Self {
            channel,
            stamps,
            end: Arc::new(End {
                reason: Mutex::new(None),
                event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            host: None,
            stage: Stage::Unconfigured,
        })
    }

    /// Serves until the VM ends; why it did. Its end has been told when this
    /// returns, and the process is to end: the machine's threads go on.
    pub fn run(mut self) -> ExitReason {
        let reason = self.serve();
        if let Stage::Running(machine) = &self.stage {
            machine.flush_serial();
        }
        if reason == ExitReason::Panic {
            self.tell(Event::GuestPanicked);
        }
        self.tell(Event::Ended(reason));
        // The process ends next, and the kernel takes the machine apart faster
        // than its parts let go of each other.
        std::mem::forget(self.stage);
        reason
    }

    fn serve(&mut self) -> ExitReason {
        loop {
            let mut ready = [
                PollFd::new(self.channel.as_fd(), PollFlags::POLLIN),
                PollFd::new(
                    // The eventfd outlives the poll: it belongs to `self`.
                    sys::borrow(&self.end.event),
                    PollFlags::POLLIN,
                ),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "poll failed");
                    return ExitReason::VmmError;
                }
            }
            let request = ready[0].any().unwrap_or(false);
            let woken = ready[1].any().unwrap_or(false);
            if woken {
                // Before the reason is looked for, which is there before this is.
                let _ = self.end.event.read();
            }
            if let Some(reason) = self.end.get() {
                return reason;
            }
            if let (true, Stage::Running(machine)) = (woken, &self.stage) {
                if let Err(error) = machine.attend() {
                    tracing::error!(error = %chain(&error), "a guest's interrupts cannot be unmasked");
                    return ExitReason::VmmError;
                }
            }
            if request {
                if let Some(reason) = self.one_request() {
                    return reason;
                }
            }
        }
    }

    /// Answers one request; the reason when it, or its absence, ends the VM.
    fn one_request(&mut self) -> Option<ExitReason> {
        let (request, fds) = match self.channel.receive::<Request>() {
            Ok(received) => received,
            Err(ChannelError::Closed) => return Some(ExitReason::ClientGone),
            Err(error) if error.would_block() => return None,
            Err(error @ (ChannelError::Malformed(_) | ChannelError::TooLarge)) => {
                self.reply(0, failure(FailureKind::InvalidRequest, &error));
                return None;
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "control socket failed");
                return Some(ExitReason::ClientGone);
            }
        };
        let stop = request.call == Call::Shutdown;
        let outcome = self.handle(request.call, fds);
        self.reply(request.id, outcome);
        stop.then_some(ExitReason::Stopped)
    }

    fn handle(&mut self, call: Call, fds: Vec<OwnedFd>) -> Outcome {
        match call {
            Call::Configure(config) => {
                if !matches!(self.stage, Stage::Unconfigured) {
                    return wrong_state("configure", self.stage.state());
                }
                match Resources::new(*config, fds) {
                    Ok(resources) => {
                        self.stage = Stage::Configured(Box::new(resources));
                        self.stamps.set(Moment::Configured);
                        Outcome::Done
                    }
                    Err(error) => failure(error.kind, &error),
                }
            }
            Call::Boot => match std::mem::replace(&mut self.stage, Stage::Unconfigured) {
                Stage::Configured(resources) => self.boot(*resources),
                other => {
                    let state = other.state();
                    self.stage = other;
                    wrong_state("boot", state)
                }
            },
            Call::Status => Outcome::Status(Box::new(self.status())),
            Call::Balloon(target) => match self.machine("balloon") {
                Ok(machine) => match machine.set_balloon(target.mib) {
                    Ok(()) => Outcome::Done,
                    Err(error) => failure(FailureKind::InvalidRequest, &error),
                },
                Err(outcome) => outcome,
            },
            Call::Memory(target) => match self.machine("memory") {
                Ok(machine) => match machine.set_memory(target.mib) {
                    Ok(()) => Outcome::Done,
                    Err(error) => failure(error.kind(), &error),
                },
                Err(outcome) => outcome,
            },
            Call::Pause => self.pause(),
            Call::Resume => self.resume(),
            Call::Snapshot(files) => self.snapshot(&files, fds),
            Call::Restore(config) => self.restore(*config, fds),
            Call::Plug(config) => self.plug(*config, fds),
            Call::Unplug(target) => match self.machine("unplug") {
                Ok(machine) => match machine.unplug(target.slot) {
                    Ok(()) => Outcome::Done,
                    Err(error) => failure(error.kind(), &error),
                },
                Err(outcome) => outcome,
            },
            Call::Shutdown => Outcome::Done,
        }
    }

    fn status(&self) -> Status {
        let machine = match &self.stage {
            Stage::Running(machine) => Some(machine),
            Stage::Unconfigured | Stage::Configured(_) => None,
        };
        let vcpus = machine.map(|machine| machine.exits()).unwrap_or_default();
        Status {
            state: self.stage.state(),
            timeline: self.stamps.read(),
            exits: vcpus.iter().copied().sum(),
            vcpus,
            vcpu_threads: machine
                .map(|machine| machine.vcpu_threads())
                .unwrap_or_default(),
            memory: machine.and_then(|machine| machine.memory()),
            balloon: machine.and_then(|machine| machine.balloon()),
            devices: machine.map(|machine| machine.devices()).unwrap_or_default(),
        }
    }

    fn plug(&mut self, config: PlugConfig, fds: Vec<OwnedFd>) -> Outcome {
        let machine = match self.machine("plug") {
            Ok(machine) => machine,
            Err(outcome) => return outcome,
        };
        let devices = match Devices::plugged(config, fds) {
            Ok(devices) => devices,
            Err(error) => return failure(error.kind, &error),
        };
        match machine.plug(devices) {
            Ok(Some(slot)) => Outcome::Plugged(PluggedDevice { slot }),
            // There is always one.
            Ok(None) => Outcome::Done,
            Err(error) => failure(error.kind(), &error),
        }
    }

    /// The machine, when there is one.
    fn machine(&mut self, call: &str) -> Result<&mut Machine, Outcome> {
        match &mut self.stage {
            Stage::Running(machine) => Ok(machine),
            other => Err(wrong_state(call, other.state())),
        }
    }

    fn pause(&mut self) -> Outcome {
        match self.machine("pause").map(Machine::pause) {
            Ok(true) => Outcome::Done,
            Ok(false) => Outcome::Failed(Failure {
                kind: FailureKind::WrongState,
                message: "pause is not possible: a vCPU has ended or does not leave the guest, or a device waits for the host"
                    .into(),
            }),
            Err(outcome) => outcome,
        }
    }

    fn resume(&mut self) -> Outcome {
        match self.machine("resume").map(Machine::resume) {
            Ok(Ok(())) => Outcome::Done,
            Ok(Err(error)) => failure(error.kind(), &error),
            Err(outcome) => outcome,
        }
    }

    fn snapshot(&mut self, files: &SnapshotFiles, fds: Vec<OwnedFd>) -> Outcome {
        let machine = match self.machine("snapshot") {
            Ok(machine) if machine.is_paused() => machine,
            Ok(_) => return wrong_state("snapshot", VmState::Running),
            Err(outcome) => return outcome,
        };
        let (state, memory) = match config::snapshot_files(files, fds) {
            Ok(files) => files,
            Err(error) => return failure(error.kind, &error),
        };
        match machine.snapshot(&state, &memory) {
            Ok(()) => Outcome::Done,
            Err(error) => failure(error.kind(), &error),
        }
    }

    fn restore(&mut self, config: RestoreConfig, fds: Vec<OwnedFd>) -> Outcome {
        if !matches!(self.stage, Stage::Unconfigured) {
            return wrong_state("restore", self.stage.state());
        }
        let mut resources = match RestoreResources::new(config, fds) {
            Ok(resources) => resources,
            Err(error) => return failure(error.kind, &error),
        };
        self.stamps.set(Moment::Configured);
        let callbacks = self.callbacks(&resources.devices, true);
        let restored = self.host(&mut resources.devices).and_then(|host| {
            Machine::restore(host, resources, &callbacks, Arc::clone(&self.stamps))
        });
        match restored {
            Ok(machine) => {
                self.stage = Stage::Running(Box::new(machine));
                Outcome::Done
            }
            Err(error) => failure(error.kind(), &error),
        }
    }

    fn callbacks(&self, devices: &Devices, restored: bool) -> Callbacks {
        let vsock = devices.vsock.as_ref();
        let ready_port = vsock.and_then(|(vsock, _)| vsock.ready_port);
        let end = Arc::clone(&self.end);
        let wanting = Arc::clone(&self.end);
        let teller = || (Arc::clone(&self.channel), Arc::clone(&self.stamps));
        let (connect_channel, connect_stamps) = teller();
        let (channel, stamps) = teller();
        Callbacks {
            on_end: Arc::new(move |reason| end.set(reason)),
            on_connect: Arc::new(move |port| {
                if Some(port) == ready_port && connect_stamps.set(Moment::GuestReady) {
                    send(&connect_channel, Event::GuestReady(connect_stamps.read()));
                }
            }),
            on_trap: Arc::new(move || {
                // Cannot overflow: it happens once.
                let _ = wanting.event.write(1);
            }),
            on_generation_read: Arc::new(move || {
                // A guest that boots has nobody who waits for it.
                if stamps.set(Moment::GenerationRead) && restored {
                    send(&channel, Event::GenerationRead);
                }
            }),
        }
    }

    /// What a machine uses of the host, opened at the first attempt; then the
    /// process sees no more of the host than `devices` need.
    fn host(&mut self, devices: &mut Devices) -> Result<Arc<Host>, BuildError> {
        let host = match &self.host {
            Some(host) => Arc::clone(host),
            None => Arc::new(Host::open()?),
        };
        self.host = Some(Arc::clone(&host));
        if !devices.fs.is_empty() {
            fs::allow_descriptors();
        }
        jail::enter(devices)?;
        self.stamps.set(Moment::Jailed);
        Ok(host)
    }

    fn boot(&mut self, mut resources: Resources) -> Outcome {
        let callbacks = self.callbacks(&resources.devices, false);
        let built = self.host(&mut resources.devices).and_then(|host| {
            let stamps = Arc::clone(&self.stamps);
            let mut machine = Machine::build(host, resources, &callbacks, stamps)?;
            machine.start()?;
            Ok(machine)
        });
        match built {
            Ok(machine) => {
                self.stage = Stage::Running(Box::new(machine));
                Outcome::Done
            }
            Err(error) => failure(error.kind(), &error),
        }
    }

    fn reply(&self, id: u64, outcome: Outcome) {
        self.send(&FromVmm::Reply(Reply { id, outcome }));
    }

    fn tell(&self, event: Event) {
        self.send(&FromVmm::Event(event));
    }

    fn send(&self, message: &FromVmm) {
        if let Err(error) = self.channel.send(message, &[]) {
            // A client that is gone is noticed by the next receive.
            tracing::debug!(error = %chain(&error), "message not sent");
        }
    }
}

/// Tells an event, on any thread.
fn send(channel: &Channel, event: Event) {
    if let Err(error) = channel.send(&FromVmm::Event(event), &[]) {
        tracing::warn!(error = %chain(&error), "event not sent");
    }
}

/// Makes a panic on any thread end the process at once, with its reason told:
/// a VM whose device thread is gone must not linger. No stack is told, which
/// would take files that nobody may open here.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        if let Some(channel) = LAST_WORDS.get() {
            let event = FromVmm::Event(Event::Ended(ExitReason::VmmError));
            let _ = channel.send(&event, &[]);
        }
        let thread = std::thread::current();
        eprintln!("thread {:?}: {info}", thread.name().unwrap_or("?"));
        sys::exit_now(ExitReason::VmmError.code());
    }));
}

fn wrong_state(call: &str, state: VmState) -> Outcome {
    Outcome::Failed(Failure {
        kind: FailureKind::WrongState,
        message: format!("{call} is not possible: the VM is {state:?}"),
    })
}

fn failure(kind: FailureKind, error: &dyn std::error::Error) -> Outcome {
    Outcome::Failed(Failure {
        kind,
        message: chain(error),
    })
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// What needs a word to the compiler.
mod sys {
    use std::os::fd::{AsRawFd, BorrowedFd};

    use vmm_sys_util::eventfd::EventFd;

    /// An eventfd as a borrowed descriptor.
    pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the reference lives.
        unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }

    /// Ends the process without running destructors of other threads' data.
    pub fn exit_now(code: i32) -> ! {
        // SAFETY: takes no pointers and does not return.
        unsafe { libc::_exit(code) }
    }
}
