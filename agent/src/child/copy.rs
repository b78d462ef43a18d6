// SPDX-License-Identifier: Apache-2.0
//! A process that copies one file of its container to its standard output, or
//! its standard input to one. It is in the container's namespaces and control
//! group, and runs nothing of the container's.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{fchown, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{openat, renameat, AtFlags, OFlag};
use nix::sys::stat::{fstatat, Mode, SFlag};
use nix::unistd::{unlinkat, UnlinkatFlags};

use super::path::locate;
use super::report::{At, Done, Failure};
use crate::container::copy::{Arriving, CopyPlan};
use crate::sys::mount::open_in_root;

/// Does what the plan says with descriptors 0 and 1. What went wrong goes to
/// descriptor 2. Gives the exit status.
pub fn run(plan: &CopyPlan) -> i32 {
    let done = match plan {
        CopyPlan::Out(path) => send(path),
        CopyPlan::In(file) => receive(file),
    };
    match done {
        Ok(()) => 0,
        Err(failure) => {
            // Who does not read it has gone.
            let _ = writeln!(stream(2), "{failure}");
            1
        }
    }
}

/// One of the standard streams, without a buffer.
fn stream(number: i32) -> File {
    match super::standard(number).try_clone_to_owned() {
        Ok(fd) => fd.into(),
        Err(_) => crate::sys::process::exit_now(1),
    }
}

fn root() -> Done<OwnedFd> {
    Ok(File::open("/").at("open", "/")?.into())
}

/// A header, then the contents as they were when it was opened.
fn send(path: &Path) -> Done<()> {
    let root = root()?;
    let place: File = locate(root.as_fd(), path).at("open", path)?.into();
    let meta = place.metadata().at("inspect", path)?;
    if !meta.is_file() {
        return Err(no_file(path, meta.is_dir()));
    }
    // It may be something else by now, which must not be waited for.
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file: File = open_in_root(root.as_fd(), path, flags, 0)
        .at("open", path)?
        .into();
    let now = file.metadata().at("inspect", path)?;
    if (meta.dev(), meta.ino()) != (now.dev(), now.ino()) {
        return Err(changed(path));
    }
    let modified = now.mtime().saturating_mul(1_000_000_000) + now.mtime_nsec();
    let mut header = Vec::with_capacity(24);
    header.extend(now.len().to_le_bytes());
    header.extend((now.mode() & 0o7777).to_le_bytes());
    header.extend(now.uid().to_le_bytes());
    header.extend(modified.to_le_bytes());
    let mut out = stream(1);
    out.write_all(&header).at("write", "standard output")?;
    let copied = io::copy(&mut file.take(now.len()), &mut out).at("copy", path)?;
    match copied == now.len() {
        true => Ok(()),
        false => Err(changed(path)),
    }
}

fn no_file(path: &Path, directory: bool) -> Failure {
    let what = if directory {
        "a directory"
    } else {
        "no regular file"
    };
    Failure::invalid(format!(
        "{} is {what}; only regular files are copied",
        path.display()
    ))
}

fn changed(path: &Path) -> Failure {
    Failure::other(format!(
        "{} was changed while it was copied",
        path.display()
    ))
}

/// Writes a new file beside the old one, and puts it in its place when it is
/// whole.
fn receive(arriving: &Arriving) -> Done<()> {
    let root = root()?;
    let (directory, name) = destination(root.as_fd(), arriving)?;
    let path = arriving.path.as_path();
    match fstatat(&directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) if found.st_mode & libc::S_IFMT == SFlag::S_IFDIR.bits() => {
            return Err(no_file(&arriving.path.join(&name), true))
        }
        Ok(_) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(errno).at("inspect", path),
    }
    let partial = OsString::from(format!(".bulkhead-copy-{}", std::process::id()));
    let flags =
        OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file: File = openat(
        &directory,
        partial.as_os_str(),
        flags,
        Mode::S_IRUSR | Mode::S_IWUSR,
    )
    .at("create a file beside", path)?
    .into();
    let done = fill(&file, arriving).and_then(|()| {
        renameat(
            &directory,
            partial.as_os_str(),
            &directory,
            name.as_os_str(),
        )
        .at("put in place", path)
    });
    if done.is_err() {
        // What matters is why it is not there.
        let _ = unlinkat(&directory, partial.as_os_str(), UnlinkatFlags::NoRemoveDir);
    }
    done
}

/// The directory of the new file, and its name there.
fn destination(root: BorrowedFd<'_>, arriving: &Arriving) -> Done<(OwnedFd, OsString)> {
    let directory = |path: &Path| open_in_root(root, path, libc::O_PATH | libc::O_DIRECTORY, 0);
    let path = arriving.path.as_path();
    match directory(path) {
        Ok(found) => return Ok((found, arriving.name.clone())),
        Err(Errno::ENOENT | Errno::ENOTDIR) if !arriving.below => {}
        Err(errno) => return Err(errno).at("open directory", path),
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    let name: &OsStr = match path.file_name() {
        Some(name) => name,
        None => return Err(Failure::invalid("path: its end is no file's name")),
    };
    let found = directory(parent).at("open directory", PathBuf::from(parent))?;
    Ok((found, name.to_owned()))
}

fn fill(file: &File, arriving: &Arriving) -> Done<()> {
    let path = arriving.path.as_path();
    let mut to: &File = file;
    let copied = io::copy(&mut stream(0).take(arriving.size), &mut to).at("write", path)?;
    if copied != arriving.size {
        return Err(Failure::other(format!(
            "{} of {} bytes came for {}",
            copied,
            arriving.size,
            path.display()
        )));
    }
    fchown(file, Some(arriving.uid), Some(arriving.gid)).at("change owner of", path)?;
    let permissions = std::fs::Permissions::from_mode(arriving.mode);
    file.set_permissions(permissions)
        .at("change permissions of", path)?;
    let since = Duration::from_nanos(arriving.modified_ns.unsigned_abs());
    let modified = match arriving.modified_ns >= 0 {
        true => UNIX_EPOCH.checked_add(since),
        false => UNIX_EPOCH.checked_sub(since),
    };
    match modified {
        Some(modified) => file.set_modified(modified).at("set time of", path),
        None => Ok(()),
    }
}
