// SPDX-License-Identifier: Apache-2.0
//! All connections of a guest, and the way of packets between them and the
//! queues.
//!
//! Host sockets are watched edge-triggered, for both directions, from the
//! start: a connection remembers what its socket may do, and costs no
//! epoll_ctl after it was made.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, UnixAddr};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    connection::{Connection, Outcome, Phase, BUFFER},
    device::OnConnect,
    event::FIRST_SOCKET,
    handshake::{Handshake, Progress},
    packet::{Header, Op, HEADER, MAX_PAYLOAD, STREAM},
};
use crate::{
    event::{HandlerRef, LoopHandle},
    virtio::chain::{pop, segments, wants_interrupt, Broken, Chain, Queues, Segment},
};

/// VMADDR_CID_HOST.
const HOST_CID: u64 = 2;
/// Most connections and handshakes at once.
const MAX_SOCKETS: usize = 1023;
/// RSTs for unknown connections that may wait; more are dropped.
const MAX_RESETS: usize = 128;
/// First port of the host's own for its connections.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// How long the guest may take to answer a request or a shutdown.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Packets sent to the guest per wake-up.
const ROUND: usize = 128;
/// Connections accepted per wake-up.
const ACCEPTS: usize = 16;

/// Names a connection: the host's port and the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    host: u32,
    guest: u32,
}

struct Entry {
    connection: Connection,
    stream: UnixStream,
    token: u32,
    /// The socket has been shut for writing.
    write_shut: bool,
    read_shut: bool,
}

/// The connections.
pub struct Muxer {
    cid: u64,
    uds_path: String,
    on_connect: OnConnect,
    connections: HashMap<Key, Entry>,
    handshakes: HashMap<u32, Handshake>,
    tokens: HashMap<u32, Key>,
    next_token: u32,
    next_port: u32,
    /// Connections with something to say, in turn.
    ready: VecDeque<Key>,
    /// RSTs for what is not known.
    resets: VecDeque<Key>,
    /// Deadlines, in order: all are equally long.
    deadlines: VecDeque<(Instant, Key, u32)>,
}

impl Muxer {
    /// No connections yet.
    pub fn new(cid: u64, uds_path: String, on_connect: OnConnect) -> Self {
        Self {
            cid,
            uds_path,
            on_connect,
            connections: HashMap::new(),
            handshakes: HashMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_SOCKET,
            next_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: VecDeque::new(),
        }
    }

    /// Drops everything: the driver was reset.
    pub fn clear(&mut self, event_loop: &LoopHandle) {
        for (_, entry) in self.connections.drain() {
            event_loop.unregister(&entry.stream);
        }
        for (_, handshake) in self.handshakes.drain() {
            event_loop.unregister(&handshake.stream);
        }
        self.tokens.clear();
        self.ready.clear();
        self.resets.clear();
        self.deadlines.clear();
    }

    // --- from the guest

    /// Takes one packet of the guest.
    pub fn from_guest(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        event_loop: &LoopHandle,
        handler: &HandlerRef,
    ) -> Result<u32, Broken> {
        let (readable, _) = segments(chain);
        let mut bytes = [0; HEADER];
        let payload = split_header(memory, &readable, Some(&mut bytes))?;
        let header = Header::parse(&bytes);
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            // Not this guest, or not for this host: nobody to answer.
            return Ok(0);
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let op = match (header.kind, header.op) {
            (STREAM, Some(op)) => op,
            _ => {
                self.reset(key);
                return Ok(0);
            }
        };
        if op == Op::Request {
            self.guest_asks(key, &header, event_loop, handler);
            return Ok(0);
        }
        let Some(entry) = self.connections.get_mut(&key) else {
            if op != Op::Reset {
                self.reset(key);
            }
            return Ok(0);
        };
        entry.connection.set_credit(header.buf_alloc, header.fwd_cnt);
        if op == Op::Data {
            let length = header.length as usize;
            let available: usize = payload.iter().map(|s| s.length as usize).sum();
            if length > MAX_PAYLOAD || length > available {
                entry.connection.kill();
            } else {
                take_data(memory, entry, &payload, length)?;
            }
        } else {
            match entry.connection.control(op, header.flags) {
                Outcome::Continue => {}
                Outcome::Accepted => {
                    // The program waits for this line; a socket that has just
                    // been made has room for it.
                    use std::io::Write;
                    let line = format!("OK {}\n", key.host);
                    if entry.stream.write_all(line.as_bytes()).is_err() {
                        entry.connection.kill();
                    }
                }
                Outcome::Gone => {
                    self.forget(key, event_loop);
                    return Ok(0);
                }
            }
        }
        self.settle(key);
        Ok(0)
    }

