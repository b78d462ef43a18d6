// SPDX-License-Identifier: Apache-2.0
//! One connection: its state, its credit, and what it has to say next. No
//! I/O happens here.
//!
//! ```text
//! guest asks:  REQUEST ──> Open ──> RESPONSE
//! host asks:   Asked ── REQUEST ──> RESPONSE ──> Open
//! ```
//! An open connection has two directions. Host to guest ends with the host's
//! end of file (SHUTDOWN "no send") or when the guest wants no more; guest to
//! host ends with the guest's SHUTDOWN "no send", once what it sent before has
//! been written. When neither is left, RST ends the connection.

use std::collections::VecDeque;

use super::packet::{self, Op};

/// What the guest may have on its way to the host, in bytes.
pub const BUFFER: u32 = 256 * 1024;

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host asked; the guest has not answered.
    Asked,
    /// Data flows.
    Open,
    /// Ends with the next packet, RST.
    Over,
}

/// What is to be done with the host's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Continue,
    /// The guest accepted: tell the host.
    Accepted,
    /// The connection is gone: forget it, without another packet.
    Gone,
}

/// A connection's state.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    /// Guest to host: bytes taken but not yet written.
    backlog: VecDeque<u8>,
    /// Bytes of the guest that were written or dropped, modulo 2^32.
    fwd_cnt: u32,
    /// `fwd_cnt` as the guest knows it.
    told_fwd_cnt: u32,
    /// Guest's buffer, what it took out, and what was sent to it.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    /// Host's end of file.
    host_done: bool,
    /// The host's socket takes no more.
    host_closed: bool,
    /// The guest's SHUTDOWN flags so far.
    guest_flags: u32,
    /// Control packets to send, each at most once.
    owe_request: bool,
    owe_response: bool,
    owe_shutdown: Option<u32>,
    owe_credit: bool,
    owe_credit_request: bool,
    asked_credit: bool,
    /// Whether the host's socket may have data.
    pub readable: bool,
    /// Whether the host's socket may take data.
    pub writable: bool,
    /// In the queue of connections with something to say.
    pub queued: bool,
}

impl Connection {
    fn new(phase: Phase) -> Self {
        Self {
            phase,
            backlog: VecDeque::new(),
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            host_done: false,
            host_closed: false,
            guest_flags: 0,
            owe_request: false,
            owe_response: false,
            owe_shutdown: None,
            owe_credit: false,
            owe_credit_request: false,
            asked_credit: false,
            readable: false,
            writable: true,
            queued: false,
        }
    }

    /// One that the guest asked for and the host has accepted.
    pub fn from_guest(buf_alloc: u32, fwd_cnt: u32) -> Self {
        let mut this = Self::new(Phase::Open);
        this.set_credit(buf_alloc, fwd_cnt);
        this.owe_response = true;
        this.readable = true;
        this
    }

    /// One that the host asks for.
    pub fn from_host() -> Self {
        let mut this = Self::new(Phase::Asked);
        this.owe_request = true;
        this
    }

    /// Its phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What a packet's header says of the guest's credit.
    pub fn set_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// Bytes the guest can take now. A guest that lies about what it took
    /// gets none.
    pub fn credit(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// A packet other than data arrived from the guest.
    pub fn control(&mut self, op: Op, flags: u32) -> Outcome {
        match (self.phase, op) {
            (_, Op::Reset) => return Outcome::Gone,
            (Phase::Asked, Op::Response) => {
                self.phase = Phase::Open;
                self.readable = true;
                return Outcome::Accepted;
            }
            (Phase::Open, Op::Shutdown) => {
                self.guest_flags |= flags & packet::NEITHER;
                self.settle();
            }
            (Phase::Open, Op::CreditRequest) => self.owe_credit = true,
            (Phase::Open, Op::CreditUpdate) => {}
            // Out of place: the guest gets what it earned.
            _ => self.phase = Phase::Over,
        }
        Outcome::Continue
    }

    /// How many bytes the guest may still send, by what it was told.
    pub fn room(&self) -> u32 {
        BUFFER.saturating_sub(self.backlog.len() as u32)
    }

    /// Whether data of the guest can go to the host's socket directly.
    pub fn direct(&self) -> bool {
        self.phase == Phase::Open
            && self.backlog.is_empty()
            && self.writable
            && !self.host_closed
            && self.guest_flags & packet::NO_SEND == 0
    }

    /// Data arrived, of which `written` bytes went to the host already; `rest`
    /// is kept. Too much of it ends the connection.
    pub fn data(&mut self, written: u32, rest: &[u8]) {
        if self.phase != Phase::Open
            || self.guest_flags & packet::NO_SEND != 0
            || rest.len() > self.room() as usize
        {
            self.phase = Phase::Over;
            return;
        }
        self.forwarded(written);
        if self.host_closed {
            // Nobody reads it; the guest learns from SHUTDOWN.
            self.forwarded(rest.len() as u32);
        } else {
            self.backlog.extend(rest);
        }
    }

    /// What is to be written to the host's socket.
    pub fn backlog(&self) -> (&[u8], &[u8]) {
        self.backlog.as_slices()
    }

    /// Whether something is to be written.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// `count` bytes of the backlog were written.
    pub fn drained(&mut self, count: usize) {
        self.backlog.drain(..count.min(self.backlog.len()));
        self.forwarded(count as u32);
        self.settle();
    }

    fn forwarded(&mut self, count: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count);
        // The guest should not have to wait for the last byte of its credit.
        if self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= BUFFER / 2 {
            self.owe_credit = true;
        }
    }

