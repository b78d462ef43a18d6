// SPDX-License-Identifier: Apache-2.0
//! A function's configuration space (PCI Local Bus 3.0 §6.1): 256 bytes with
//! a mask of what the guest may write, and a list of capabilities. There are no
//! base address registers: where registers lie is settled, and a capability says
//! it (Enhanced Allocation).

/// Bytes of configuration space that exist; the rest of the 4 KiB reads zero.
pub const SIZE: usize = 256;

/// Vendor id of virtio devices.
pub const VIRTIO_VENDOR: u16 = 0x1af4;

/// Registers of which none can be written: where base addresses would be, of
/// memory, ports and a ROM, and the subsystem.
pub const FIXED: std::ops::Range<usize> = 0x10..0x34;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CLASS: usize = 0x08;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const STATUS_CAPABILITY_LIST: u8 = 1 << 4;
/// Memory space and bus master enable.
const COMMAND_WRITABLE: u16 = 0x0406;

/// What a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and programming interface, as in the register's upper
    /// three bytes.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Last capability and the first free byte.
    last: usize,
    free: usize,
}

impl ConfigSpace {
    /// The space of a function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            last: 0,
            free: FIRST_CAPABILITY,
        };
        space.set_u16(0, identity.vendor);
        space.set_u16(2, identity.device);
        space.bytes[CLASS] = identity.revision;
        space.bytes[CLASS + 1..CLASS + 4].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        space.set_u16(SUBSYSTEM, identity.vendor);
        space.set_u16(SUBSYSTEM + 2, identity.subsystem);
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // The cache line size is the guest's scratch register.
        space.writable[0x0c] = 0xff;
        space
    }

    /// Appends a capability: its id and what follows the next-pointer. Returns
    /// its offset.
    ///
    /// # Panics
    /// When it does not fit: capabilities are the VMM's, not the guest's.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.free;
        let end = at + 2 + body.len();
        assert!(end <= SIZE, "capabilities fit the configuration space");
        if self.last == 0 {
            self.bytes[CAPABILITIES] = at as u8;
            self.bytes[STATUS] |= STATUS_CAPABILITY_LIST;
        } else {
            self.bytes[self.last + 1] = at as u8;
        }
        self.bytes[at] = id;
        self.bytes[at + 2..end].copy_from_slice(body);
        self.last = at;
        self.free = end.next_multiple_of(4);
        at
    }

    /// Lets the guest write the bits of `mask` at `offset`.
    pub fn allow_writes(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// All of it, to be saved.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes what a guest may have written from saved bytes.
    pub fn restore(&mut self, saved: &[u8]) {
        for ((byte, mask), saved) in self.bytes.iter_mut().zip(self.writable).zip(saved) {
            *byte = (*byte & !mask) | (saved & mask);
        }
    }

    /// The 16-bit register at `offset`.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn set_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// A guest's read; any offset and length.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self
                .bytes
                .get(offset.saturating_add(index))
                .copied()
                .unwrap_or(0);
        }
    }

    /// A guest's write; any offset and length.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            if let (Some(register), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *register = (*register & !mask) | (byte & mask);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: VIRTIO_VENDOR,
            device: 0x1041,
            class: 0x02_0000,
            revision: 1,
            subsystem: 0x40,
        })
    }

    fn read(space: &ConfigSpace, offset: usize) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn identity_is_readable_and_not_writable() {
        let mut space = space();
        assert_eq!(read(&space, 0), 0x1041_1af4);
        assert_eq!(read(&space, 8), 0x02_000001);
        space.write(0, &[0; 4]);
        assert_eq!(read(&space, 0), 0x1041_1af4);
        space.write(4, &[0xff, 0xff]);
        assert_eq!(space.u16_at(4), COMMAND_WRITABLE);
    }

    #[test]
    fn nothing_can_be_written_where_base_addresses_would_be() {
        let mut space = space();
        let mut read = [0xff; FIXED.end - FIXED.start];
        space.write(FIXED.start, &read);
        space.read(FIXED.start, &mut read);
        let mut expected = [0; FIXED.end - FIXED.start];
        // The subsystem's ids.
        expected[0x1c..0x20].copy_from_slice(&[0xf4, 0x1a, 0x40, 0]);
        assert_eq!(read, expected);
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3]);
        let second = space.add_capability(0x11, &[4; 10]);
        let mut at = usize::from(read(&space, CAPABILITIES) as u8);
        assert_eq!(at, first);
        at = usize::from((read(&space, at) >> 8) as u8);
        assert_eq!(at, second);
        assert_eq!((read(&space, second) >> 8) as u8, 0);
        assert_ne!(space.u16_at(STATUS) & 0x10, 0);
    }

    #[test]
    fn any_access_is_harmless() {
        let mut space = space();
        for offset in [0, 3, 0x11, 250, 255, 256, 4095, usize::MAX] {
            for length in [1, 2, 3, 4, 8] {
                let mut data = vec![0xaa; length];
                space.write(offset, &data);
                space.read(offset, &mut data);
            }
        }
        assert_eq!(read(&space, 0), 0x1041_1af4);
    }
}
