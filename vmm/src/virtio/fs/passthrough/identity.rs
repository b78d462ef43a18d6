// SPDX-License-Identifier: Apache-2.0
//! In whose name, and with which rights, this thread does something.

use std::io;

use rustix::thread::{capabilities, set_capabilities, CapabilitySet, CapabilitySets};

/// The id of [`set_ids`] that stays.
const KEEP: u32 = u32::MAX;

/// Sets this thread's effective user or group alone.
fn set_id(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: takes no pointers, and changes this thread only: the C library's
    // function would change all.
    match unsafe { libc::syscall(call, KEEP, id, KEEP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Does something as a user: what it makes belongs to him. The thread's
/// capabilities stay.
///
/// # Errors
/// The thread cannot become him, or what `work` says.
pub fn as_user<T>(uid: u32, gid: u32, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let group = Effective::set(libc::SYS_setresgid, gid)?;
    let user = Effective::set(libc::SYS_setresuid, uid)?;
    let done = work();
    drop(user);
    drop(group);
    done
}

/// An effective id that is not root's, until it is dropped.
struct Effective(Option<libc::c_long>);

impl Effective {
    fn set(call: libc::c_long, id: u32) -> io::Result<Self> {
        if id == 0 {
            return Ok(Self(None));
        }
        set_id(call, id)?;
        Ok(Self(Some(call)))
    }
}

impl Drop for Effective {
    fn drop(&mut self) {
        let back = self.0.map_or(Ok(()), |call| set_id(call, 0));
        // What follows would be done in a user's name.
        back.expect("a thread can become itself again");
    }
}

/// Does something that takes set-user-id and set-group-id bits away from the file
/// that it writes, if `kill`: with the capability that keeps them it would not.
///
/// # Errors
/// The capability cannot be set aside, or what `work` says.
pub fn killing_privileges<T>(kill: bool, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !kill {
        return work();
    }
    let before = capabilities(None)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: before.effective - CapabilitySet::FSETID,
            ..before
        },
    )?;
    let done = work();
    set_capabilities(None, before)?;
    done
}
