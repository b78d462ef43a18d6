// SPDX-License-Identifier: Apache-2.0
//! A connection with its socket: moves bytes as the state allows.

use std::{
    collections::VecDeque, io, net::Shutdown, os::unix::net::UnixStream, sync::Arc, time::Instant,
};

use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::{
    connection::{Connection, HostEvent, Output, Phase},
    packet::{Header, Op, Span, HOST_CID, TYPE_STREAM},
    rx::{Buffer, Receive},
    sys,
};
use crate::{
    event::{HandlerRef, LoopHandle},
    virtio::chain::Broken,
};

/// Most bytes of the host's per turn: one packet of a connection that sends
/// much does not keep the others waiting.
const TURN: usize = 64 * 1024;
/// Most buffers filled by one system call.
const MAX_BURST: usize = 32;
/// Bytes of data a packet may carry.
const MAX_PACKET: usize = 64 * 1024;

/// A connection's ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

/// What sockets are watched by.
#[derive(Clone)]
pub struct Watcher {
    /// The device's loop.
    pub event_loop: LoopHandle,
    /// The device.
    pub handler: HandlerRef,
}

/// A socket watched by the loop; closes and forgets it on drop.
pub struct Watched {
    socket: UnixStream,
    watcher: Arc<Watcher>,
    token: u32,
    armed: Option<EventSet>,
}

