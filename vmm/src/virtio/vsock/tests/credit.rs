// SPDX-License-Identifier: Apache-2.0
//! Neither side sends what the other cannot hold.

use std::io::{Read, Write};

use super::{pattern, Guest, Op, PAGE, SHORT};
use crate::virtio::vsock::connection::BUFFER;

#[test]
fn the_guest_is_held_up_until_the_host_reads() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    let data = pattern(2 << 20);
    // What the device has said last, and what was sent.
    let (mut taken, mut sent) = (0_u32, 0_usize);
    // As much as it takes, with nobody reading.
    let fill = |guest: &mut Guest, taken: &mut u32, sent: &mut usize| loop {
        let credit = (BUFFER - (*sent as u32).wrapping_sub(*taken)) as usize;
        let part = credit.min(PAGE).min(data.len() - *sent);
        if part > 0 {
            guest.send(&conn, Op::Rw, 0, &data[*sent..*sent + part]);
            *sent += part;
            continue;
        }
        match guest.receive_within(SHORT) {
            Some(packet) => {
                assert_eq!(packet.op(), Op::CreditUpdate);
                assert_eq!(packet.header.buf_alloc, BUFFER);
                *taken = packet.header.fwd_cnt;
            }
            None => return,
        }
    };
    fill(&mut guest, &mut taken, &mut sent);
    assert!(sent >= BUFFER as usize && sent < data.len(), "{sent}");
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; 2 << 20];
        socket.read_exact(&mut bytes).map(|()| (bytes, socket))
    });
    while sent < data.len() {
        let packet = guest.expect(&conn, Op::CreditUpdate);
        taken = packet.header.fwd_cnt;
        fill(&mut guest, &mut taken, &mut sent);
    }
    let (bytes, _socket) = reader.join().unwrap().unwrap();
    assert!(bytes == data);
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    // Nobody reads: at some time the device holds all it promised to hold.
    let page = pattern(PAGE);
    for _ in 0..1000 {
        guest.send(&conn, Op::Rw, 0, &page);
        guest.poll();
        let reset = guest.received.iter().any(|p| p.op() == Op::Rst);
        if reset {
            // What the socket took is whole; then it ends.
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            assert!(all.chunks_exact(PAGE).all(|chunk| chunk == page));
            return;
        }
    }
    panic!("4 MiB fit where 64 KiB were promised");
}

#[test]
fn the_host_is_held_up_until_the_guest_takes() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let mut conn = super::Conn::new(1000, 5000);
    conn.buf_alloc = 10_000;
    guest.send(&conn, Op::Request, 0, &[]);
    guest.expect(&conn, Op::Response);
    let (mut socket, _) = listener.accept().unwrap();
    let data = pattern(45_000);
    socket.write_all(&data).unwrap();
    let mut got = Vec::new();
    while got.len() < data.len() {
        let burst = (data.len() - got.len()).min(10_000);
        let before = got.len();
        while got.len() < before + burst {
            got.extend(guest.expect(&conn, Op::Rw).data);
        }
        assert_eq!(got.len(), before + burst);
        if got.len() < data.len() {
            // Not a byte more, but the question, once.
            guest.expect(&conn, Op::CreditRequest);
            guest.expect_silence();
            conn.fwd_cnt = got.len() as u32;
            guest.send(&conn, Op::CreditUpdate, 0, &[]);
        }
    }
    assert!(got == data);
    guest.expect_silence();
}

#[test]
fn the_guest_is_told_its_credit_when_it_asks() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    guest.send(&conn, Op::Rw, 0, b"seven b");
    let mut bytes = [0; 7];
    socket.read_exact(&mut bytes).unwrap();
    guest.send(&conn, Op::CreditRequest, 0, &[]);
    let packet = guest.expect(&conn, Op::CreditUpdate);
    assert_eq!(
        (packet.header.buf_alloc, packet.header.fwd_cnt),
        (BUFFER, 7)
    );
}

#[test]
fn a_guest_that_took_what_it_never_got_has_no_credit() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (mut conn, mut socket) = guest.connect(1000, &listener, 5000);
    conn.fwd_cnt = 1_000_000;
    guest.send(&conn, Op::CreditUpdate, 0, &[]);
    socket.write_all(b"x").unwrap();
    guest.expect(&conn, Op::CreditRequest);
    guest.expect_silence();
    conn.fwd_cnt = 0;
    guest.send(&conn, Op::CreditUpdate, 0, &[]);
    assert_eq!(guest.expect(&conn, Op::Rw).data, b"x");
}
