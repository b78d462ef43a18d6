// SPDX-License-Identifier: Apache-2.0
//! Connections that clients on the host make.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use super::{Conn, Guest, Op};

/// The guest's side of a connection that was asked for.
fn asked(guest: &mut Guest, port: u32) -> Conn {
    let packet = guest.receive();
    assert_eq!(packet.op(), Op::Request);
    assert_eq!(packet.header.dst_port, port);
    Conn::new(port, packet.header.src_port)
}

fn line(client: &UnixStream) -> String {
    let mut line = String::new();
    BufReader::new(client).read_line(&mut line).unwrap();
    line
}

fn is_closed(mut client: &UnixStream) -> bool {
    match client.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_client_is_connected_and_told_its_port() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let mut conn = asked(&mut guest, 1024);
    guest.send(&conn, Op::Response, 0, &[]);
    assert_eq!(line(&client), format!("OK {}\n", conn.host));
    client.write_all(b"question").unwrap();
    assert_eq!(guest.receive_data(&mut conn, 8), b"question");
    guest.send(&conn, Op::Rw, 0, b"answer");
    let mut bytes = [0; 6];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
    // The guest's connections are its own doing only.
    assert!(guest.connects.lock().unwrap().is_empty());
}

#[test]
fn clients_get_ports_of_their_own() {
    let mut guest = Guest::new();
    let clients: Vec<_> = (0..10)
        .map(|_| {
            let mut client = guest.client();
            client.write_all(b"CONNECT 1024\n").unwrap();
            client
        })
        .collect();
    let mut ports: Vec<_> = clients
        .iter()
        .map(|_| asked(&mut guest, 1024).host)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 10);
}

#[test]
fn what_a_client_sends_early_is_not_lost() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1024\nearly").unwrap();
    let mut conn = asked(&mut guest, 1024);
    guest.expect_silence();
    guest.send(&conn, Op::Response, 0, &[]);
    assert_eq!(guest.receive_data(&mut conn, 5), b"early");
}

#[test]
fn a_slow_client_is_waited_for() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    for byte in b"CONNECT 7\n" {
        client.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    asked(&mut guest, 7);
}

#[test]
fn a_client_that_speaks_otherwise_is_dropped() {
    let mut guest = Guest::new();
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"CONNECT x\n",
        b"CONNECT 99999999999999999999999999999999",
    ] {
        let mut client = guest.client();
        client.write_all(bytes).unwrap();
        assert!(is_closed(&client), "{bytes:?}");
    }
    drop(guest.client());
    guest.expect_silence();
}

#[test]
fn a_guest_that_refuses_is_told_by_the_end() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let conn = asked(&mut guest, 1024);
    guest.send(&conn, Op::Rst, 0, &[]);
    assert!(is_closed(&client));
    guest.expect_silence();
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let conn = asked(&mut guest, 1024);
    assert!(is_closed(&client));
    guest.expect(&conn, Op::Rst);
    // Too late.
    guest.send(&conn, Op::Response, 0, &[]);
    guest.expect(&conn, Op::Rst);
}

#[test]
fn a_client_that_gives_up_takes_its_request_back() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let conn = asked(&mut guest, 1024);
    drop(client);
    guest.expect(&conn, Op::Rst);
}