    /// The host's socket refused data: it is closed.
    pub fn host_refused(&mut self) {
        if !self.host_closed {
            self.host_closed = true;
            let rest = self.backlog.len() as u32;
            self.backlog.clear();
            self.forwarded(rest);
            self.shutdown(packet::NO_RECEIVE);
            self.settle();
        }
    }

    /// The host's end of file. With `both`, it takes no more either.
    pub fn host_ended(&mut self, both: bool) {
        self.readable = false;
        if !self.host_done {
            self.host_done = true;
            self.shutdown(packet::NO_SEND);
        }
        if both {
            self.host_refused();
        }
        self.settle();
    }

    fn shutdown(&mut self, flag: u32) {
        // Flags add up: the guest must not think a direction open again.
        let so_far = if self.host_done { packet::NO_SEND } else { 0 }
            | if self.host_closed { packet::NO_RECEIVE } else { 0 };
        self.owe_shutdown = Some(self.owe_shutdown.unwrap_or(0) | so_far | flag);
    }

    /// Ends the connection once the guest wants neither direction and what it
    /// sent has been written.
    fn settle(&mut self) {
        if self.guest_flags == packet::NEITHER && self.backlog.is_empty() {
            self.phase = Phase::Over;
        }
    }

    /// Whether the host's socket should be shut for writing: the guest sends
    /// no more, and all it sent has been written.
    pub fn guest_ended(&self) -> bool {
        self.guest_flags & packet::NO_SEND != 0 && self.backlog.is_empty()
    }

    /// Whether the guest takes no more.
    pub fn guest_refuses(&self) -> bool {
        self.guest_flags & packet::NO_RECEIVE != 0
    }

    /// Whether data should be read for the guest now. Without credit it is
    /// asked for.
    pub fn wants_data(&mut self) -> bool {
        if self.phase != Phase::Open
            || !self.readable
            || self.host_done
            || self.guest_refuses()
        {
            return false;
        }
        if self.credit() == 0 {
            if !self.asked_credit {
                self.asked_credit = true;
                self.owe_credit_request = true;
            }
            return false;
        }
        true
    }

    /// `count` bytes are on their way to the guest.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The next control packet to send: operation and flags.
    pub fn next_control(&mut self) -> Option<(Op, u32)> {
        if self.phase == Phase::Over {
            return Some((Op::Reset, 0));
        }
        let take = |flag: &mut bool| std::mem::take(flag);
        if take(&mut self.owe_request) {
            Some((Op::Request, 0))
        } else if take(&mut self.owe_response) {
            Some((Op::Response, 0))
        } else if let Some(flags) = self.owe_shutdown.take() {
            Some((Op::Shutdown, flags))
        } else if take(&mut self.owe_credit) {
            Some((Op::CreditUpdate, 0))
        } else if take(&mut self.owe_credit_request) {
            Some((Op::CreditRequest, 0))
        } else {
            None
        }
    }

    /// Whether there is a control packet to send.
    pub fn owes(&self) -> bool {
        self.phase == Phase::Over
            || self.owe_request
            || self.owe_response
            || self.owe_shutdown.is_some()
            || self.owe_credit
            || self.owe_credit_request
    }

    /// Buffer and count for the header of the next packet, which tells them.
    pub fn announce(&mut self) -> (u32, u32) {
        self.told_fwd_cnt = self.fwd_cnt;
        self.owe_credit = false;
        (BUFFER, self.fwd_cnt)
    }

    /// Ends the connection: RST is the next packet.
    pub fn kill(&mut self) {
        self.backlog.clear();
        self.phase = Phase::Over;
    }

    /// Whether the host is done both ways and only the guest's answer is
    /// awaited.
    pub fn awaits_guest(&self) -> bool {
        self.host_done && self.host_closed
    }
}
