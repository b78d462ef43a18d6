// SPDX-License-Identifier: Apache-2.0
//! The VMM's process and its control connection.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{
    Call, Channel, ChannelError, DeviceConfigs, Event, Failure, FailureKind, FromVmm, KernelConfig,
    Outcome, Pages, PlugConfig, Request, RestoreConfig, SnapshotFiles, Status, VmConfig,
};
use nix::sys::{
    socket::{setsockopt, sockopt::ReceiveTimeout},
    time::TimeVal,
};
use vmm_sys_util::tempfile::TempFile;

/// How long anything may take.
pub const LONG: Duration = Duration::from_secs(30);

pub const VMM: &str = env!("CARGO_BIN_EXE_bulkhead-vmm");

/// Whether guests can run here; says so if not.
pub fn kvm(test: &str) -> bool {
    let path = "/dev/kvm";
    match File::options().read(true).write(true).open(path) {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: {test}: {path}: {error}");
            false
        }
    }
}

/// Whether this is root: others cannot make the jail.
pub fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A configuration with its descriptors.
pub struct Setup {
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
}

impl Setup {
    /// The least machine, with `kernel` to boot.
    pub fn new(kernel: File) -> Self {
        Self {
            config: VmConfig {
                vcpus: 1,
                memory_mib: 32,
                pages: Pages::Small,
                merge_group: None,
                kernel: KernelConfig {
                    image: 0,
                    cmdline: String::new(),
                    initrd: None,
                },
                serial: None,
                devices: DeviceConfigs {
                    rng: false,
                    ..DeviceConfigs::default()
                },
            },
            fds: vec![kernel.into()],
        }
    }

    /// Passes a descriptor; its index.
    pub fn pass(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.fds.push(fd.into());
        self.fds.len() as u32 - 1
    }

    /// Where the serial port's output can be read.
    pub fn serial(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LONG)).unwrap();
        self.config.serial = Some(self.pass(theirs));
        ours
    }
}

/// The two files of a snapshot.
pub struct Snapshot {
    pub state: TempFile,
    pub memory: TempFile,
}

impl Snapshot {
    fn fds(&self) -> Vec<OwnedFd> {
        [&self.state, &self.memory]
            .map(|file| file.as_file().try_clone().unwrap().into())
            .into()
    }
}

/// A running VMM. Killed on drop.
pub struct Vmm {
    pub child: Child,
    channel: Option<Channel>,
    next: u64,
}

impl Vmm {
    pub fn spawn() -> Self {
        Self::spawn_with(&[])
    }

    /// As [`Self::spawn`], with these in its environment.
    pub fn spawn_with(environment: &[(&str, &str)]) -> Self {
        Self::spawn_as(&[], environment)
    }

    /// The same, with these options as well.
    pub fn spawn_as(options: &[&str], environment: &[(&str, &str)]) -> Self {
        Self::spawn_changed(|command| {
            command.args(options).envs(environment.iter().copied());
        })
    }

    /// As [`Self::spawn`], of a command to which more is added.
    pub fn spawn_changed(change: impl FnOnce(&mut Command)) -> Self {
        let (ours, theirs) = Channel::pair().unwrap();
        limit(&ours);
        let number = theirs.as_raw_fd();
        let mut command = Command::new(VMM);
        if !is_root() {
            command.args(["--jail", "off"]);
        }
        command.stderr(Stdio::null());
        change(&mut command);
        command.args(["--control-fd", &number.to_string()]);
        keep(&mut command, &[(number, number)]);
        Self {
            child: command.spawn().unwrap(),
            channel: Some(ours),
            next: 1,
        }
    }

    /// A VMM whose guest runs.
    pub fn run(setup: &Setup) -> Self {
        let mut vmm = Self::spawn();
        vmm.configure(setup).unwrap();
        vmm.call(Call::Boot).unwrap();
        vmm
    }

