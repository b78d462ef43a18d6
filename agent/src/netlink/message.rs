// SPDX-License-Identifier: Apache-2.0
//! Route netlink messages as bytes (rtnetlink(7)): a header, a fixed part and
//! attributes, each aligned to four bytes, all in the machine's byte order.

/// Length of `struct nlmsghdr`.
pub const HEADER: usize = 16;
/// Length of `struct nlattr`.
const ATTRIBUTE: usize = 4;
const ALIGN: usize = 4;

const NESTED: u16 = libc::NLA_F_NESTED as u16;
const ATTRIBUTE_TYPE: u16 = !(libc::NLA_F_NESTED as u16 | 1 << 14);

/// Builds one message.
#[derive(Debug)]
pub struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    /// A message of `kind` (RTM_*) with `flags` (NLM_F_*) and a fixed part.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(fixed);
        let mut builder = Self { bytes };
        builder.pad();
        builder
    }

    /// Attributes without a message around them.
    pub fn bare() -> Self {
        Self { bytes: Vec::new() }
    }

    /// What [`Self::bare`] has become.
    pub fn attributes_only(self) -> Vec<u8> {
        self.bytes
    }

    fn pad(&mut self) {
        let len = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(len, 0);
    }

    /// Adds an attribute. `value` is far below the format's 64 KiB.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = (ATTRIBUTE + value.len()) as u16;
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds an attribute that holds attributes.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.attribute(kind | NESTED, &[]);
        fill(self);
        let len = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }

    /// The finished message with its sequence number.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// One received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received<'a> {
    /// RTM_* or NLMSG_*.
    pub kind: u16,
    /// The request's sequence number.
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

/// Splits a datagram into messages; ends at the first that makes no sense.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let whole = bytes.get(..len).filter(|_| len >= HEADER)?;
        let received = Received {
            kind: u16_at(whole, 4)?,
            sequence: u32_at(whole, 8)?,
            body: &whole[HEADER..],
        };
        bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or(&[]);
        Some(received)
    })
}

/// The attributes after a fixed part: type and value of each.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u16_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 2)? & ATTRIBUTE_TYPE;
        let value = bytes.get(ATTRIBUTE..len)?;
        bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or(&[]);
        Some((kind, value))
    })
}

/// A 16-bit number at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..offset + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

/// A 32-bit number at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let mut builder = Builder::new(20, 5, &[1, 2, 3, 4, 5, 6, 7, 8]);
        builder.attribute(3, b"eth0\0").nested(8, |inner| {
            inner.attribute(2, &1400u32.to_ne_bytes());
        });
        let bytes = builder.finish(7);
        assert_eq!(bytes.len() % ALIGN, 0);
        let message = messages(&bytes).next().unwrap();
        assert_eq!((message.kind, message.sequence), (20, 7));
        let list: Vec<_> = attributes(&message.body[8..]).collect();
        assert_eq!(list[0], (3, &b"eth0\0"[..]));
        assert_eq!(list[1].0, 8);
        let inner: Vec<_> = attributes(list[1].1).collect();
        assert_eq!(inner, [(2, &1400u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn broken_lengths_end_the_walk() {
        for bad in [&[][..], &[4, 0, 0, 0], &[0xff; 64], &[0; 64]] {
            assert_eq!(messages(bad).count(), 0, "{bad:?}");
        }
        assert_eq!(attributes(&[0xff, 0xff, 1, 0]).count(), 0);
        assert_eq!(attributes(&[1, 0, 1, 0]).count(), 0);
    }
}
