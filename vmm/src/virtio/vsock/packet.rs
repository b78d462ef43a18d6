// SPDX-License-Identifier: Apache-2.0
//! Packet headers (virtio 1.2 §5.10.6).

/// Bytes of a header.
pub const HEADER: usize = 44;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// Largest payload either way.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a packet does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts it.
    Response = 2,
    /// Ends or refuses it.
    Reset = 3,
    /// Closes one or both directions.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Tells credit.
    CreditUpdate = 6,
    /// Asks for it.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Shutdown flag: the sender will receive no more.
pub const NO_RECEIVE: u32 = 1;
/// Shutdown flag: the sender will send no more.
pub const NO_SEND: u32 = 2;
/// Both.
pub const NEITHER: u32 = 3;

/// A header, in host byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Sender's context id.
    pub src_cid: u64,
    /// Receiver's context id.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload.
    pub length: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation; none for one that the specification does not know.
    pub op: Option<Op>,
    /// Shutdown flags.
    pub flags: u32,
    /// Sender's buffer.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its buffer.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let u64_at = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(value)
        };
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            length: u32_at(24),
            kind: u16_at(28),
            op: Op::from_wire(u16_at(30)),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes it.
    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}
