// SPDX-License-Identifier: Apache-2.0
//! The descriptor-based mount interface (open_tree, fsopen, move_mount,
//! mount_setattr) and openat2.

use std::ffi::CStr;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use libc::{c_int, c_uint};
use nix::errno::Errno;

use super::{c_path, c_str};

// From the kernel's uapi/linux/mount.h; libc has only some of them for Linux.
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
const OPEN_TREE_CLONE: c_uint = 1;
const AT_RECURSIVE: c_uint = 0x8000;

/// MOUNT_ATTR_RDONLY.
pub const ATTR_RDONLY: u64 = 0x01;
/// MOUNT_ATTR_NOSUID.
pub const ATTR_NOSUID: u64 = 0x02;
/// MOUNT_ATTR_NODEV.
pub const ATTR_NODEV: u64 = 0x04;
/// MOUNT_ATTR_NOEXEC.
pub const ATTR_NOEXEC: u64 = 0x08;
/// MOUNT_ATTR__ATIME: the mask of the three settings below.
pub const ATTR_ATIME_MASK: u64 = 0x70;
/// MOUNT_ATTR_RELATIME.
pub const ATTR_RELATIME: u64 = 0x00;
/// MOUNT_ATTR_NOATIME.
pub const ATTR_NOATIME: u64 = 0x10;
/// MOUNT_ATTR_STRICTATIME.
pub const ATTR_STRICTATIME: u64 = 0x20;
/// MOUNT_ATTR_NODIRATIME.
pub const ATTR_NODIRATIME: u64 = 0x80;
/// MOUNT_ATTR_NOSYMFOLLOW.
pub const ATTR_NOSYMFOLLOW: u64 = 0x0020_0000;

/// mount_setattr(2)'s argument.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    /// MOUNT_ATTR_* to set.
    pub set: u64,
    /// MOUNT_ATTR_* to clear.
    pub clear: u64,
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE, MS_UNBINDABLE or 0.
    pub propagation: u64,
    /// User namespace for an idmapped mount.
    pub userns_fd: u64,
}

/// Opens `path` below `root`: absolute paths and `..` stay inside, symbolic
/// links are followed as if `root` were the root directory, magic links
/// (`/proc/*/fd/*`) are refused.
pub fn open_in_root(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: c_int,
    mode: u32,
) -> nix::Result<OwnedFd> {
    let path = c_path(path)?;
    // SAFETY: open_how is plain integers; zero is valid for each.
    let mut how: libc::open_how = unsafe { zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    loop {
        // SAFETY: `path` and `how` are alive and the size is `how`'s own.
        let fd = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                path.as_ptr(),
                &how,
                size_of::<libc::open_how>(),
            )
        });
        match fd {
            // EAGAIN: a rename raced with the resolution of "..".
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // SAFETY: a new descriptor, which nobody else owns.
            other => return other.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) }),
        }
    }
}

/// A detached copy of the mount at `path` relative to `dir` (empty: `dir`
/// itself), with what is mounted below it when `recursive`.
pub fn clone_tree(dir: BorrowedFd<'_>, path: &Path, recursive: bool) -> nix::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as c_uint | libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: `path` is alive.
    let fd = Errno::result(unsafe {
        libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags)
    })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The directory that relative paths start from, for functions that want one.
pub fn cwd() -> BorrowedFd<'static> {
    // SAFETY: AT_FDCWD is always valid and is never closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}

/// Attaches the detached mount `tree` over the file or directory `target`.
pub fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: both paths are empty C strings, both descriptors are alive.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes the attributes of the mount `fd` is the root of.
pub fn set_attr(fd: BorrowedFd<'_>, attr: &MountAttr, recursive: bool) -> nix::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH as c_uint;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: `attr` has the kernel's layout and its own size is passed.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attr,
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// One option of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsOption {
    /// `key`
    Flag(String),
    /// `key=value`
    Value(String, String),
}

/// A new, detached mount of a file system. On failure the kernel's own words
/// come with the errno where it gave any.
pub fn new_mount(
    fs_type: &str,
    source: Option<&str>,
    options: &[FsOption],
    attributes: u64,
) -> Result<OwnedFd, (Errno, String)> {
    let silent = |errno| (errno, String::new());
    let name = c_str(fs_type).map_err(silent)?;
    // SAFETY: `name` is alive.
    let context =
        Errno::result(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })
            .map_err(silent)?;
    // SAFETY: a new descriptor, which nobody else owns.
    let context = unsafe { OwnedFd::from_raw_fd(context as RawFd) };
    let configure = |command: c_uint, key: Option<&CStr>, value: Option<&CStr>| {
        // SAFETY: key and value are null or live C strings, as the commands want.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                command,
                key.map_or(ptr::null(), CStr::as_ptr),
                value.map_or(ptr::null(), CStr::as_ptr),
                0,
            )
        })
        .map_err(|errno| (errno, complaint(&context)))
    };
    if let Some(source) = source {
        let source = c_str(source).map_err(silent)?;
        configure(FSCONFIG_SET_STRING, Some(c"source"), Some(&source))?;
    }
    for option in options {
        match option {
            FsOption::Flag(key) => {
                let key = c_str(key).map_err(silent)?;
                configure(FSCONFIG_SET_FLAG, Some(&key), None)?;
            }
            FsOption::Value(key, value) => {
                let (key, value) = (c_str(key).map_err(silent)?, c_str(value).map_err(silent)?);
                configure(FSCONFIG_SET_STRING, Some(&key), Some(&value))?;
            }
        }
    }
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: integers only.
    let mount = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes as c_uint,
        )
    })
    .map_err(|errno| (errno, complaint(&context)))?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(mount as RawFd) })
}

/// What the kernel has to say about a file system context: messages are read
/// one at a time and start with a severity letter.
fn complaint(context: &OwnedFd) -> String {
    use std::os::fd::AsFd;
    let mut buffer = [0u8; 256];
    let mut text = String::new();
    while let Ok(count) = super::fd::read(context.as_fd(), &mut buffer) {
        if count == 0 || text.len() > 1024 {
            break;
        }
        if !text.is_empty() {
            text.push_str("; ");
        }
        let line = String::from_utf8_lossy(&buffer[..count]);
        text.push_str(line.get(2..).unwrap_or(&line).trim_end());
    }
    text
}

/// pivot_root(".", "."): the new root ends up below the old one, which is
/// then unmounted by its descriptor.
pub fn pivot_here() -> nix::Result<()> {
    // SAFETY: both paths are live C strings.
    Errno::result(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })
        .map(drop)
}
