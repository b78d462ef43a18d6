// SPDX-License-Identifier: Apache-2.0
//! The requests of /dev/vhost-net (linux/vhost.h).

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

const GET_FEATURES: libc::Ioctl = 0x8008_af00;
const SET_FEATURES: libc::Ioctl = 0x4008_af00;
const SET_OWNER: libc::Ioctl = 0xaf01;
const SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const GET_VRING_BASE: libc::Ioctl = 0xc008_af12;
const SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const SET_VRING_ERR: libc::Ioctl = 0x4008_af22;
const NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// A part of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub guest: u64,
    pub size: u64,
    pub host: u64,
}

/// Where in this process a ring's parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    pub descriptors: u64,
    pub used: u64,
    pub available: u64,
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// The device. The kernel reaches the memory of the process that owns it, as far
/// as it is told of it.
#[derive(Debug)]
pub struct Device(pub File);

impl Device {
    /// # Safety
    /// The request reads or writes a `T`, or less, and nothing else.
    unsafe fn request<T>(&self, number: libc::Ioctl, argument: *mut T) -> io::Result<()> {
        // SAFETY: the caller's promise.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), number, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0_u64;
        // SAFETY: it writes 64 bits.
        unsafe { self.request(GET_FEATURES, &raw mut features) }?;
        Ok(features)
    }

    pub fn set_features(&self, mut features: u64) -> io::Result<()> {
        // SAFETY: it reads 64 bits.
        unsafe { self.request(SET_FEATURES, &raw mut features) }
    }

    pub fn set_owner(&self) -> io::Result<()> {
        // SAFETY: it has no argument.
        unsafe { self.request::<u8>(SET_OWNER, std::ptr::null_mut()) }
    }

    /// Tells all of guest memory. The old is not used any more when this returns.
    pub fn set_memory(&self, regions: &[Region]) -> io::Result<()> {
        // `struct vhost_memory`: a count and 32 bits of nothing; then of each
        // region guest address, size, host address and flags, of which there are
        // none.
        let mut words = vec![regions.len() as u64];
        for region in regions {
            words.extend([region.guest, region.size, region.host, 0]);
        }
        // SAFETY: it reads as many regions as the first word says, which are there.
        unsafe { self.request(SET_MEM_TABLE, words.as_mut_ptr()) }
    }

    pub fn set_ring_size(&self, index: u32, size: u16) -> io::Result<()> {
        self.set_state(SET_VRING_NUM, index, size.into())
    }

    /// From where on the ring is worked.
    pub fn set_ring_base(&self, index: u32, next: u16) -> io::Result<()> {
        self.set_state(SET_VRING_BASE, index, next.into())
    }

    /// How far it has been worked, while it is not.
    pub fn ring_base(&self, index: u32) -> io::Result<u16> {
        let mut state = VringState { index, number: 0 };
        // SAFETY: it reads and writes the structure.
        unsafe { self.request(GET_VRING_BASE, &raw mut state) }?;
        // What is above counts rounds of packed rings.
        Ok(state.number as u16)
    }

    pub fn set_ring_addresses(&self, index: u32, at: RingAddresses) -> io::Result<()> {
        let mut argument = VringAddr {
            index,
            flags: 0,
            descriptors: at.descriptors,
            used: at.used,
            available: at.available,
            log: 0,
        };
        // SAFETY: it reads the structure. The addresses are of guest memory, which
        // who calls this keeps, or has the device stop first.
        unsafe { self.request(SET_VRING_ADDR, &raw mut argument) }
    }

    /// By what the driver notifies of the ring.
    pub fn set_kick(&self, index: u32, event: &impl AsRawFd) -> io::Result<()> {
        self.set_file(SET_VRING_KICK, index, event.as_raw_fd())
    }

    /// By what the driver is to be interrupted.
    pub fn set_call(&self, index: u32, event: &impl AsRawFd) -> io::Result<()> {
        self.set_file(SET_VRING_CALL, index, event.as_raw_fd())
    }

    /// By what is told that the driver broke a rule.
    pub fn set_error(&self, index: u32, event: &impl AsRawFd) -> io::Result<()> {
        self.set_file(SET_VRING_ERR, index, event.as_raw_fd())
    }

    /// Has the ring worked, for a tap; or not any more, once this returns.
    pub fn set_backend(&self, index: u32, tap: Option<&File>) -> io::Result<()> {
        self.set_file(NET_SET_BACKEND, index, tap.map_or(-1, File::as_raw_fd))
    }

    fn set_state(&self, request: libc::Ioctl, index: u32, number: u32) -> io::Result<()> {
        let mut state = VringState { index, number };
        // SAFETY: all that are made this way read the structure.
        unsafe { self.request(request, &raw mut state) }
    }

    fn set_file(&self, request: libc::Ioctl, index: u32, fd: RawFd) -> io::Result<()> {
        let mut argument = VringFile { index, fd };
        // SAFETY: all that are made this way read the structure.
        unsafe { self.request(request, &raw mut argument) }
    }
}
