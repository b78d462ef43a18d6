// SPDX-License-Identifier: Apache-2.0
//! A request as the guest made it (virtio 1.2 §5.2.6), and how it is served at
//! once.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::disk::{transfer, Direction, Disk, Erase, MAX_SEGMENTS, RANGE};
use crate::virtio::chain::{segments, Broken, Chain, Segment};

/// `struct virtio_blk_outhdr`.
const HEADER: u32 = 16;

/// A request.
pub struct Request {
    /// The chain's first descriptor.
    pub head: u16,
    kind: u32,
    sector: u64,
    /// What the guest reads.
    data_in: Vec<Segment>,
    /// What it writes.
    data_out: Vec<Segment>,
    status: GuestAddress,
}

/// A transfer that may be made: all of it is on the disk.
pub struct Transfer<'r> {
    /// Which way.
    pub direction: Direction,
    /// Where in the file.
    pub offset: u64,
    /// Where in guest memory.
    pub segments: &'r [Segment],
}

/// What a request came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Its status.
    pub status: u32,
    /// Bytes that the guest got, from the disk or otherwise.
    pub written: u32,
    /// Bytes from the disk, and to it.
    pub read: u64,
    /// As above.
    pub stored: u64,
}

impl Done {
    /// Nothing moved.
    pub fn plain(status: u32) -> Self {
        Self {
            status,
            written: 0,
            read: 0,
            stored: 0,
        }
    }

    /// A transfer that so many bytes of moved.
    pub fn moved(status: u32, direction: Direction, bytes: u32) -> Self {
        match direction {
            Direction::In => Self {
                written: bytes,
                read: bytes.into(),
                ..Self::plain(status)
            },
            Direction::Out => Self {
                stored: bytes.into(),
                ..Self::plain(status)
            },
        }
    }

    /// Whether it failed.
    pub fn failed(&self) -> bool {
        self.status != VIRTIO_BLK_S_OK
    }
}

#[cfg(test)]
impl Request {
    /// One that nobody made.
    pub fn nothing() -> Self {
        Self {
            head: 0,
            kind: 0,
            sector: 0,
            data_in: Vec::new(),
            data_out: Vec::new(),
            status: GuestAddress(0),
        }
    }
}

impl Request {
    /// Reads it.
    pub fn parse(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<Self, Broken> {
        let head = chain.head_index();
        let (mut data_out, mut data_in) = segments(chain);
        // The status byte is the last writable one.
        let status = data_in.pop().ok_or(Broken)?;
        if data_out.is_empty() {
            return Err(Broken);
        }
        let header = data_out.remove(0);
        if header.length != HEADER || status.length != 1 {
            return Err(Broken);
        }
        let kind: u32 = memory.read_obj(header.address).map_err(|_| Broken)?;
        let sector = header.address.0.checked_add(8).ok_or(Broken)?;
        let sector: u64 = memory.read_obj(GuestAddress(sector)).map_err(|_| Broken)?;
        Ok(Self {
            head,
            kind: u32::from_le(kind),
            sector: u64::from_le(sector),
            data_in,
            data_out,
            status: status.address,
        })
    }

    /// The transfer that it is, if it is one that may be made.
    pub fn transfer(&self, disk: &Disk) -> Option<Transfer<'_>> {
        let (direction, segments) = match self.kind {
            VIRTIO_BLK_T_IN => (Direction::In, &self.data_in),
            VIRTIO_BLK_T_OUT if !disk.read_only => (Direction::Out, &self.data_out),
            _ => return None,
        };
        Some(Transfer {
            direction,
            offset: disk.offset(self.sector, segments)?,
            segments,
        })
    }

    /// Whether it asks for what was written to last.
    pub fn is_flush(&self) -> bool {
        self.kind == VIRTIO_BLK_T_FLUSH
    }

    /// Serves it.
    pub fn serve(&self, memory: &GuestMemoryMmap, disk: &Disk) -> Result<Done, Broken> {
        if let Some(wanted) = self.transfer(disk) {
            // All of it or an error: the driver takes the status for the whole
            // request.
            let Transfer {
                direction,
                offset,
                segments,
            } = wanted;
            let (status, moved) = transfer(memory, disk, offset, segments, direction)?;
            return Ok(Done::moved(status, direction, moved));
        }
        let status = match self.kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => VIRTIO_BLK_S_IOERR,
            VIRTIO_BLK_T_FLUSH => match disk.file.sync_data() {
                Ok(()) => VIRTIO_BLK_S_OK,
                Err(_) => VIRTIO_BLK_S_IOERR,
            },
            VIRTIO_BLK_T_GET_ID => match self.data_in.first() {
                Some(buffer) => {
                    let length = disk.serial.len().min(buffer.length as usize);
                    memory
                        .write_slice(&disk.serial[..length], buffer.address)
                        .map_err(|_| Broken)?;
                    return Ok(Done {
                        written: length as u32,
                        ..Done::plain(VIRTIO_BLK_S_OK)
                    });
                }
                None => VIRTIO_BLK_S_IOERR,
            },
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
                let what = match kind {
                    VIRTIO_BLK_T_DISCARD => Erase::Discard,
                    _ => Erase::WriteZeroes,
                };
                match gather(memory, &self.data_out, MAX_SEGMENTS as usize * RANGE)? {
                    Some(ranges) => disk.erase(what, &ranges),
                    None => VIRTIO_BLK_S_IOERR,
                }
            }
            _ => VIRTIO_BLK_S_UNSUPP,
        };
        Ok(Done::plain(status))
    }

    /// Tells the driver the status; how many bytes it got in all.
    pub fn answer(&self, memory: &GuestMemoryMmap, done: &Done) -> Result<u32, Broken> {
        memory
            .write_obj(done.status as u8, self.status)
            .map_err(|_| Broken)?;
        // At most what 256 descriptors hold was read; a sum that overflows is
        // nobody's concern but the guest's.
        Ok(done.written.saturating_add(1))
    }
}

/// What the guest wrote, if it is at most so many bytes.
fn gather(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
    most: usize,
) -> Result<Option<Vec<u8>>, Broken> {
    let length: u64 = segments.iter().map(|s| u64::from(s.length)).sum();
    if length > most as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize];
    let mut rest = &mut bytes[..];
    for segment in segments {
        let (part, left) = rest.split_at_mut(segment.length as usize);
        memory
            .read_slice(part, segment.address)
            .map_err(|_| Broken)?;
        rest = left;
    }
    Ok(Some(bytes))
}
