// SPDX-License-Identifier: Apache-2.0
//! Connections that the guest makes, and how they end.

use std::{
    io::{Read, Write},
    net::Shutdown,
};

use super::{pattern, Guest, Op, PAGE};
use crate::virtio::vsock::packet::shutdown;

#[test]
fn data_goes_both_ways() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    assert_eq!(*guest.connects.lock().unwrap(), [5000]);
    guest.send(&conn, Op::Rw, 0, b"from the guest");
    let mut bytes = [0; 14];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the guest");
    socket.write_all(b"from the host").unwrap();
    assert_eq!(guest.receive_data(&mut conn, 13), b"from the host");
    guest.expect_silence();
}

#[test]
fn much_data_arrives_whole() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    let data = pattern(1 << 20);
    let expected = data.clone();
    let writer = std::thread::spawn(move || socket.write_all(&data).map(|()| socket));
    assert!(guest.receive_data(&mut conn, 1 << 20) == expected);
    writer.join().unwrap().unwrap();
}

#[test]
fn connections_do_not_mix() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let mut pairs: Vec<_> = (0..20)
        .map(|port| guest.connect(1000 + port, &listener, 5000))
        .collect();
    for (conn, socket) in &mut pairs {
        guest.send(conn, Op::Rw, 0, &conn.guest.to_le_bytes());
        let mut bytes = [0; 4];
        socket.read_exact(&mut bytes).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), conn.guest);
    }
    for (conn, socket) in &mut pairs {
        socket.write_all(&conn.guest.to_le_bytes()).unwrap();
        let packet = guest.expect(conn, Op::Rw);
        assert_eq!(packet.data, conn.guest.to_le_bytes());
    }
}

#[test]
fn without_a_server_the_guest_is_refused() {
    let mut guest = Guest::new();
    let conn = super::Conn::new(1000, 5000);
    guest.send(&conn, Op::Request, 0, &[]);
    guest.expect(&conn, Op::Rst);
    // A socket that nobody listens on any more.
    drop(guest.listen(5000));
    guest.send(&conn, Op::Request, 0, &[]);
    guest.expect(&conn, Op::Rst);
    assert!(guest.connects.lock().unwrap().is_empty());
}

#[test]
fn the_guest_may_end_its_half_first() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    guest.send(&conn, Op::Rw, 0, b"last words");
    guest.send(&conn, Op::Shutdown, shutdown::SEND, &[]);
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    // The other half goes on.
    socket.write_all(b"still here").unwrap();
    assert_eq!(guest.receive_data(&mut conn, 10), b"still here");
    drop(socket);
    guest.expect(&conn, Op::Rst);
    guest.expect_silence();
}

#[test]
fn the_host_may_end_its_half_first() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    socket.write_all(b"last words").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_data(&mut conn, 10), b"last words");
    let packet = guest.expect(&conn, Op::Shutdown);
    assert_eq!(packet.header.flags, shutdown::SEND);
    guest.send(&conn, Op::Rw, 0, b"still here");
    let mut bytes = [0; 10];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still here");
    guest.send(&conn, Op::Shutdown, shutdown::SEND | shutdown::RECEIVE, &[]);
    guest.expect(&conn, Op::Rst);
    assert_eq!(socket.read(&mut bytes).unwrap(), 0);
}

#[test]
fn what_the_host_wrote_before_it_went_arrives() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    let data = pattern(20 * PAGE);
    socket.write_all(&data).unwrap();
    drop(socket);
    let mut flags = 0;
    let mut got = Vec::new();
    // The two ends may be told apart or together, before or after the data's
    // end, but the sending one comes after all data.
    while got.len() < data.len() || flags != shutdown::SEND | shutdown::RECEIVE {
        let packet = guest.receive();
        match packet.op() {
            Op::Rw => {
                assert_eq!(flags & shutdown::SEND, 0);
                conn.fwd_cnt += packet.header.len;
                got.extend(packet.data);
            }
            Op::Shutdown => flags = packet.header.flags,
            other => panic!("{other:?}"),
        }
    }
    assert!(got == data);
    guest.send(&conn, Op::Shutdown, shutdown::SEND | shutdown::RECEIVE, &[]);
    guest.expect(&conn, Op::Rst);
}

#[test]
fn a_guest_that_does_not_let_go_gets_a_reset() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, socket) = guest.connect(1000, &listener, 5000);
    drop(socket);
    loop {
        let packet = guest.receive();
        if packet.op() == Op::Rst {
            break;
        }
        assert_eq!(packet.op(), Op::Shutdown);
    }
    // The ports can be used anew.
    let (_conn, mut socket) = guest.connect(conn.guest, &listener, 5000);
    guest.send(&conn, Op::Rw, 0, b"again");
    let mut bytes = [0; 5];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"again");
}

#[test]
fn a_reset_by_the_guest_ends_both_halves() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    guest.send(&conn, Op::Rst, 0, &[]);
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    guest.expect_silence();
    // There is nothing left to reset, or to send to.
    guest.send(&conn, Op::Rw, 0, b"x");
    guest.expect(&conn, Op::Rst);
}

#[test]
fn a_reset_of_the_device_closes_everything() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (_conn, mut socket) = guest.connect(1000, &listener, 5000);
    guest.driver.restart();
    guest.posted.clear();
    assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    guest.post(8);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    guest.send(&conn, Op::Rw, 0, b"new");
    let mut bytes = [0; 3];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"new");
}
