// SPDX-License-Identifier: Apache-2.0
//! Packets (virtio 1.2 §5.10.6) in descriptor chains. A packet is a header and
//! its data; where one descriptor ends and the next begins means nothing, so
//! a header may be split and data may lie in many pieces.

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::virtio::chain::{Broken, Chain};

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Type of a stream packet, the only one supported.
pub const TYPE_STREAM: u16 = 1;

/// Operations (virtio 1.2 §5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants it.
    Response = 2,
    /// Ends, or refuses, a connection at once.
    Rst = 3,
    /// Ends one or both directions.
    Shutdown = 4,
    /// Carries data.
    Rw = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for the receiver's credit.
    CreditRequest = 7,
}

impl Op {
    /// The operation a number stands for.
    pub const fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Flags of [`Op::Shutdown`]: what the sender will do no more.
pub mod shutdown {
    /// Receive.
    pub const RECEIVE: u32 = 1;
    /// Send.
    pub const SEND: u32 = 2;
}

/// A packet's header, in host byte order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation; see [`Op`].
    pub op: u16,
    /// For [`Op::Shutdown`].
    pub flags: u32,
    /// Bytes the sender can buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes its user has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header; every byte pattern is one.
    pub fn parse(raw: &[u8; HEADER_LEN]) -> Self {
        let mut rest = &raw[..];
        let mut take = |count: usize| -> u64 {
            let (field, after) = rest.split_at(count);
            rest = after;
            field
                .iter()
                .rev()
                .fold(0, |value, byte| (value << 8) | u64::from(*byte))
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// The header as it goes into memory.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = [0; HEADER_LEN];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            raw[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        raw
    }
}

/// Guest memory that a packet, or a part of it, lies in.
#[derive(Debug, Default)]
pub struct Span<'m> {
    slices: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Span<'m> {
    /// The pieces, in order; none of them empty.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    fn add(
        &mut self,
        memory: &'m GuestMemoryMmap,
        address: GuestAddress,
        length: usize,
    ) -> Result<(), Broken> {
        for slice in memory.get_slices(address, length) {
            let slice = slice.map_err(|_| Broken)?;
            if !slice.is_empty() {
                self.length = self.length.checked_add(slice.len()).ok_or(Broken)?;
                self.slices.push(slice);
            }
        }
        Ok(())
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        self.length += slice.len();
        self.slices.push(slice);
    }

    /// Cuts the first `at` bytes off, at most all, and gives them.
    pub fn split_front(&mut self, at: usize) -> Span<'m> {
        let mut front = Span::default();
        let mut back = Span::default();
        let mut left = at;
        for slice in self.slices.drain(..) {
            if left >= slice.len() {
                left -= slice.len();
                front.push(slice);
            } else if left == 0 {
                back.push(slice);
            } else {
                let (before, after) = slice
                    .split_at(left)
                    .expect("the middle lies within the slice");
                left = 0;
                front.push(before);
                back.push(after);
            }
        }
        *self = back;
        front
    }

    /// Keeps the first `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            *self = self.split_front(length);
        }
    }

    /// Copies out of guest memory; as many bytes as both have.
    pub fn read(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == out.len() {
                break;
            }
            done += slice.copy_to(&mut out[done..]);
        }
        done
    }

    /// Copies into guest memory; as many bytes as both have.
    pub fn write(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            let part = (data.len() - done).min(slice.len());
            slice.copy_from(&data[done..done + part]);
            done += part;
        }
        done
    }
}

/// A chain as the driver sent it.
#[derive(Debug)]
pub enum Sent<'m> {
    /// A header and all the data it speaks of.
    Packet(Header, Span<'m>),
    /// A header that speaks of more data than there is.
    Truncated(Header),
    /// Not even a header.
    Short,
}

/// Reads a chain that the driver sent.
pub fn from_tx<'m>(memory: &'m GuestMemoryMmap, chain: Chain<'_>) -> Result<Sent<'m>, Broken> {
    let mut span = Span::default();
    for descriptor in chain {
        // A packet to send has no part to write to.
        if descriptor.is_write_only() {
            return Err(Broken);
        }
        span.add(memory, descriptor.addr(), descriptor.len() as usize)?;
    }
    if span.len() < HEADER_LEN {
        return Ok(Sent::Short);
    }
    let mut raw = [0; HEADER_LEN];
    span.split_front(HEADER_LEN).read(&mut raw);
    let header = Header::parse(&raw);
    if header.len as usize > span.len() {
        return Ok(Sent::Truncated(header));
    }
    span.truncate(header.len as usize);
    Ok(Sent::Packet(header, span))
}

/// A chain to receive into: where the header goes, and where data does.
pub fn from_rx<'m>(
    memory: &'m GuestMemoryMmap,
    chain: Chain<'_>,
) -> Result<(Span<'m>, Span<'m>), Broken> {
    let mut span = Span::default();
    for descriptor in chain {
        if !descriptor.is_write_only() {
            return Err(Broken);
        }
        span.add(memory, descriptor.addr(), descriptor.len() as usize)?;
    }
    // Nothing fits: the driver wants no packets.
    if span.len() < HEADER_LEN {
        return Err(Broken);
    }
    let header = span.split_front(HEADER_LEN);
    Ok((header, span))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_header_survives(raw in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let bytes: [u8; HEADER_LEN] = raw.try_into().unwrap();
            prop_assert_eq!(Header::parse(&bytes).encode(), bytes);
        }

        #[test]
        fn spans_split_where_asked(
            pieces in proptest::collection::vec(1usize..50, 0..6),
            at in 0usize..200,
        ) {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
            let mut span = Span::default();
            let mut address = 0;
            for piece in &pieces {
                span.add(&memory, GuestAddress(address), *piece).unwrap();
                address += *piece as u64 + 3;
            }
            let total = span.len();
            let content: Vec<u8> = (0..total).map(|byte| byte as u8).collect();
            prop_assert_eq!(span.write(&content), total);
            let front = span.split_front(at);
            prop_assert_eq!(front.len(), at.min(total));
            prop_assert_eq!(front.len() + span.len(), total);
            let mut out = vec![0; total];
            front.read(&mut out);
            span.read(&mut out[front.len()..]);
            prop_assert_eq!(out, content);
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            op: Op::Rw as u16,
            fwd_cnt: 0xaabb_ccdd,
            ..Header::default()
        };
        let raw = header.encode();
        assert_eq!(raw[0], 3);
        assert_eq!(raw[8], 2);
        assert_eq!(raw[16..20], [4, 3, 2, 1]);
        assert_eq!(raw[30], 5);
        assert_eq!(raw[40..], [0xdd, 0xcc, 0xbb, 0xaa]);
    }
}
