// SPDX-License-Identifier: Apache-2.0
//! System calls that no crate in use wraps. All of the agent's `unsafe` is in
//! this module.

pub mod fd;
pub mod host;
pub mod mount;
pub mod process;
pub mod socket;
pub mod tty;

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// A path as the kernel takes it; EINVAL for one with a NUL in it.
fn c_path(path: &Path) -> nix::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// A string as the kernel takes it; EINVAL for one with a NUL in it.
fn c_str(text: &str) -> nix::Result<CString> {
    CString::new(text).map_err(|_| Errno::EINVAL)
}
