// SPDX-License-Identifier: Apache-2.0
//! The rights of the thread that serves files.

use std::io;

/// SECBIT_NO_SETUID_FIXUP (Linux's securebits.h).
const NO_SETUID_FIXUP: libc::c_int = 1 << 2;

/// Lets this thread keep its capabilities while it takes a user's identity to
/// make a file of that user's. The guest's kernel has decided that the user
/// may: of his supplementary groups and capabilities nothing is known here.
pub fn keep_capabilities() -> io::Result<()> {
    // SAFETY: neither call takes pointers; they change this thread only.
    let result = unsafe {
        match libc::prctl(libc::PR_GET_SECUREBITS) {
            bits if bits < 0 => bits,
            bits => libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP),
        }
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
