// SPDX-License-Identifier: Apache-2.0
//! In a real network namespace.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::super::tests::Namespace;
use super::*;

/// Runs `work` inside the namespace.
fn within<T: Send>(namespace: &Namespace, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(namespace.path()).unwrap();
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().unwrap();
    TcpStream::connect_timeout(&address, Duration::from_secs(5))
}

#[test]
fn every_port_of_the_loopback_interface_is_taken() {
    let Some(namespace) = Namespace::new("loopback") else {
        return;
    };
    namespace.ip("link set lo up");
    namespace.ip("addr add 10.11.12.13/32 dev lo");
    let loopback = match Loopback::open(&namespace.path()) {
        Ok(loopback) => loopback,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("SKIPPED: every_port_of_the_loopback_interface_is_taken: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    loopback.listener.set_nonblocking(false).unwrap();
    for address in [
        "127.0.0.1:80",
        "127.0.0.1:65535",
        "127.1.2.3:1",
        "[::1]:8080",
    ] {
        let mut near = within(&namespace, || connect(address)).unwrap();
        let (mut far, _) = loopback.listener.accept().unwrap();
        let wanted: SocketAddr = address.parse().unwrap();
        assert_eq!(far.local_addr().unwrap().port(), wanted.port());
        assert_eq!(
            far.local_addr().unwrap().ip().to_canonical(),
            wanted.ip(),
            "{address}"
        );
        near.write_all(b"there").unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        far.read_to_string(&mut text).unwrap();
        far.write_all(b"and back").unwrap();
        drop(far);
        let mut back = String::new();
        near.read_to_string(&mut back).unwrap();
        assert_eq!((text.as_str(), back.as_str()), ("there", "and back"));
    }
    // Other addresses are nobody's.
    let refused = within(&namespace, || connect("10.11.12.13:80")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    // With its descriptors everything is gone. Programs that other tests
    // start have copies of them until they are executed.
    drop(loopback);
    let end = Instant::now() + Duration::from_secs(10);
    let refused = loop {
        match within(&namespace, || connect("127.0.0.1:80")) {
            Err(error) => break error,
            Ok(_) => assert!(Instant::now() < end, "still taken"),
        }
    };
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_namespace_that_is_not_there_is_an_error() {
    let error = Loopback::open(Path::new("/no/such/namespace")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
