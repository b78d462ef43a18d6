// SPDX-License-Identifier: Apache-2.0
//! All connections of a device: finds a packet's connection, makes new ones,
//! takes turns between those that have something for the guest.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{
    connection::{Connection, HostEvent, Phase, Verdict},
    handshake::{Handshake, Progress},
    packet::{Header, Op, Sent, Span, HOST_CID, TYPE_STREAM},
    rx::Receive,
    stream::{Key, Stream, Watched, Watcher},
    sys,
};
use crate::virtio::chain::Broken;

/// Most connections, those still shaking hands included.
pub const MAX_CONNECTIONS: usize = 1023;
/// How long the guest may take to grant a connection, or to let go of one.
const PATIENCE: Duration = Duration::from_secs(2);
/// Resets for packets of no connection that may wait for buffers; the device
/// takes no more packets while they are all taken (virtio 1.2 §5.10.6.1.2).
const MAX_RESETS: usize = 256;
/// Clients accepted per wake-up.
const ACCEPTS: usize = 32;
/// Turns per wake-up.
const TURNS: usize = 64;
/// Ports given to clients on the host.
const HOST_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Tokens of the device's descriptors, after its queues'.
pub mod token {
    /// The listener.
    pub const LISTENER: u32 = 16;
    /// The timer.
    pub const TIMER: u32 = 17;
    /// The first connection.
    pub const FIRST_SLOT: u32 = 64;
}

/// Called with the port of each connection the guest makes.
pub type OnConnect = Arc<dyn Fn(u32) + Send + Sync>;

enum Slot {
    Greeting(Handshake, Watched),
    Stream(Box<Stream>),
}

/// What came of a round of sending to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// There is nothing more to send.
    Idle,
    /// The driver has no buffers left.
    NoBuffers,
    /// There is more: come back after others had their turn.
    More,
}

/// The connections of an active device.
pub struct Muxer {
    guest_cid: u64,
    uds_path: String,
    on_connect: OnConnect,
    watcher: Arc<Watcher>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    keys: HashMap<Key, u32>,
    /// Connections with something for the guest, in turn.
    queue: VecDeque<u32>,
    resets: VecDeque<Header>,
    timer: TimerFd,
    timer_armed: bool,
    next_port: u32,
}

impl Muxer {
    /// No connections yet. The timer is registered here and forgotten on drop.
    pub fn new(
        guest_cid: u64,
        uds_path: &str,
        on_connect: OnConnect,
        watcher: Watcher,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        watcher
            .event_loop
            .register(&timer, EventSet::IN, watcher.handler.clone(), token::TIMER)?;
        Ok(Self {
            guest_cid,
            uds_path: uds_path.to_owned(),
            on_connect,
            watcher: Arc::new(watcher),
            slots: Vec::new(),
            free: Vec::new(),
            keys: HashMap::new(),
            queue: VecDeque::new(),
            resets: VecDeque::new(),
            timer,
            timer_armed: false,
            next_port: HOST_PORTS.start,
        })
    }

    /// Whether another packet of the guest's may be taken: its answer has a
    /// place.
    pub fn can_take(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Connections and handshakes.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The connections that the guest may know of.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.keys.keys().copied()
    }

