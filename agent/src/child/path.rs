// SPDX-License-Identifier: Apache-2.0
//! Files below a container's root: no symbolic link of the image leads
//! outside, whatever it says and whenever it changes.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{openat, readlinkat, OFlag};
use nix::sys::stat::{mkdirat, Mode};

use super::report::{At, Done};
use crate::sys::mount::open_in_root;

/// Symbolic links followed before a path counts as a loop; the kernel's limit.
const MOST_LINKS: usize = 40;

/// Opens `path` below `root` without access to its contents.
pub fn locate(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    open_in_root(root, path, libc::O_PATH, 0)
}

/// Opens the directory `path` below `root`, making what is missing of it with
/// mode 0755. A dangling symbolic link is made real, inside the root.
///
/// # Errors
/// ENOTDIR where a file is in the way, ELOOP for links without end.
pub fn make_directory(root: BorrowedFd<'_>, path: &Path) -> Done<OwnedFd> {
    make_directory_errno(root, path).at("create directory", path)
}

fn make_directory_errno(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    match open_in_root(root, path, flags, 0) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let mut links = 0;
    // What stands so far: a path from the root without links to follow.
    let mut done = PathBuf::from("/");
    let mut current = open_in_root(root, &done, flags, 0)?;
    let mut rest: VecDeque<OsString> = parts(path);
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            done.pop();
            current = open_in_root(root, &done, flags, 0)?;
            continue;
        }
        let next = done.join(&part);
        match openat(
            &current,
            part.as_os_str(),
            OFlag::from_bits_retain(flags | libc::O_NOFOLLOW | libc::O_CLOEXEC),
            Mode::empty(),
        ) {
            Ok(directory) => {
                current = directory;
                done = next;
            }
            Err(Errno::ENOENT) => {
                match mkdirat(&current, part.as_os_str(), Mode::from_bits_retain(0o755)) {
                    // Somebody else was faster, which is as good.
                    Ok(()) | Err(Errno::EEXIST) => rest.push_front(part),
                    Err(errno) => return Err(errno),
                }
            }
            // A link (O_NOFOLLOW with O_DIRECTORY says ENOTDIR) or a file.
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let target = match readlinkat(&current, part.as_os_str()) {
                    Err(Errno::EINVAL) => return Err(Errno::ENOTDIR),
                    other => other?,
                };
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::ELOOP);
                }
                let target = PathBuf::from(target);
                if target.is_absolute() {
                    done = PathBuf::from("/");
                    current = open_in_root(root, &done, flags, 0)?;
                }
                for part in parts(&target).into_iter().rev() {
                    rest.push_front(part);
                }
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(current)
}

/// The names in a path, with `..` and without the rest.
fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from_vec(b"..".to_vec())),
            _ => None,
        })
        .collect()
}

/// Opens the file `path` below `root`, making it (empty, with `mode`) and the
/// directories above it where they are missing. Not opened for its contents.
pub fn make_file(root: BorrowedFd<'_>, path: &Path, mode: u32) -> Done<OwnedFd> {
    match locate(root, path) {
        Err(Errno::ENOENT) => {}
        other => return other.at("open", path),
    }
    let (directory, name) = parent(root, path)?;
    let flags = OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_RDONLY;
    let created = openat(
        &directory,
        Path::new(&name),
        flags,
        Mode::from_bits_retain(mode),
    );
    match created {
        Ok(_) => locate(directory.as_fd(), Path::new(&name)).at("open", path),
        Err(errno) => Err(errno).at("create", path),
    }
}

/// The directory that `path` is in, made where it is missing, and the name.
pub fn parent(root: BorrowedFd<'_>, path: &Path) -> Done<(OwnedFd, OsString)> {
    let name = match path.file_name() {
        Some(name) => name.to_owned(),
        None => return Err(Errno::EINVAL).at("create", path),
    };
    let above = path.parent().unwrap_or(Path::new("/"));
    Ok((make_directory(root, above)?, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn rooted() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let fd = fs::File::open(&root).unwrap().into();
        (directory, fd)
    }

    #[test]
    fn links_out_of_the_root_stay_inside() {
        let (directory, root) = rooted();
        let inside = directory.path().join("root");
        fs::create_dir(directory.path().join("outside")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        symlink(directory.path().join("outside"), inside.join("absolute")).unwrap();
        for name in ["relative", "absolute"] {
            let path = Path::new("/").join(name).join("new");
            make_directory(root.as_fd(), &path).unwrap();
        }
        let leaked: Vec<_> = fs::read_dir(directory.path().join("outside"))
            .unwrap()
            .collect();
        assert!(leaked.is_empty(), "{leaked:?}");
        assert!(inside.join("outside/new").is_dir(), "relative link");
    }

    #[test]
    fn dangling_links_are_made_real() {
        let (directory, root) = rooted();
        let inside = directory.path().join("root");
        symlink("/run/lock", inside.join("lock")).unwrap();
        make_directory(root.as_fd(), Path::new("/lock/a")).unwrap();
        assert!(inside.join("run/lock/a").is_dir());
    }

    #[test]
    fn loops_end() {
        let (directory, root) = rooted();
        let inside = directory.path().join("root");
        symlink("b", inside.join("a")).unwrap();
        symlink("a", inside.join("b")).unwrap();
        let failure = make_directory(root.as_fd(), Path::new("/a/x")).unwrap_err();
        assert_eq!(failure.errno, libc::ELOOP);
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let (directory, root) = rooted();
        fs::write(directory.path().join("root/file"), "").unwrap();
        let failure = make_directory(root.as_fd(), Path::new("/file/x")).unwrap_err();
        assert_eq!(failure.errno, libc::ENOTDIR);
    }

    #[test]
    fn files_are_made_with_their_directories() {
        let (directory, root) = rooted();
        make_file(root.as_fd(), Path::new("/etc/deep/hosts"), 0o644).unwrap();
        assert!(directory.path().join("root/etc/deep/hosts").is_file());
    }
}