    /// The guest wants a connection to a port of the host.
    fn guest_asks(
        &mut self,
        key: Key,
        header: &Header,
        event_loop: &LoopHandle,
        handler: &HandlerRef,
    ) {
        if self.connections.contains_key(&key) {
            // The guest has forgotten the old one.
            self.forget(key, event_loop);
        }
        let full = self.connections.len() + self.handshakes.len() >= MAX_SOCKETS;
        let stream = if full {
            Err(io::Error::from_raw_os_error(libc::EMFILE))
        } else {
            dial(&format!("{}_{}", self.uds_path, key.host))
        };
        match stream {
            Ok(stream) => {
                let connection = Connection::from_guest(header.buf_alloc, header.fwd_cnt);
                if self.add(key, connection, stream, event_loop, handler) {
                    (self.on_connect)(key.host);
                }
            }
            Err(error) => {
                tracing::debug!(port = key.host, %error, "connection of the guest refused");
                self.reset(key);
            }
        }
    }

    // --- from the host

    /// Accepts host programs.
    pub fn accept(
        &mut self,
        listener: &UnixListener,
        event_loop: &LoopHandle,
        handler: &HandlerRef,
    ) {
        for _ in 0..ACCEPTS {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            if self.connections.len() + self.handshakes.len() >= MAX_SOCKETS
                || stream.set_nonblocking(true).is_err()
            {
                continue;
            }
            let token = self.token();
            let watched = event_loop.register(
                &stream,
                EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
                handler.clone(),
                token,
            );
            if watched.is_ok() {
                self.handshakes.insert(token, Handshake::new(stream));
                // The line may be there already.
                self.shake(token, event_loop);
            }
        }
    }

    fn shake(&mut self, token: u32, event_loop: &LoopHandle) {
        let Some(handshake) = self.handshakes.get_mut(&token) else {
            return;
        };
        let progress = handshake.read();
        if progress == Progress::Waiting {
            return;
        }
        let Some(handshake) = self.handshakes.remove(&token) else {
            return;
        };
        match progress {
            Progress::Port(guest) => {
                let key = Key {
                    host: self.free_port(guest),
                    guest,
                };
                self.tokens.insert(token, key);
                self.connections.insert(
                    key,
                    Entry {
                        connection: Connection::from_host(),
                        stream: handshake.stream,
                        token,
                        write_shut: false,
                        read_shut: false,
                    },
                );
                self.deadline(key, token);
                self.enqueue(key);
            }
            Progress::Bad | Progress::Waiting => event_loop.unregister(&handshake.stream),
        }
    }

