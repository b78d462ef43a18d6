// SPDX-License-Identifier: Apache-2.0
//! Tells the daemon that merges identical pages (KSM) that a pod has started.
//!
//! Guest memory is not marked mergeable yet: until then there is nothing of a
//! pod that the daemon could merge.

use std::{
    io,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

/// Name of the daemon's socket in the state directory.
const SOCKET: &str = "ksm.sock";

/// Where the daemon listens, of pods with this state directory.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join(SOCKET)
}

/// Sends one datagram and waits for nothing. An absent daemon and a full socket
/// are as good as a delivered kick: there is nobody to tell, or it is told
/// already.
pub fn kick(state_dir: &Path) {
    let path = socket(state_dir);
    if let Err(error) = send(&path) {
        tracing::debug!(socket = %path.display(), %error, "no kick for page merging");
    }
}

fn send(path: &Path) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to(b"pod", path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_daemon_listens_in_the_default_state_directory() {
        let state_dir = crate::config::Config::default().runtime.state_dir;
        assert_eq!(
            socket(&state_dir),
            PathBuf::from(bulkhead_ksm_throttler::SOCKET)
        );
    }

    #[test]
    fn a_kick_is_one_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = UnixDatagram::bind(dir.path().join(SOCKET)).unwrap();
        daemon.set_nonblocking(true).unwrap();
        kick(dir.path());
        assert!(daemon.recv(&mut [0; 8]).is_ok());
        assert!(daemon.recv(&mut [0; 8]).is_err());
    }

    #[test]
    fn neither_absence_nor_a_full_socket_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        kick(dir.path());
        let path = dir.path().join(SOCKET);
        let daemon = UnixDatagram::bind(&path).unwrap();
        while send(&path).is_ok() {}
        kick(dir.path());
        drop(daemon);
        kick(dir.path());
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
