// SPDX-License-Identifier: Apache-2.0
//! The pod's socket: where it is, and who serves it.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt, net::UnixListener},
    },
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use sha2::{Digest, Sha256};

/// Where sockets are unless containerd says otherwise.
pub const ROOT: &str = "/run/containerd/s";

/// Scheme of the addresses that containerd dials.
const SCHEME: &str = "unix://";

/// The socket of a pod of one containerd.
pub fn path(root: &Path, grpc_address: &str, namespace: &str, group: &str) -> PathBuf {
    let mut hash = Sha256::new();
    for (index, part) in [grpc_address, namespace, group].into_iter().enumerate() {
        if index > 0 {
            hash.update("/");
        }
        hash.update(part);
    }
    let name: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    root.join(name)
}

/// The address as containerd takes it.
pub fn address(path: &Path) -> String {
    format!("{SCHEME}{}", path.display())
}

/// The path in an address; an address without a scheme is a path.
pub fn path_of(address: &str) -> &Path {
    Path::new(address.strip_prefix(SCHEME).unwrap_or(address))
}

/// What there is at a socket's path.
#[derive(Debug)]
pub enum Bound {
    /// Ours now.
    New(UnixListener),
    /// A shim serves it.
    Served,
}

/// Listens at `path`, unless somebody does so already. What a dead shim has
/// left is replaced. The caller holds the pod's lock.
///
/// # Errors
/// Those of the system.
pub fn bind(path: &Path) -> io::Result<Bound> {
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    match listen(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        other => return other.map(Bound::New),
    }
    if probe(path)?.is_some() {
        return Ok(Bound::Served);
    }
    remove(path)?;
    listen(path).map(Bound::New)
}

/// Mode 0600 from the first moment, whatever the umask is.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    listener
}

/// A connection to whoever serves `path`; none when nobody does. Never waits.
///
/// # Errors
/// Those of the system.
pub fn probe(path: &Path) -> io::Result<Option<OwnedFd>> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Ok(()) => Ok(Some(socket)),
        // It has more connections waiting than it wants: it listens.
        Err(Errno::AGAIN) => Ok(Some(socket)),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes a socket; nothing when there is none.
///
/// # Errors
/// Those of the system.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_path_is_the_hash_of_who_and_what() {
        let root = Path::new("/run/containerd/s");
        // printf %s /run/containerd/containerd.sock/default/demo | sha256sum
        assert_eq!(
            path(root, "/run/containerd/containerd.sock", "default", "demo"),
            root.join("12117510a54ae87cb9f59e68c4b6897783ff70cec968b5b5967a0a0cd503057e")
        );
        assert_ne!(path(root, "/a", "n", "x"), path(root, "/b", "n", "x"));
        assert_ne!(path(root, "/a", "n", "x"), path(root, "/a", "m", "x"));
        // Short enough for sun_path, whose last byte is a zero.
        let long = path(root, "/a", "n", &"x".repeat(200));
        assert!(long.as_os_str().len() < 107);
    }

    #[test]
    fn addresses_name_paths() {
        let path = Path::new("/run/x");
        assert_eq!(address(path), "unix:///run/x");
        assert_eq!(path_of("unix:///run/x"), path);
        assert_eq!(path_of("/run/x"), path);
    }

    #[test]
    fn a_served_socket_is_left_alone_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");
        assert!(probe(&path).unwrap().is_none());
        let Bound::New(listener) = bind(&path).unwrap() else {
            panic!("nobody serves it");
        };
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert!(matches!(bind(&path).unwrap(), Bound::Served));
        drop(listener);
        assert!(probe(&path).unwrap().is_none());
        assert!(matches!(bind(&path).unwrap(), Bound::New(_)));
        remove(&path).unwrap();
        remove(&path).unwrap();
    }
}