    /// A host socket can do something it could not before.
    pub fn socket_ready(
        &mut self,
        token: u32,
        events: EventSet,
        event_loop: &LoopHandle,
        _handler: &HandlerRef,
    ) {
        if self.handshakes.contains_key(&token) {
            self.shake(token, event_loop);
            return;
        }
        let Some(&key) = self.tokens.get(&token) else {
            return;
        };
        let Some(entry) = self.connections.get_mut(&key) else {
            return;
        };
        if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            entry.connection.readable = true;
        }
        if events.contains(EventSet::OUT) {
            entry.connection.writable = true;
            write_backlog(entry);
        }
        self.settle(key);
    }

    /// Ends connections whose guest did not answer in time.
    pub fn expire(&mut self) {
        let now = Instant::now();
        while let Some((deadline, key, token)) = self.deadlines.front().copied() {
            if deadline > now {
                return;
            }
            self.deadlines.pop_front();
            if let Some(entry) = self.connections.get_mut(&key) {
                let late = entry.connection.phase() == Phase::Asked
                    || entry.connection.awaits_guest();
                if entry.token == token && late {
                    entry.connection.kill();
                    self.enqueue(key);
                }
            }
        }
    }

    /// When [`Self::expire`] wants to be called.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.deadlines.front().map(|(deadline, ..)| {
            deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1))
        })
    }

    // --- to the guest

    /// Fills receive buffers with what connections have to say, in turn.
    pub fn to_guest(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let memory = queues.memory.memory();
        let interrupt = Arc::clone(&queues.interrupt);
        let event_loop = queues.event_loop.clone();
        let Some(queue) = queues.get(0) else {
            return Ok(());
        };
        let before = queue.next_used();
        let mut left = ROUND;
        while !self.ready.is_empty() || !self.resets.is_empty() {
            if left == 0 {
                if let Some(kick) = queues.kick(0) {
                    let _ = kick.write(1);
                }
                break;
            }
            left -= 1;
            let queue = queues.get(0).ok_or(Broken)?;
            let Some(chain) = pop(queue, &memory)? else {
                if queue.enable_notification(&*memory).map_err(|_| Broken)? {
                    continue;
                }
                // The driver's next notification continues.
                break;
            };
            let head = chain.head_index();
            let (_, writable) = segments(chain);
            match self.fill(&memory, &writable, &event_loop)? {
                Some(length) => queue
                    .add_used(&*memory, head, length)
                    .map_err(|_| Broken)?,
                None => queue.go_to_previous_position(),
            }
        }
        let queue = queues.get(0).ok_or(Broken)?;
        if queue.next_used() != before && wants_interrupt(queue, &memory, before) {
            interrupt.signal_queue(0);
        }
        Ok(())
    }

    /// Fills one buffer; none when nobody had anything to say after all.
    fn fill(
        &mut self,
        memory: &GuestMemoryMmap,
        writable: &[Segment],
        event_loop: &LoopHandle,
    ) -> Result<Option<u32>, Broken> {
        if let Some(key) = self.resets.pop_front() {
            let header = self.header(key, Op::Reset, 0, 0, (0, 0));
            return put_header(memory, writable, &header).map(Some);
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(entry) = self.connections.get_mut(&key) else {
                continue;
            };
            entry.connection.queued = false;
            let mut wants_data = entry.connection.wants_data();
            if let Some((op, flags)) = entry.connection.next_control() {
                let credit = entry.connection.announce();
                let over = entry.connection.phase() == Phase::Over;
                if op == Op::Shutdown && entry.connection.awaits_guest() {
                    let token = entry.token;
                    self.deadline(key, token);
                }
                let header = self.header(key, op, flags, 0, credit);
                if over {
                    self.forget(key, event_loop);
                } else {
                    self.settle(key);
                }
                return put_header(memory, writable, &header).map(Some);
            }
            if wants_data {
                let payload = split_header(memory, writable, None)?;
                let limit = (entry.connection.credit() as usize).min(MAX_PAYLOAD);
                match read_into(memory, &entry.stream, &payload, limit)? {
                    Ok(0) => {
                        let both = hung_up(&entry.stream);
                        entry.connection.host_ended(both);
                    }
                    Ok(count) => {
                        entry.connection.sent(count as u32);
                        let credit = entry.connection.announce();
                        let header = self.header(key, Op::Data, 0, count as u32, credit);
                        self.settle(key);
                        put_header(memory, writable, &header)?;
                        return Ok(Some((HEADER + count) as u32));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        entry.connection.readable = false;
                    }
                    Err(_) => entry.connection.host_ended(true),
                }
                wants_data = false;
            }
            debug_assert!(!wants_data);
            self.settle(key);
        }
        Ok(None)
    }

    // --- bookkeeping

    fn header(&self, key: Key, op: Op, flags: u32, length: u32, credit: (u32, u32)) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.host,
            dst_port: key.guest,
            length,
            kind: STREAM,
            op: Some(op),
            flags,
            buf_alloc: credit.0,
            fwd_cnt: credit.1,
        }
    }

    /// After a change: shuts the host's socket where a direction has ended,
    /// and puts the connection in the queue if it has something to say.
    fn settle(&mut self, key: Key) {
        let Some(entry) = self.connections.get_mut(&key) else {
            return;
        };
        let connection = &mut entry.connection;
        if connection.guest_ended() && !entry.write_shut {
            entry.write_shut = true;
            // It may be gone already.
            let _ = entry.stream.shutdown(std::net::Shutdown::Write);
        }
        if connection.guest_refuses() && !entry.read_shut {
            entry.read_shut = true;
            let _ = entry.stream.shutdown(std::net::Shutdown::Read);
        }
        if connection.wants_data() || connection.owes() {
            self.enqueue(key);
        }
    }

    fn enqueue(&mut self, key: Key) {
        if let Some(entry) = self.connections.get_mut(&key) {
            if !std::mem::replace(&mut entry.connection.queued, true) {
                self.ready.push_back(key);
            }
        }
    }

    fn reset(&mut self, key: Key) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }

    fn deadline(&mut self, key: Key, token: u32) {
        self.deadlines
            .push_back((Instant::now() + ANSWER_WITHIN, key, token));
    }

    fn token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            self.next_token = token.checked_add(1).unwrap_or(FIRST_SOCKET);
            if !self.tokens.contains_key(&token) && !self.handshakes.contains_key(&token) {
                return token;
            }
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = FIRST_HOST_PORT + (host + 1 - FIRST_HOST_PORT) % FIRST_HOST_PORT;
            if !self.connections.contains_key(&Key { host, guest }) {
                return host;
            }
        }
    }

    fn add(
        &mut self,
        key: Key,
        connection: Connection,
        stream: UnixStream,
        event_loop: &LoopHandle,
        handler: &HandlerRef,
    ) -> bool {
        let token = self.token();
        let watched = event_loop.register(
            &stream,
            EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
            handler.clone(),
            token,
        );
        if let Err(error) = watched {
            tracing::warn!(%error, "connection cannot be watched");
            self.reset(key);
            return false;
        }
        self.tokens.insert(token, key);
        self.connections.insert(
            key,
            Entry {
                connection,
                stream,
                token,
                write_shut: false,
                read_shut: false,
            },
        );
        self.enqueue(key);
        true
    }

    fn forget(&mut self, key: Key, event_loop: &LoopHandle) {
        if let Some(entry) = self.connections.remove(&key) {
            event_loop.unregister(&entry.stream);
            self.tokens.remove(&entry.token);
        }
    }
}

