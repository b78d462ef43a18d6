// SPDX-License-Identifier: Apache-2.0
//! A pod's part in page merging (KSM): whether its memory is mergeable, and
//! telling the daemon that it has started.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    path::Path,
};

use bulkhead_ksm_throttler::{
    group::{self, Joined, Name},
    socket::Kick,
    sysfs::{self, Ksm},
};

/// What came of a pod's wish to be merged.
#[derive(Debug)]
pub enum Merging {
    /// It has none.
    Apart,
    /// Its memory is to be mergeable, by whoever holds the descriptor open for
    /// as long as that memory is there.
    Member(Name, Option<OwnedFd>),
    /// Its memory is not to be mergeable: another group's is.
    Refused(Name),
    /// Its memory is not to be mergeable: this host cannot do it.
    Failed(Name),
}

impl Merging {
    /// Joins the group that the pod asked for. A pod that cannot join it starts
    /// all the same: what it gives up is only the host's memory.
    pub fn join(wanted: Option<Name>) -> Self {
        let Some(wanted) = wanted else {
            return Self::Apart;
        };
        Self::join_at(
            wanted,
            Path::new(sysfs::DIRECTORY),
            Path::new(group::RECORD),
        )
    }

    fn join_at(wanted: Name, sysfs: &Path, record: &Path) -> Self {
        if let Err(error) = Ksm::find(sysfs) {
            let error = crate::error::chain(&error);
            tracing::warn!(group = %wanted, error, "not merged");
            return Self::Failed(wanted);
        }
        match group::join(record, &wanted) {
            Ok(Joined::Member(held)) => Self::Member(wanted, Some(held)),
            Ok(Joined::Refused(other)) => {
                tracing::warn!(
                    group = %wanted,
                    %other,
                    "not merged: another merge group has mergeable memory on this host, and the kernel keeps no groups apart"
                );
                Self::Refused(wanted)
            }
            Err(error) => {
                tracing::warn!(
                    group = %wanted,
                    record = %record.display(),
                    %error,
                    "not merged: not known which merge group has mergeable memory"
                );
                Self::Failed(wanted)
            }
        }
    }

    /// The group asked for.
    pub fn group(&self) -> Option<&Name> {
        match self {
            Self::Apart => None,
            Self::Member(name, _) | Self::Refused(name) | Self::Failed(name) => Some(name),
        }
    }

    /// Whether the memory is to be mergeable.
    pub fn is_member(&self) -> bool {
        matches!(self, Self::Member(..))
    }

    /// What to hold, once.
    pub fn take_held(&mut self) -> Option<OwnedFd> {
        match self {
            Self::Member(_, held) => held.take(),
            _ => None,
        }
    }

    fn kick(&self) -> Kick<'_> {
        match self {
            Self::Member(name, _) => Kick::Merged(name.as_ref()),
            Self::Refused(name) => Kick::Refused(name.as_ref()),
            Self::Apart | Self::Failed(_) => Kick::Apart,
        }
    }
}

/// Sends one datagram and waits for nothing. An absent daemon and a full socket
/// are as good as a delivered kick: there is nobody to tell, or it is told
/// already.
pub fn kick(path: &Path, merging: &Merging) {
    if let Err(error) = send(path, merging.kick()) {
        tracing::debug!(socket = %path.display(), %error, "no kick for page merging");
    }
}

fn send(path: &Path, kick: Kick<'_>) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to(kick.text().as_bytes(), path).map(drop)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_daemon_listens_in_the_default_state_directory() {
        assert_eq!(
            crate::config::Config::default().ksm_socket(),
            Path::new(bulkhead_ksm_throttler::SOCKET)
        );
    }

    #[test]
    fn a_kick_is_one_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = UnixDatagram::bind(dir.path().join("s")).unwrap();
        daemon.set_nonblocking(true).unwrap();
        kick(&dir.path().join("s"), &Merging::Apart);
        let mut datagram = [0; 64];
        let length = daemon.recv(&mut datagram).unwrap();
        assert_eq!(Kick::parse(&datagram[..length]), Kick::Apart);
        assert!(daemon.recv(&mut datagram).is_err());
    }

    #[test]
    fn a_second_group_s_pod_is_not_merged() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("run"), "0").unwrap();
        let record = dir.path().join("group");
        let join = |name: &str| Merging::join_at(name.parse().unwrap(), dir.path(), &record);
        let mut red = join("red");
        assert!(red.is_member());
        assert_eq!(red.kick(), Kick::Merged("red"));
        let held = red.take_held();
        assert!(held.is_some() && red.is_member() && red.take_held().is_none());
        let blue = join("blue");
        assert!(!blue.is_member());
        assert_eq!(blue.kick(), Kick::Refused("blue"));
        assert_eq!(blue.group().map(Name::to_string), Some("blue".into()));
        assert!(matches!(Merging::join(None), Merging::Apart));
        let absent = Path::new("/nonexistent/ksm");
        let failed = Merging::join_at("red".parse().unwrap(), absent, &record);
        assert!(matches!(failed, Merging::Failed(_)));
        assert_eq!(failed.kick(), Kick::Apart);
    }

    #[test]
    fn neither_absence_nor_a_full_socket_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        kick(&dir.path().join("s"), &Merging::Apart);
        let path = dir.path().join("s");
        let daemon = UnixDatagram::bind(&path).unwrap();
        while send(&path, Kick::Other).is_ok() {}
        kick(&dir.path().join("s"), &Merging::Apart);
        drop(daemon);
        kick(&dir.path().join("s"), &Merging::Apart);
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