    pub fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("the connection was not ended")
    }

    /// Ends the control connection.
    pub fn hang_up(&mut self) {
        self.channel = None;
    }

    pub fn receive(&self) -> Result<FromVmm, ChannelError> {
        self.channel().receive().map(|(message, _)| message)
    }

    fn request(&mut self, call: Call, fds: &[OwnedFd]) -> Outcome {
        let id = self.next;
        self.next += 1;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        self.channel().send(&Request { id, call }, &fds).unwrap();
        match self.receive().unwrap() {
            FromVmm::Reply(reply) => {
                assert_eq!(reply.id, id);
                reply.outcome
            }
            FromVmm::Event(event) => panic!("{event:?} instead of a reply"),
        }
    }

    /// A request that has no answer but whether it was done.
    pub fn call(&mut self, call: Call) -> Result<(), Failure> {
        done(self.request(call, &[]))
    }

    /// As [`Self::call`], and an event that comes of it, before the answer or after.
    pub fn call_for(&mut self, call: Call) -> Event {
        let id = self.next;
        self.next += 1;
        self.channel().send(&Request { id, call }, &[]).unwrap();
        let mut told = None;
        let mut answered = false;
        loop {
            match (told.take(), answered) {
                (Some(event), true) => return event,
                (waiting, _) => told = waiting,
            }
            match self.receive().unwrap() {
                FromVmm::Reply(reply) => {
                    assert_eq!((reply.id, reply.outcome), (id, Outcome::Done));
                    answered = true;
                }
                FromVmm::Event(event) => assert_eq!(told.replace(event), None),
            }
        }
    }

    pub fn configure(&mut self, setup: &Setup) -> Result<(), Failure> {
        let call = Call::Configure(Box::new(setup.config.clone()));
        done(self.request(call, &setup.fds))
    }

    /// Plugs a device; its slot.
    pub fn plug(&mut self, config: PlugConfig, fds: Vec<OwnedFd>) -> Result<u8, Failure> {
        match self.request(Call::Plug(Box::new(config)), &fds) {
            Outcome::Plugged(device) => Ok(device.slot),
            other => done(other).map(|()| panic!("plugged, and no slot")),
        }
    }

    /// Pauses the VM and writes it to two files.
    pub fn snapshot(&mut self) -> Result<Snapshot, Failure> {
        let snapshot = Snapshot {
            state: TempFile::new().unwrap(),
            memory: TempFile::new().unwrap(),
        };
        self.call(Call::Pause)?;
        let call = Call::Snapshot(SnapshotFiles {
            state: 0,
            memory: 1,
        });
        done(self.request(call, &snapshot.fds()))?;
        Ok(snapshot)
    }

    /// A VMM whose paused VM comes from a snapshot. `change` adds devices and
    /// their descriptors.
    pub fn restore(
        snapshot: &Snapshot,
        change: impl FnOnce(&mut RestoreConfig, &mut Vec<OwnedFd>),
    ) -> Result<Self, Failure> {
        let mut vmm = Self::spawn();
        vmm.restore_from(snapshot, change)?;
        Ok(vmm)
    }

    /// The same, of a VMM that has no VM yet.
    pub fn restore_from(
        &mut self,
        snapshot: &Snapshot,
        change: impl FnOnce(&mut RestoreConfig, &mut Vec<OwnedFd>),
    ) -> Result<(), Failure> {
        let mut fds = snapshot.fds();
        let mut config = RestoreConfig {
            snapshot: SnapshotFiles {
                state: 0,
                memory: 1,
            },
            serial: None,
            devices: DeviceConfigs {
                rng: false,
                ..DeviceConfigs::default()
            },
        };
        change(&mut config, &mut fds);
        done(self.request(Call::Restore(Box::new(config)), &fds))
    }

    pub fn status(&mut self) -> Status {
        match self.request(Call::Status, &[]) {
            Outcome::Status(status) => *status,
            other => panic!("{other:?} instead of the status"),
        }
    }

    /// What is told until the end, and the exit code.
    pub fn end(&mut self) -> (Vec<Event>, i32) {
        let mut events = Vec::new();
        loop {
            match self.receive() {
                Ok(FromVmm::Event(event)) => events.push(event),
                Ok(FromVmm::Reply(reply)) => panic!("{reply:?} to no request"),
                Err(ChannelError::Closed) => return (events, self.exit_code()),
                Err(error) => panic!("{error}: after {events:?}"),
            }
        }
    }

    pub fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().expect("it was not killed");
            }
            assert!(Instant::now() < deadline, "the VMM does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn done(outcome: Outcome) -> Result<(), Failure> {
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Failed(failure) => Err(failure),
        other => panic!("{other:?} was not asked for"),
    }
}

/// No test hangs on an answer that does not come.
pub fn limit(channel: &Channel) {
    let patience = TimeVal::new(LONG.as_secs() as i64, 0);
    setsockopt(channel, ReceiveTimeout, &patience).unwrap();
}

/// Lets a program inherit up to four descriptors, each as the number beside it.
pub fn keep(command: &mut Command, fds: &[(i32, i32)]) {
    let fds = fds.to_vec();
    // SAFETY: the closure makes system calls only, which are safe between
    // fork and exec.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first: a number may be another's descriptor yet.
            let mut aside = [0; 4];
            for ((from, _), aside) in fds.iter().zip(&mut aside) {
                *aside = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 100);
            }
            for ((_, to), aside) in fds.iter().zip(aside) {
                if libc::dup2(aside, *to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// Everything until the end.
pub fn text(mut serial: UnixStream) -> String {
    let mut text = Vec::new();
    serial.read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

/// A failure whose message begins so.
#[track_caller]
pub fn assert_failure(result: Result<(), Failure>, kind: FailureKind, start: &str) {
    let failure = result.expect_err(start);
    assert!(failure.message.starts_with(start), "{failure:?}");
    assert_eq!(failure.kind, kind, "{failure:?}");
}