/// Connects without waiting: a program that does not accept fast enough
/// refuses.
fn dial(path: &str) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(fd.into())
}

/// Whether the other side has closed both directions.
fn hung_up(stream: &UnixStream) -> bool {
    use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
    use std::os::fd::AsFd;

    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
        && fds[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// Splits the header off a chain's pieces; reads it if wanted.
fn split_header(
    memory: &GuestMemoryMmap,
    pieces: &[Segment],
    header: Option<&mut [u8; HEADER]>,
) -> Result<Vec<Segment>, Broken> {
    let mut rest = Vec::with_capacity(pieces.len());
    let mut taken = 0;
    let mut bytes = [0; HEADER];
    let wanted = header.is_some();
    for piece in pieces {
        let part = (HEADER - taken).min(piece.length as usize);
        if part > 0 {
            if wanted {
                memory
                    .read_slice(&mut bytes[taken..taken + part], piece.address)
                    .map_err(|_| Broken)?;
            }
            taken += part;
        }
        if part < piece.length as usize {
            rest.push(Segment {
                address: GuestAddress(
                    piece.address.0.checked_add(part as u64).ok_or(Broken)?,
                ),
                length: piece.length - part as u32,
            });
        }
    }
    if taken < HEADER {
        return Err(Broken);
    }
    if let Some(header) = header {
        *header = bytes;
    }
    Ok(rest)
}

/// Writes a header to the start of a chain's pieces; its length.
fn put_header(
    memory: &GuestMemoryMmap,
    pieces: &[Segment],
    header: &Header,
) -> Result<u32, Broken> {
    let bytes = header.bytes();
    let mut written = 0;
    for piece in pieces {
        let part = (HEADER - written).min(piece.length as usize);
        memory
            .write_slice(&bytes[written..written + part], piece.address)
            .map_err(|_| Broken)?;
        written += part;
        if written == HEADER {
            return Ok(HEADER as u32);
        }
    }
    Err(Broken)
}

/// The first `limit` bytes of pieces of guest memory as an iovec, to be used
/// while `memory` is borrowed.
fn iovec(
    memory: &GuestMemoryMmap,
    pieces: &[Segment],
    limit: usize,
) -> Result<Vec<libc::iovec>, Broken> {
    let mut vector = Vec::with_capacity(pieces.len());
    let mut left = limit;
    for piece in pieces {
        let length = left.min(piece.length as usize);
        if length == 0 {
            break;
        }
        for slice in memory.get_slices(piece.address, length) {
            let slice = slice.map_err(|_| Broken)?;
            vector.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        left -= length;
    }
    Ok(vector)
}

/// Reads from the host's socket straight into guest memory.
fn read_into(
    memory: &GuestMemoryMmap,
    stream: &UnixStream,
    pieces: &[Segment],
    limit: usize,
) -> Result<io::Result<usize>, Broken> {
    let vector = iovec(memory, pieces, limit)?;
    if vector.is_empty() {
        // A buffer without room for a byte: the driver broke a rule.
        return Err(Broken);
    }
    // SAFETY: every piece lies in guest memory that `memory` keeps mapped.
    let count = unsafe {
        libc::readv(
            stream.as_raw_fd(),
            vector.as_ptr(),
            vector.len() as libc::c_int,
        )
    };
    Ok(usize::try_from(count).map_err(|_| io::Error::last_os_error()))
}

/// Takes the guest's data: straight to the host's socket where it can go,
/// into the backlog where not.
fn take_data(
    memory: &GuestMemoryMmap,
    entry: &mut Entry,
    payload: &[Segment],
    length: usize,
) -> Result<(), Broken> {
    let mut written = 0;
    if entry.connection.direct() && length > 0 {
        let vector = iovec(memory, payload, length)?;
        let message = libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: vector.as_ptr().cast_mut(),
            msg_iovlen: vector.len(),
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        // SAFETY: every piece lies in guest memory that `memory` keeps mapped.
        let count =
            unsafe { libc::sendmsg(entry.stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(count) {
            Ok(count) => written = count,
            Err(_) => {
                if io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock {
                    entry.connection.host_refused();
                }
            }
        }
        if written < length {
            entry.connection.writable = false;
        }
    }
    let mut rest = vec![0; length - written];
    let mut filled = 0;
    let mut skip = written;
    for piece in payload {
        let size = piece.length as usize;
        if skip >= size {
            skip -= size;
            continue;
        }
        let part = (size - skip).min(rest.len() - filled);
        let at = piece.address.0.checked_add(skip as u64).ok_or(Broken)?;
        memory
            .read_slice(&mut rest[filled..filled + part], GuestAddress(at))
            .map_err(|_| Broken)?;
        filled += part;
        skip = 0;
        if filled == rest.len() {
            break;
        }
    }
    debug_assert!(rest.len() <= BUFFER as usize + MAX_PAYLOAD);
    entry.connection.data(written as u32, &rest);
    // It may have become writable in between, without another edge.
    write_backlog(entry);
    Ok(())
}

/// Writes the backlog as far as the host's socket takes it.
fn write_backlog(entry: &mut Entry) {
    while entry.connection.has_backlog() {
        let (first, _) = entry.connection.backlog();
        // SAFETY: pointer and length are those of one slice.
        let count = unsafe {
            libc::send(
                entry.stream.as_raw_fd(),
                first.as_ptr().cast(),
                first.len(),
                libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(count) {
            Ok(count) => entry.connection.drained(count),
            Err(_) => {
                if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
                    entry.connection.writable = false;
                } else {
                    entry.connection.host_refused();
                }
                return;
            }
        }
    }
}
