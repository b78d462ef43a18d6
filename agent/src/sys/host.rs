// SPDX-License-Identifier: Apache-2.0
//! The machine: entropy, clocks.

use std::os::fd::{AsRawFd, BorrowedFd};

use libc::c_int;
use nix::errno::Errno;

// _IOW('R', 3, int[2]) and _IO('R', 7), from the kernel's uapi/linux/random.h.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Credits `seed` as entropy of full quality and makes the kernel's generator
/// take it up at once. `random` is an open /dev/urandom. Seeds longer than
/// 512 bytes are used in part.
pub fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> nix::Result<()> {
    const LONGEST: usize = 512;
    #[repr(C)]
    struct Pool {
        bits: c_int,
        bytes: c_int,
        seed: [u8; LONGEST],
    }
    let count = seed.len().min(LONGEST);
    let mut pool = Pool {
        bits: (count * 8) as c_int,
        bytes: count as c_int,
        seed: [0; LONGEST],
    };
    pool.seed[..count].copy_from_slice(&seed[..count]);
    // SAFETY: the kernel reads `bytes` bytes of a seed that is at least as long.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &pool) })?;
    // SAFETY: no argument.
    Errno::result(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Sets the wall clock to `nanoseconds` since the epoch.
pub fn set_realtime(nanoseconds: i64) -> nix::Result<()> {
    let time = libc::timespec {
        tv_sec: nanoseconds.div_euclid(1_000_000_000),
        tv_nsec: nanoseconds.rem_euclid(1_000_000_000),
    };
    // SAFETY: `time` is alive.
    Errno::result(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }).map(drop)
}

/// The wall clock in nanoseconds since the epoch.
pub fn realtime_ns() -> i64 {
    clock_ns(libc::CLOCK_REALTIME)
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC) as u64
}

fn clock_ns(clock: libc::clockid_t) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place to write to; these clocks always exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

/// Sets the NIS domain name of the UTS namespace.
pub fn set_domainname(name: &str) -> nix::Result<()> {
    // SAFETY: the pointer and the length describe one live string.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}
