// SPDX-License-Identifier: Apache-2.0
//! The kicks: datagrams on a Unix socket, whatever is in them, but for what the
//! shim says of a pod ([`Kick`]).
//!
//! In a run the socket is read once a step. The kernel queues a few datagrams
//! and refuses the rest, which loses nothing: one kick is as good as many. So
//! a storm of them costs a few reads a step.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixDatagram,
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::stat::{umask, Mode},
};

use crate::KsmError;

/// Most datagrams read at once.
const MOST: u64 = 1024;

/// Longer than any that is understood.
const LONGEST: usize = 128;

/// What a kick says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kick<'a> {
    /// A pod of this merge group has started, and its memory is mergeable.
    Merged(&'a str),
    /// A pod has started that asked for this merge group, and its memory is not
    /// mergeable, because another group's is. Nothing to do.
    Refused(&'a str),
    /// A pod has started that did not ask. Nothing to do.
    Apart,
    /// Something that may be worth merging.
    Other,
}

impl<'a> Kick<'a> {
    /// As a datagram.
    pub fn text(&self) -> String {
        match self {
            Self::Merged(group) => format!("pod merged {group}"),
            Self::Refused(group) => format!("pod refused {group}"),
            Self::Apart => "pod apart".into(),
            Self::Other => "kick".into(),
        }
    }

    /// Of a datagram.
    pub fn parse(datagram: &'a [u8]) -> Self {
        let text = std::str::from_utf8(datagram).unwrap_or_default();
        if let Some(group) = text.strip_prefix("pod merged ") {
            Self::Merged(group)
        } else if let Some(group) = text.strip_prefix("pod refused ") {
            Self::Refused(group)
        } else if text == "pod apart" {
            Self::Apart
        } else {
            Self::Other
        }
    }
}

/// How many kicks there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heard {
    /// Of all kinds.
    pub all: u64,
    /// Those after which there may be something to merge.
    pub worthy: u64,
    /// [`Kick::Merged`].
    pub merged: u64,
    /// [`Kick::Refused`].
    pub refused: u64,
}

impl Heard {
    fn count(&mut self, kick: Kick<'_>) {
        self.all += 1;
        match kick {
            Kick::Merged(_) => self.merged += 1,
            Kick::Refused(group) => {
                self.refused += 1;
                tracing::warn!(
                    group,
                    "a pod is not merged: another group has mergeable memory on this host"
                );
            }
            Kick::Apart | Kick::Other => {}
        }
        self.worthy += u64::from(matches!(kick, Kick::Merged(_) | Kick::Other));
    }
}

/// What only its owner may use: sockets 0600.
const PRIVATE: Mode = Mode::from_bits_truncate(0o177);

/// The socket, and the lock by which it is the only one.
#[derive(Debug)]
pub struct Kicks {
    socket: UnixDatagram,
    path: PathBuf,
    _lock: Flock<File>,
}

impl Kicks {
    /// Listens on `path` in place of a daemon that is no more. Changes the
    /// process's umask for a moment: to be called before there are threads.
    ///
    /// # Errors
    /// [`KsmError::Running`], [`KsmError::Listen`].
    pub fn listen(path: &Path) -> Result<Self, KsmError> {
        let failed = |source| KsmError::Listen {
            path: path.into(),
            source,
        };
        make_parent(path).map_err(failed)?;
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let lock = PathBuf::from(lock);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock)
            .map_err(failed)?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                return Err(KsmError::Running { path: lock });
            }
            Err((_, error)) => return Err(failed(error.into())),
        };
        let socket = bound(path, |path| UnixDatagram::bind(path)).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Self {
            socket,
            path: path.into(),
            _lock: lock,
        })
    }

    /// Takes what has come.
    ///
    /// # Errors
    /// [`KsmError::System`].
    pub fn take(&self) -> Result<Heard, KsmError> {
        let mut heard = Heard::default();
        let mut datagram = [0; LONGEST];
        while heard.all < MOST {
            match self.socket.recv(&mut datagram) {
                Ok(length) => heard.count(Kick::parse(&datagram[..length])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(KsmError::System {
                        step: "read kicks",
                        source,
                    });
                }
            }
        }
        Ok(heard)
    }
}

impl AsFd for Kicks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Kicks {
    fn drop(&mut self) {
        // The next one replaces what stays.
        let _ = fs::remove_file(&self.path);
    }
}

/// Makes the directory that a file is to be in, for root alone.
///
/// # Errors
/// Those of mkdir.
pub fn make_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)
        }
        _ => Ok(()),
    }
}

/// Binds a socket with mode 0600 where there may be an old one. To be called
/// with the lock held and before there are threads.
///
/// # Errors
/// Those of unlink and bind.
pub fn bound<T>(path: &Path, bind: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // With chmod after bind, others could connect in between.
    let before = umask(PRIVATE);
    let socket = bind(path);
    umask(before);
    socket
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn kicks_are_counted_and_a_full_queue_hurts_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/ksm.sock");
        let kicks = Kicks::listen(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_nonblocking(true).unwrap();
        assert_eq!(kicks.take().unwrap(), Heard::default());
        sender.send_to(b"", &path).unwrap();
        sender.send_to(b"any words", &path).unwrap();
        assert_eq!(kicks.take().unwrap().worthy, 2);
        let sent = (0..5000)
            .filter(|_| sender.send_to(b"k", &path).is_ok())
            .count();
        assert!((1..5000).contains(&sent), "{sent}");
        assert!(kicks.take().unwrap().all >= 1);
    }

    #[test]
    fn a_pod_with_nothing_to_merge_is_no_reason_to_scan() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ksm.sock");
        let kicks = Kicks::listen(&path).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        let all = [
            Kick::Merged("red"),
            Kick::Refused("blue"),
            Kick::Apart,
            Kick::Other,
        ];
        for kick in all {
            assert_eq!(Kick::parse(kick.text().as_bytes()), kick);
            sender.send_to(kick.text().as_bytes(), &path).unwrap();
        }
        let heard = kicks.take().unwrap();
        assert_eq!(
            heard,
            Heard {
                all: 4,
                worthy: 2,
                merged: 1,
                refused: 1
            }
        );
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ksm.sock");
        drop(UnixDatagram::bind(&path).unwrap());
        assert!(path.exists());
        let kicks = Kicks::listen(&path).unwrap();
        let error = Kicks::listen(&path).unwrap_err();
        assert!(matches!(error, KsmError::Running { .. }), "{error}");
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"k", &path).unwrap();
        assert_eq!(kicks.take().unwrap().all, 1);
        drop(kicks);
        assert!(!path.exists());
        drop(Kicks::listen(&path).unwrap());
    }
}
