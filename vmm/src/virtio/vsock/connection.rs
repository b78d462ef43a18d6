// SPDX-License-Identifier: Apache-2.0
//! One connection's state: what each side has said, what is owed to the guest,
//! and both directions' credit. It decides and counts; sockets and queues are
//! others' business.
//!
//! The directions live apart, since either may end long before the other: the
//! standard input of a container ends while its output goes on.

use super::packet::{shutdown, Header, Op};

/// Bytes of the guest's that a connection holds until the host takes them:
/// the credit a guest has.
pub const BUFFER: u32 = 64 * 1024;
/// So much regained credit is worth a packet of its own.
const UPDATE_AT: u32 = BUFFER / 2;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The host asked for it and the guest has not answered. Has a deadline.
    Requested,
    /// Both sides know of it.
    Open,
    /// The host is gone, the guest was told, and is to let go of it. Has a
    /// deadline.
    Closing,
    /// Over for the guest; what it sent last is still on its way to the host.
    Orphan,
    /// A reset is owed to the guest; nothing else is left.
    Resetting,
    /// Over.
    Gone,
}

/// The direction from host to guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToGuest {
    Open,
    /// The host has sent everything.
    Ended,
    /// The guest will receive nothing more.
    Refused,
}

/// The direction from guest to host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ToHost {
    Open,
    /// The guest has sent everything; the host has not taken it all.
    Draining,
    /// It has.
    Ended,
    /// The host takes nothing more.
    Refused,
}

/// What to do about a packet of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Ignore,
    /// The guest granted the connection: tell the host's client.
    Granted,
    /// Pass its data on to the host.
    Deliver,
    /// Drop its data; it is counted as taken.
    Discard,
}

/// What happened on the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostEvent {
    /// The socket has given all it ever will.
    Ended,
    /// The socket takes nothing more.
    Unwritable,
    /// The socket is no good in either direction.
    Failed,
    /// The deadline has passed.
    Timeout,
}

/// The next packet owed to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// A packet without data, with flags for [`Op::Shutdown`].
    Control(Op, u32),
    /// Data of the host, if it has any: at most so many bytes.
    Data(u32),
}

/// The state of one connection.
#[derive(Debug, Clone)]
pub struct Connection {
    phase: Phase,
    to_guest: ToGuest,
    to_host: ToHost,

    owes_request: bool,
    owes_response: bool,
    owes_credit: bool,
    owes_credit_request: bool,
    /// The guest was asked for credit and has not given any since.
    asked_for_credit: bool,
    shutdown_owed: u32,
    shutdown_told: u32,

    /// The guest's buffer, what its user took of it, and what was sent.
    guest_buffer: u32,
    guest_taken: u32,
    sent: u32,
    /// What the guest sent, what the host took, and what the guest knows the
    /// host took.
    received: u32,
    taken: u32,
    taken_told: u32,
}

impl Connection {
    fn new(phase: Phase) -> Self {
        Self {
            phase,
            to_guest: ToGuest::Open,
            to_host: ToHost::Open,
            owes_request: false,
            owes_response: false,
            owes_credit: false,
            owes_credit_request: false,
            asked_for_credit: false,
            shutdown_owed: 0,
            shutdown_told: 0,
            guest_buffer: 0,
            guest_taken: 0,
            sent: 0,
            received: 0,
            taken: 0,
            taken_told: 0,
        }
    }

    /// A connection that a client on the host asks for.
    pub fn requested() -> Self {
        Self {
            owes_request: true,
            ..Self::new(Phase::Requested)
        }
    }

