// SPDX-License-Identifier: Apache-2.0
//! Event loops: threads that wait with epoll for device descriptors.
//!
//! A device is a plain object behind a mutex; a loop calls its
//! [`EventHandler::handle`] when one of its descriptors is ready. All devices
//! share the `io` loop by default; virtio-fs has one of its own, since its
//! requests block.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, Weak},
    thread,
    time::Duration,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use crate::{
    confine::{self, seccomp::Worker},
    memory::THREAD_STACK,
};

/// Something whose descriptors a loop watches.
pub trait EventHandler: Send {
    /// A descriptor registered with `token` is ready. Must not block (but on
    /// a loop of its own), and must bound what it does per call.
    fn handle(&mut self, token: u32, events: EventSet);
}

/// A handler as loops hold it. Weak: the device's owner decides how long it
/// lives, a late event for a device that is gone is dropped.
pub type HandlerRef = Weak<Mutex<dyn EventHandler>>;

struct Registration {
    handler: HandlerRef,
    token: u32,
}

/// How long what a loop is at may take, when it is to rest.
const REST_WITHIN: Duration = Duration::from_secs(5);

/// Lets a loop work, or rest between two events.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// The thread has been confined to its work.
    ready: bool,
    closed: bool,
    working: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().expect("no holder of the gate panics")
    }

    /// The thread is confined.
    fn ready(&self) {
        self.lock().ready = true;
        self.changed.notify_all();
    }

    /// Before an event is handled; waits while the gate is closed.
    fn enter(&self) {
        let state = self.lock();
        let mut state = self
            .changed
            .wait_while(state, |state| state.closed)
            .expect("no holder of the gate panics");
        state.working = true;
    }

    fn leave(&self) {
        let mut state = self.lock();
        state.working = false;
        if state.closed {
            self.changed.notify_all();
        }
    }

    /// Returns once nothing is being handled; false, and open again, when that
    /// takes longer than `limit`.
    fn close(&self, limit: Duration) -> bool {
        let mut state = self.lock();
        state.closed = true;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, limit, |state| state.working)
            .expect("no holder of the gate panics");
        let resting = !state.working;
        if !resting {
            state.closed = false;
            self.changed.notify_all();
        }
        resting
    }

    fn open(&self) {
        self.lock().closed = false;
        self.changed.notify_all();
    }
}

struct Shared {
    gate: Gate,
    epoll: Epoll,
    stop: EventFd,
    registrations: Mutex<HashMap<RawFd, Registration>>,
}

/// Registers descriptors with a loop, from any thread. Cheap to clone.
#[derive(Clone)]
pub struct LoopHandle {
    shared: Arc<Shared>,
}

impl LoopHandle {
    /// Watches `fd` (level-triggered unless `events` has `EDGE_TRIGGERED`) and
    /// calls `handler` with `token` when it is ready. The caller unregisters
    /// it before it closes it.
    pub fn register(
        &self,
        fd: &dyn AsRawFd,
        events: EventSet,
        handler: HandlerRef,
        token: u32,
    ) -> io::Result<()> {
        let raw = fd.as_raw_fd();
        let mut registrations = self.lock();
        self.shared.epoll.ctl(
            ControlOperation::Add,
            raw,
            EpollEvent::new(events, raw as u64),
        )?;
        registrations.insert(raw, Registration { handler, token });
        Ok(())
    }

    /// Changes what is watched for.
    pub fn modify(&self, fd: &dyn AsRawFd, events: EventSet) -> io::Result<()> {
        let raw = fd.as_raw_fd();
        self.shared.epoll.ctl(
            ControlOperation::Modify,
            raw,
            EpollEvent::new(events, raw as u64),
        )
    }

    /// Stops watching `fd`; no error when it was not watched.
    pub fn unregister(&self, fd: &dyn AsRawFd) {
        let raw = fd.as_raw_fd();
        if self.lock().remove(&raw).is_some() {
            // A failure means that the descriptor is gone already.
            let _ = self
                .shared
                .epoll
                .ctl(ControlOperation::Delete, raw, EpollEvent::default());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<RawFd, Registration>> {
        self.shared
            .registrations
            .lock()
            .expect("no holder of the registrations panics")
    }
}

/// A thread that waits for descriptors. Dropping it stops and joins it.
pub struct EventLoop {
    handle: LoopHandle,
    thread: Option<thread::JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a loop on a new thread called `name` (at most 15 bytes show),
    /// which may do what `worker` needs.
    pub fn spawn(name: &str, worker: Worker) -> io::Result<Self> {
        let mut this = Self::new()?;
        this.start(name, worker)?;
        Ok(this)
    }

    /// A loop without its thread: what is ready waits for [`Self::start`].
    pub fn new() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: Gate::default(),
            epoll: Epoll::new()?,
            stop: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            registrations: Mutex::new(HashMap::new()),
        });
        shared.epoll.ctl(
            ControlOperation::Add,
            shared.stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, shared.stop.as_raw_fd() as u64),
        )?;
        Ok(Self {
            handle: LoopHandle { shared },
            thread: None,
        })
    }

    /// Starts the thread, once, as [`Self::spawn`] does.
    pub fn start(&mut self, name: &str, worker: Worker) -> io::Result<()> {
        let inner = self.handle.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(THREAD_STACK)
            .spawn(move || {
                confine::enter(worker);
                inner.shared.gate.ready();
                run(&inner);
            })?;
        self.thread = Some(thread);
        Ok(())
    }

    /// Waits until the thread is confined to its work, which it is soon after
    /// its start.
    pub fn wait_until_confined(&self) {
        let gate = &self.handle.shared.gate;
        let state = gate
            .changed
            .wait_while(gate.lock(), |state| !state.ready)
            .expect("no holder of the gate panics");
        drop(state);
    }

    /// Makes the loop rest; nothing is being handled when this returns. What
    /// becomes ready meanwhile is handled after [`Self::resume`]. False, and
    /// the loop works on, when it is held up: a guest may have asked for a file
    /// that blocks for ever.
    #[must_use]
    pub fn pause(&self) -> bool {
        self.handle.shared.gate.close(REST_WITHIN)
    }

    /// Lets it work again.
    pub fn resume(&self) {
        self.handle.shared.gate.open();
    }

    /// For registering descriptors.
    pub fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let _ = self.handle.shared.stop.write(1);
        self.resume();
        if let Some(thread) = self.thread.take() {
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

fn run(handle: &LoopHandle) {
    let stop = handle.shared.stop.as_raw_fd();
    let mut ready = vec![EpollEvent::default(); 64];
    loop {
        let count = match handle.shared.epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The epoll descriptor itself is broken: nothing can go on.
            Err(error) => panic!("epoll_wait failed: {error}"),
        };
        for event in &ready[..count] {
            let fd = event.data() as RawFd;
            if fd == stop {
                return;
            }
            // Looked up per event: a handler may have unregistered a
            // descriptor that was ready in the same batch.
            let found = handle.lock().get(&fd).map(|r| (r.handler.clone(), r.token));
            let Some((handler, token)) = found else {
                continue;
            };
            if let Some(handler) = handler.upgrade() {
                handle.shared.gate.enter();
                handler
                    .lock()
                    .expect("a handler that panicked ended the process")
                    .handle(token, event.event_set());
                handle.shared.gate.leave();
            }
        }
    }
}
