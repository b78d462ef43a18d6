// SPDX-License-Identifier: Apache-2.0
//! The kicks: datagrams on a Unix socket, whatever is in them.
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

    /// Takes what has come; gives how many.
    ///
    /// # Errors
    /// [`KsmError::System`].
    pub fn take(&self) -> Result<u64, KsmError> {
        let mut count = 0;
        while count < MOST {
            match self.socket.recv(&mut [0]) {
                Ok(_) => count += 1,
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
        Ok(count)
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
        assert_eq!(kicks.take().unwrap(), 0);
        sender.send_to(b"", &path).unwrap();
        sender.send_to(b"any words", &path).unwrap();
        assert_eq!(kicks.take().unwrap(), 2);
        let sent = (0..5000)
            .filter(|_| sender.send_to(b"k", &path).is_ok())
            .count();
        assert!((1..5000).contains(&sent), "{sent}");
        assert!(kicks.take().unwrap() >= 1);
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
        assert_eq!(kicks.take().unwrap(), 1);
        drop(kicks);
        assert!(!path.exists());
        drop(Kicks::listen(&path).unwrap());
    }
}