    /// A connection the guest asked for, by `request`, and gets.
    pub fn accepted(request: &Header) -> Self {
        Self {
            owes_response: true,
            guest_buffer: request.buf_alloc,
            guest_taken: request.fwd_cnt,
            ..Self::new(Phase::Open)
        }
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether a deadline runs.
    pub fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Requested | Phase::Closing)
    }

    /// Whether the guest considers the connection over, or is about to, so
    /// that it may use the ports anew.
    pub fn is_over_for_guest(&self) -> bool {
        match self.phase {
            Phase::Closing | Phase::Orphan | Phase::Resetting | Phase::Gone => true,
            Phase::Requested => false,
            Phase::Open => {
                self.to_guest == ToGuest::Refused
                    && matches!(self.to_host, ToHost::Draining | ToHost::Ended)
            }
        }
    }

    /// The guest uses the ports anew: nothing is owed to it any more.
    pub fn abandon(&mut self) {
        self.phase = match (self.phase, self.to_host) {
            (Phase::Orphan, _) | (Phase::Open, ToHost::Draining) => Phase::Orphan,
            _ => Phase::Gone,
        };
    }

    /// Takes a packet of the guest's, `op` being the header's.
    pub fn on_guest(&mut self, op: Op, header: &Header) -> Verdict {
        if matches!(self.phase, Phase::Requested | Phase::Open | Phase::Closing) {
            self.learn_credit(header);
        }
        match (self.phase, op) {
            (Phase::Orphan | Phase::Gone, _) => Verdict::Ignore,
            // Never a reset for a reset.
            (Phase::Resetting | Phase::Requested | Phase::Closing, Op::Rst) => {
                self.phase = Phase::Gone;
                Verdict::Ignore
            }
            (Phase::Open, Op::Rst) => {
                // What it had sent before it ended its direction in order is
                // the host's all the same.
                self.phase = if self.to_host == ToHost::Draining {
                    Phase::Orphan
                } else {
                    Phase::Gone
                };
                Verdict::Ignore
            }
            (Phase::Resetting, _) => Verdict::Ignore,
            // Only to what was asked.
            (Phase::Requested, Op::Response) if !self.owes_request => {
                self.phase = Phase::Open;
                Verdict::Granted
            }
            (Phase::Requested, _) => self.violation(),
            (Phase::Open | Phase::Closing, Op::Request | Op::Response) => self.violation(),
            (Phase::Open | Phase::Closing, Op::CreditUpdate) => Verdict::Ignore,
            (Phase::Open | Phase::Closing, Op::CreditRequest) => {
                self.owes_credit = true;
                Verdict::Ignore
            }
            (Phase::Open, Op::Shutdown) => {
                if header.flags & shutdown::RECEIVE != 0 {
                    self.to_guest = ToGuest::Refused;
                }
                if header.flags & shutdown::SEND != 0 {
                    self.to_host = match self.to_host {
                        ToHost::Open if self.held() > 0 => ToHost::Draining,
                        ToHost::Open | ToHost::Refused | ToHost::Ended => ToHost::Ended,
                        ToHost::Draining => ToHost::Draining,
                    };
                }
                self.settle();
                Verdict::Ignore
            }
            (Phase::Closing, Op::Shutdown) => {
                if header.flags & shutdown::SEND != 0 {
                    self.phase = Phase::Resetting;
                }
                Verdict::Ignore
            }
            (Phase::Open | Phase::Closing, Op::Rw) => self.on_data(header.len),
        }
    }

    fn on_data(&mut self, length: u32) -> Verdict {
        // What the guest may send is what it was told, not what is true by
        // now.
        let unacknowledged = self.received.wrapping_sub(self.taken_told);
        if length > BUFFER.saturating_sub(unacknowledged) {
            return self.violation();
        }
        match self.to_host {
            ToHost::Open => {
                self.received = self.received.wrapping_add(length);
                Verdict::Deliver
            }
            ToHost::Refused => {
                self.received = self.received.wrapping_add(length);
                self.host_took(length);
                Verdict::Discard
            }
            ToHost::Draining | ToHost::Ended => self.violation(),
        }
    }

    /// The guest broke a rule: it gets a reset, the host an end.
    fn violation(&mut self) -> Verdict {
        self.phase = Phase::Resetting;
        Verdict::Ignore
    }

    /// The guest sent something that cannot be a packet of this connection.
    pub fn on_violation(&mut self) {
        if matches!(self.phase, Phase::Requested | Phase::Open | Phase::Closing) {
            self.violation();
        }
    }

    fn learn_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_taken = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
            self.owes_credit_request = false;
        }
    }

    /// Takes what happened on the host's side.
    pub fn on_host(&mut self, event: HostEvent) {
        match (self.phase, event) {
            (Phase::Gone | Phase::Resetting, _) => {}
            (Phase::Requested, _) => {
                // Not asked for yet: the guest need not hear of it at all.
                self.phase = if self.owes_request {
                    Phase::Gone
                } else {
                    Phase::Resetting
                };
            }
            (Phase::Open, HostEvent::Ended) => {
                self.end_to_guest();
                self.settle();
            }
            (Phase::Open, HostEvent::Unwritable) => {
                self.refuse_to_host();
                self.settle();
            }
            (Phase::Open, HostEvent::Failed) => {
                self.end_to_guest();
                self.refuse_to_host();
                self.settle();
            }
            (Phase::Open, HostEvent::Timeout) => {}
            (Phase::Closing, HostEvent::Timeout) => self.phase = Phase::Resetting,
            (Phase::Closing, _) => {}
            (Phase::Orphan, HostEvent::Unwritable | HostEvent::Failed) => {
                self.phase = Phase::Gone;
            }
            (Phase::Orphan, HostEvent::Ended | HostEvent::Timeout) => {}
        }
    }

    fn end_to_guest(&mut self) {
        if self.to_guest == ToGuest::Open {
            self.to_guest = ToGuest::Ended;
            self.owe_shutdown(shutdown::SEND);
        }
    }

    fn refuse_to_host(&mut self) {
        match self.to_host {
            ToHost::Open => {
                self.to_host = ToHost::Refused;
                self.owe_shutdown(shutdown::RECEIVE);
            }
            ToHost::Draining => self.to_host = ToHost::Ended,
            ToHost::Ended | ToHost::Refused => {}
        }
        self.host_took(self.held());
    }

    fn owe_shutdown(&mut self, flags: u32) {
        self.shutdown_owed |= flags & !self.shutdown_told;
    }

    /// The connection ends when both directions have.
    fn settle(&mut self) {
        self.phase = match (self.to_guest, self.to_host) {
            (ToGuest::Open, _) | (_, ToHost::Open | ToHost::Draining) => return,
            // The guest ended what it could; a reset confirms.
            (ToGuest::Refused, _) | (_, ToHost::Ended) => Phase::Resetting,
            // It did not: it has yet to read what it was sent.
            (ToGuest::Ended, ToHost::Refused) => Phase::Closing,
        };
    }

    /// Bytes of the guest's that wait for the host.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.taken)
    }

    /// The host took `bytes` of what was held, or they were dropped.
    pub fn host_took(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.held());
        self.taken = self.taken.wrapping_add(bytes);
        if self.taken.wrapping_sub(self.taken_told) >= UPDATE_AT {
            self.owes_credit = true;
        }
        if self.held() == 0 {
            match (self.phase, self.to_host) {
                (Phase::Orphan, _) => self.phase = Phase::Gone,
                (Phase::Open, ToHost::Draining) => {
                    self.to_host = ToHost::Ended;
                    self.settle();
                }
                _ => {}
            }
        }
    }

    /// Whether the guest has sent all it will, and the host has taken it: the
    /// socket's writing half is to be closed.
    pub fn to_host_ended(&self) -> bool {
        self.to_host == ToHost::Ended
    }

    /// Whether the guest receives nothing more: the socket's reading half is
    /// to be closed.
    pub fn to_guest_refused(&self) -> bool {
        self.to_guest == ToGuest::Refused
    }

    /// Bytes the guest can still take.
    pub fn credit(&self) -> u32 {
        // A guest that claims to have taken more than it was sent gets none.
        self.guest_buffer
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// Whether data of the host can be sent now.
    fn wants_data(&self) -> bool {
        self.takes_data() && self.credit() > 0
    }

    /// Whether data of the host can be sent, once there is credit.
    pub fn takes_data(&self) -> bool {
        self.phase == Phase::Open && self.to_guest == ToGuest::Open
    }

    /// The host has data. Without credit the guest is asked for some, once.
    pub fn host_has_data(&mut self) {
        if self.takes_data() && self.credit() == 0 && !self.asked_for_credit {
            self.asked_for_credit = true;
            self.owes_credit_request = true;
        }
    }

    /// The next packet owed; `readable`: the host may have data.
    pub fn next(&self, readable: bool) -> Option<Output> {
        match self.phase {
            Phase::Gone | Phase::Orphan => return None,
            Phase::Resetting => return Some(Output::Control(Op::Rst, 0)),
            Phase::Requested => {
                return self.owes_request.then_some(Output::Control(Op::Request, 0))
            }
            Phase::Open | Phase::Closing => {}
        }
        if self.owes_response {
            Some(Output::Control(Op::Response, 0))
        } else if self.shutdown_owed != 0 {
            // Flags add up: what was told stays true.
            let flags = self.shutdown_told | self.shutdown_owed;
            Some(Output::Control(Op::Shutdown, flags))
        } else if readable && self.wants_data() {
            Some(Output::Data(self.credit()))
        } else if self.owes_credit {
            Some(Output::Control(Op::CreditUpdate, 0))
        } else if self.owes_credit_request {
            Some(Output::Control(Op::CreditRequest, 0))
        } else {
            None
        }
    }

    /// A packet is on its way to the guest: marks it as no longer owed and
    /// fills in what every packet tells. [`Output::Data`] with the bytes that
    /// are sent, which may be fewer than [`Self::next`] allowed.
    pub fn told(&mut self, output: Output, header: &mut Header) {
        match output {
            Output::Data(length) => self.sent = self.sent.wrapping_add(length),
            Output::Control(op, flags) => match op {
                Op::Request => self.owes_request = false,
                Op::Response => self.owes_response = false,
                Op::Rst => self.phase = Phase::Gone,
                Op::Shutdown => {
                    self.shutdown_told |= flags;
                    self.shutdown_owed &= !flags;
                }
                Op::CreditRequest => self.owes_credit_request = false,
                Op::CreditUpdate | Op::Rw => {}
            },
        }
        self.owes_credit = false;
        self.taken_told = self.taken;
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.taken;
    }
}