    /// Resets connections of a machine that this one was made from, behind all
    /// that the guest has yet to read of them.
    pub fn reset_lost(&mut self, keys: &[Key]) {
        self.resets.extend(keys.iter().map(|key| Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host,
            dst_port: key.guest,
            kind: TYPE_STREAM,
            op: Op::Rst as u16,
            ..Header::default()
        }));
    }

    /// Takes what the guest sent.
    pub fn on_sent(&mut self, sent: Sent<'_>) {
        match sent {
            Sent::Packet(header, data) => self.on_packet(&header, Some(data)),
            Sent::Truncated(header) => self.on_packet(&header, None),
            Sent::Short => limited!(debug, "guest sent a vsock packet without a header"),
        }
    }

    fn on_packet(&mut self, header: &Header, data: Option<Span<'_>>) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            limited!(
                debug,
                source = header.src_cid,
                destination = header.dst_cid,
                "guest sent a vsock packet that is not from it to the host"
            );
            return;
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let found = self.keys.get(&key).copied();
        let (Some(op), Some(data), TYPE_STREAM) = (Op::from_raw(header.op), data, header.kind)
        else {
            // It lies, or speaks of things that do not exist.
            match found {
                Some(slot) if header.kind == TYPE_STREAM => {
                    self.with_stream(slot, |stream| stream.connection.on_violation());
                }
                _ => self.reset(header),
            }
            return;
        };
        match (op, found) {
            (Op::Request, None) => self.on_request(key, header),
            (Op::Request, Some(slot)) if self.is_over_for_guest(slot) => {
                self.keys.remove(&key);
                self.with_stream(slot, |stream| stream.connection.abandon());
                self.on_request(key, header);
            }
            (_, Some(slot)) => {
                self.with_stream(slot, |stream| {
                    match stream.connection.on_guest(op, header) {
                        Verdict::Deliver => stream.deliver(data),
                        Verdict::Granted => stream.greet(),
                        Verdict::Discard | Verdict::Ignore => {}
                    }
                });
            }
            (_, None) => self.reset(header),
        }
    }

    fn is_over_for_guest(&self, slot: u32) -> bool {
        match self.slots.get(slot as usize) {
            Some(Some(Slot::Stream(stream))) => stream.connection.is_over_for_guest(),
            _ => false,
        }
    }

    /// Answers a packet of no connection; a reset is never answered.
    fn reset(&mut self, header: &Header) {
        if header.op == Op::Rst as u16 {
            return;
        }
        debug_assert!(self.can_take(), "the caller asked before it took a packet");
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Rst as u16,
            ..Header::default()
        });
    }

    fn on_request(&mut self, key: Key, header: &Header) {
        if self.len() >= MAX_CONNECTIONS {
            limited!(debug, port = key.host, "too many vsock connections");
            self.reset(header);
            return;
        }
        let path = PathBuf::from(format!("{}_{}", self.uds_path, key.host));
        match sys::connect(&path) {
            Ok(socket) => {
                let slot = self.allocate();
                let watched = Watched::new(socket, Arc::clone(&self.watcher), slot_token(slot));
                let stream = Stream::new(key, Connection::accepted(header), watched);
                self.slots[slot as usize] = Some(Slot::Stream(Box::new(stream)));
                self.keys.insert(key, slot);
                (self.on_connect)(key.host);
                self.settle(slot);
            }
            Err(error) => {
                limited!(debug, port = key.host, %error, "guest's vsock connection refused");
                self.reset(header);
            }
        }
    }

    /// Takes clients from the listener.
    pub fn on_listener(&mut self, listener: &UnixListener) {
        for _ in 0..ACCEPTS {
            let socket = match sys::accept(listener) {
                Ok(socket) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    limited!(warn, %error, "vsock client not accepted");
                    return;
                }
            };
            if self.len() >= MAX_CONNECTIONS {
                // Closed: that is how a client learns of a refusal.
                limited!(warn, "vsock client refused: too many connections");
                continue;
            }
            let slot = self.allocate();
            let watched = Watched::new(socket, Arc::clone(&self.watcher), slot_token(slot));
            self.slots[slot as usize] = Some(Slot::Greeting(Handshake::default(), watched));
            // The line is mostly there already.
            self.on_slot(slot, EventSet::IN);
        }
    }

    /// A connection's socket has something to say.
    pub fn on_slot(&mut self, slot: u32, events: EventSet) {
        match self.slots.get_mut(slot as usize) {
            Some(Some(Slot::Stream(stream))) => {
                stream.on_events(events);
                self.settle(slot);
            }
            Some(Some(Slot::Greeting(handshake, watched))) => {
                match handshake.read(watched.socket()) {
                    Progress::Partial => {
                        if watched.arm(Some(EventSet::IN)).is_err() {
                            self.release(slot);
                        }
                    }
                    Progress::Failed => self.release(slot),
                    Progress::Port(port) => self.ask_guest(slot, port),
                }
            }
            // An event from before it went.
            _ => {}
        }
    }

    fn ask_guest(&mut self, slot: u32, port: u32) {
        let key = self.key_for(port);
        let Some(Slot::Greeting(_, watched)) = self.slots[slot as usize].take() else {
            return;
        };
        let stream = Stream::new(key, Connection::requested(), watched);
        self.slots[slot as usize] = Some(Slot::Stream(Box::new(stream)));
        self.keys.insert(key, slot);
        self.settle(slot);
    }

    /// A key nobody uses; there are far more ports than connections.
    fn key_for(&mut self, guest: u32) -> Key {
        loop {
            let key = Key {
                host: self.next_port,
                guest,
            };
            self.next_port += 1;
            if !HOST_PORTS.contains(&self.next_port) {
                self.next_port = HOST_PORTS.start;
            }
            if !self.keys.contains_key(&key) {
                return key;
            }
        }
    }

    fn allocate(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        })
    }

    fn release(&mut self, slot: u32) {
        if let Some(Slot::Stream(stream)) = self.slots[slot as usize].take() {
            self.forget_key(stream.key, slot);
            if stream.queued {
                self.queue.retain(|queued| *queued != slot);
            }
        }
        self.free.push(slot);
    }

    /// Unless the guest has made a new connection of the same ports.
    fn forget_key(&mut self, key: Key, slot: u32) {
        if self.keys.get(&key) == Some(&slot) {
            self.keys.remove(&key);
        }
    }

    fn with_stream(&mut self, slot: u32, act: impl FnOnce(&mut Stream)) {
        if let Some(Some(Slot::Stream(stream))) = self.slots.get_mut(slot as usize) {
            act(stream);
            self.settle(slot);
        }
    }

    /// Draws the consequences of a change of a connection.
    fn settle(&mut self, slot: u32) {
        let Some(Some(Slot::Stream(stream))) = self.slots.get_mut(slot as usize) else {
            return;
        };
        stream.settle();
        if stream.has_output() && !stream.queued {
            stream.queued = true;
            self.queue.push_back(slot);
        }
        if !stream.connection.is_waiting() {
            stream.deadline = None;
        } else if stream.deadline.is_none() {
            stream.deadline = Some(Instant::now() + PATIENCE);
            if !self.timer_armed {
                self.timer_armed = arm(&mut self.timer, PATIENCE);
            }
        }
        let key = stream.key;
        match stream.connection.phase() {
            Phase::Gone => self.release(slot),
            // The guest knows nothing of it any more.
            Phase::Orphan => self.forget_key(key, slot),
            _ => {}
        }
    }

    /// The timer went off: gives up where patience has run out.
    pub fn on_timer(&mut self) {
        self.timer_armed = false;
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for slot in 0..self.slots.len() {
            let Some(Slot::Stream(stream)) = &mut self.slots[slot] else {
                continue;
            };
            match stream.deadline {
                Some(deadline) if deadline <= now => {
                    stream.deadline = None;
                    stream.connection.on_host(HostEvent::Timeout);
                    self.settle(slot as u32);
                }
                Some(deadline) => next = Some(next.map_or(deadline, |next| next.min(deadline))),
                None => {}
            }
        }
        if let Some(next) = next {
            self.timer_armed = arm(&mut self.timer, next.saturating_duration_since(now));
        } else if !self.timer_armed {
            // Stops the descriptor from being ready.
            if let Err(error) = self.timer.clear() {
                limited!(warn, %error, "vsock timer not cleared");
            }
        }
    }

    /// Drops everything, without a word to the guest.
    pub fn drop_all(&mut self) {
        self.slots.clear();
        self.free.clear();
        self.keys.clear();
        self.queue.clear();
        self.resets.clear();
    }

    /// Sends to the guest: each connection in its turn, as long as the driver
    /// has buffers and the round lasts.
    pub fn send(&mut self, receive: &mut Receive<'_>) -> Result<Round, Broken> {
        for _ in 0..TURNS {
            if let Some(header) = self.resets.front() {
                let Some(buffer) = receive.take()? else {
                    return Ok(Round::NoBuffers);
                };
                receive.put(&buffer, header)?;
                self.resets.pop_front();
                continue;
            }
            let Some(slot) = self.queue.front().copied() else {
                return Ok(Round::Idle);
            };
            let Some(Some(Slot::Stream(stream))) = self.slots.get_mut(slot as usize) else {
                self.queue.pop_front();
                continue;
            };
            if !stream.send(self.guest_cid, receive)? {
                return Ok(Round::NoBuffers);
            }
            stream.queued = false;
            self.queue.pop_front();
            // To the end of the queue, if it has more.
            self.settle(slot);
        }
        Ok(Round::More)
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        self.watcher.event_loop.unregister(&self.timer);
    }
}

/// Sets the timer; whether it is set.
fn arm(timer: &mut TimerFd, after: Duration) -> bool {
    // Zero would disarm it.
    match timer.reset(after.max(Duration::from_millis(1)), None) {
        Ok(()) => true,
        Err(error) => {
            limited!(warn, %error, "vsock timer not set");
            false
        }
    }
}

/// The loop's token for a connection.
fn slot_token(slot: u32) -> u32 {
    token::FIRST_SLOT + slot
}