impl Watched {
    /// Watches nothing yet.
    pub fn new(socket: UnixStream, watcher: Arc<Watcher>, token: u32) -> Self {
        Self {
            socket,
            watcher,
            token,
            armed: None,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Watches for `events`, and always for errors; `None`: for nothing.
    pub fn arm(&mut self, events: Option<EventSet>) -> io::Result<()> {
        if self.armed == events {
            return Ok(());
        }
        let event_loop = &self.watcher.event_loop;
        match (self.armed, events) {
            (None, Some(events)) => event_loop.register(
                &self.socket,
                events,
                self.watcher.handler.clone(),
                self.token,
            )?,
            (Some(_), Some(events)) => event_loop.modify(&self.socket, events)?,
            (_, None) => event_loop.unregister(&self.socket),
        }
        self.armed = events;
        Ok(())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.armed.is_some() {
            self.watcher.event_loop.unregister(&self.socket);
        }
    }
}

/// One connection.
pub struct Stream {
    /// Its ports.
    pub key: Key,
    /// Its state.
    pub connection: Connection,
    /// Gone once nothing is to be read or written any more.
    socket: Option<Watched>,
    /// The guest's bytes that the socket did not take yet.
    held: VecDeque<u8>,
    /// The socket may have something to read.
    readable: bool,
    hung_up: bool,
    write_closed: bool,
    read_closed: bool,
    /// Buffers to fill by the next read.
    burst: usize,
    /// Whether it waits for its turn to send to the guest.
    pub queued: bool,
    /// When to give up waiting for the guest.
    pub deadline: Option<Instant>,
}

impl Stream {
    /// A connection on a socket.
    pub fn new(key: Key, connection: Connection, socket: Watched) -> Self {
        Self {
            key,
            connection,
            socket: Some(socket),
            held: VecDeque::new(),
            readable: false,
            hung_up: false,
            write_closed: false,
            read_closed: false,
            burst: 1,
            queued: false,
            deadline: None,
        }
    }

    /// The socket has something to say.
    pub fn on_events(&mut self, events: EventSet) {
        let Some(watched) = &self.socket else {
            return;
        };
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR)
            // The event may be one of a descriptor that had this number.
            && sys::is_hung_up(watched.socket())
        {
            // There may be bytes to read; more cannot come, and none can go.
            self.hung_up = true;
            self.readable = true;
            self.drop_held();
            self.connection.on_host(HostEvent::Unwritable);
            if self.connection.phase() == Phase::Requested {
                self.connection.on_host(HostEvent::Failed);
            }
        }
        if events.contains(EventSet::IN) {
            self.readable = true;
        }
        if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Tells the host's client that the guest granted the connection.
    pub fn greet(&mut self) {
        let Some(watched) = &self.socket else {
            return;
        };
        let line = format!("OK {}\n", self.key.host);
        // Nothing was written before it, so it fits.
        if !matches!(sys::send_bytes(watched.socket(), &[line.as_bytes()]), Ok(sent) if sent == line.len())
        {
            self.connection.on_host(HostEvent::Failed);
        }
    }

    /// Passes data of the guest on.
    pub fn deliver(&mut self, mut data: Span<'_>) {
        while self.held.is_empty() && !data.is_empty() {
            let Some(watched) = &self.socket else {
                return;
            };
            match sys::send(watched.socket(), data.slices()) {
                Ok(sent) => {
                    data.split_front(sent);
                    self.connection.host_took(sent as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.connection.on_host(HostEvent::Unwritable);
                    return;
                }
            }
        }
        let mut rest = vec![0; data.len()];
        data.read(&mut rest);
        self.held.extend(rest);
    }

    fn flush(&mut self) {
        while !self.held.is_empty() {
            let Some(watched) = &self.socket else {
                return;
            };
            let (first, second) = self.held.as_slices();
            match sys::send_bytes(watched.socket(), &[first, second]) {
                Ok(sent) => {
                    self.held.drain(..sent);
                    self.connection.host_took(sent as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.drop_held();
                    self.connection.on_host(HostEvent::Unwritable);
                    return;
                }
            }
        }
        self.drop_held();
    }

    /// Gives the memory back: most connections never hold anything.
    fn drop_held(&mut self) {
        self.held = VecDeque::new();
    }

    /// Does what the state asks of the socket. Call after every change.
    pub fn settle(&mut self) {
        let phase = self.connection.phase();
        if matches!(phase, Phase::Closing | Phase::Resetting | Phase::Gone) {
            self.socket = None;
            self.drop_held();
            return;
        }
        let Some(watched) = &mut self.socket else {
            return;
        };
        if self.connection.to_host_ended() && !self.write_closed {
            self.write_closed = true;
            // It may be closed already.
            let _ = watched.socket().shutdown(Shutdown::Write);
        }
        if self.connection.to_guest_refused() && !self.read_closed {
            self.read_closed = true;
            let _ = watched.socket().shutdown(Shutdown::Read);
        }
        if self.readable {
            self.connection.host_has_data();
        }
        let events = if self.hung_up {
            None
        } else {
            let mut events = EventSet::empty();
            if self.connection.takes_data() && !self.readable {
                events |= EventSet::IN;
            }
            if !self.held.is_empty() {
                events |= EventSet::OUT;
            }
            Some(events)
        };
        if watched.arm(events).is_err() {
            // Out of memory for a watch; the connection would hang.
            self.connection.on_host(HostEvent::Failed);
        }
    }

    /// Whether something is to be sent to the guest.
    pub fn has_output(&self) -> bool {
        self.connection.next(self.readable).is_some()
    }

    /// Sends one packet, or one turn's worth of data, if there is any. False:
    /// the driver has no buffer left.
    pub fn send(&mut self, guest_cid: u64, receive: &mut Receive<'_>) -> Result<bool, Broken> {
        loop {
            match self.connection.next(self.readable) {
                None => return Ok(true),
                Some(output @ Output::Control(op, flags)) => {
                    let Some(buffer) = receive.take()? else {
                        return Ok(false);
                    };
                    let mut header = self.header(guest_cid, op);
                    header.flags = flags;
                    self.connection.told(output, &mut header);
                    receive.put(&buffer, &header)?;
                    return Ok(true);
                }
                Some(Output::Data(credit)) => match self.send_data(guest_cid, credit, receive)? {
                    Sending::NoBuffers => return Ok(false),
                    Sending::Sent => return Ok(true),
                    // Something else may be owed.
                    Sending::Nothing => {}
                },
            }
        }
    }

    fn send_data(
        &mut self,
        guest_cid: u64,
        credit: u32,
        receive: &mut Receive<'_>,
    ) -> Result<Sending, Broken> {
        let wanted = TURN.min(credit as usize);
        let mut buffers: Vec<Buffer<'_>> = Vec::new();
        let mut pieces: Vec<VolatileSlice<'_>> = Vec::new();
        let mut room = 0;
        while buffers.len() < self.burst && room < wanted {
            let Some(mut buffer) = receive.take()? else {
                break;
            };
            buffer.data.truncate(MAX_PACKET.min(wanted - room));
            // A buffer that takes no data would stop the stream for good.
            if buffer.data.is_empty() {
                return Err(Broken);
            }
            if pieces.len() + buffer.data.slices().len() > sys::MAX_PIECES {
                receive.give_back(1);
                break;
            }
            room += buffer.data.len();
            pieces.extend_from_slice(buffer.data.slices());
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            return Ok(Sending::NoBuffers);
        }
        let Some(watched) = &self.socket else {
            receive.give_back(buffers.len());
            self.readable = false;
            return Ok(Sending::Nothing);
        };
        let mut got = match sys::receive(watched.socket(), &pieces) {
            Ok(got) if got > 0 => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                receive.give_back(buffers.len());
                self.readable = false;
                return Ok(Sending::Nothing);
            }
            // The end; a reset by the host comes after all its data.
            Ok(_) | Err(_) => {
                receive.give_back(buffers.len());
                self.readable = false;
                self.connection.on_host(HostEvent::Ended);
                return Ok(Sending::Nothing);
            }
        };
        if got == room {
            self.burst = (self.burst * 4).min(MAX_BURST);
        } else {
            self.burst = 1;
            // Without a watch, only the socket itself tells of its end.
            self.readable = self.hung_up;
        }
        let mut filled = 0;
        for buffer in &buffers {
            if got == 0 {
                break;
            }
            let length = got.min(buffer.data.len());
            got -= length;
            filled += 1;
            let mut header = self.header(guest_cid, Op::Rw);
            header.len = length as u32;
            self.connection.told(Output::Data(header.len), &mut header);
            receive.put(buffer, &header)?;
        }
        receive.give_back(buffers.len() - filled);
        Ok(Sending::Sent)
    }

    fn header(&self, guest_cid: u64, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host,
            dst_port: self.key.guest,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }
}

enum Sending {
    NoBuffers,
    Sent,
    Nothing,
}
