// SPDX-License-Identifier: Apache-2.0
//! What a guest must not do.

use std::{io::Read, time::Duration};

use proptest::prelude::*;

use super::{queue, Conn, Guest, Header, Op, GUEST_CID, HEADER_LEN, HOST_CID, LONG, PAGE};
use crate::virtio::{
    testing::{READ_ONLY, READ_WRITE},
    vsock::muxer::MAX_CONNECTIONS,
};

#[test]
fn packets_from_or_to_others_are_dropped() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let (conn, mut socket) = guest.connect(1000, &listener, 5000);
    for (source, destination) in [
        (GUEST_CID + 1, HOST_CID),
        (GUEST_CID, GUEST_CID),
        (HOST_CID, HOST_CID),
        (GUEST_CID | 1 << 32, HOST_CID),
        (GUEST_CID, 1),
    ] {
        for op in [Op::Request, Op::Rst, Op::Rw] {
            let header = Header {
                src_cid: source,
                dst_cid: destination,
                ..conn.header(op)
            };
            guest.send_packet(&header, &[]);
        }
    }
    guest.expect_silence();
    guest.send(&conn, Op::Rw, 0, b"unharmed");
    let mut bytes = [0; 8];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"unharmed");
}

#[test]
fn what_does_not_exist_is_reset() {
    let mut guest = Guest::new();
    let conn = Conn::new(1000, 5000);
    // Of no connection.
    for op in [Op::Response, Op::Shutdown, Op::Rw, Op::CreditUpdate] {
        guest.send(&conn, op, 0, &[]);
        guest.expect(&conn, Op::Rst);
    }
    // A reset never is.
    guest.send(&conn, Op::Rst, 0, &[]);
    guest.expect_silence();
    // Another type of socket, with an answer of that type.
    let listener = guest.listen(5000);
    for kind in [0, 2, u16::MAX] {
        let header = Header {
            kind,
            ..conn.header(Op::Request)
        };
        guest.send_packet(&header, &[]);
        assert_eq!(guest.expect(&conn, Op::Rst).header.kind, kind);
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    // An operation that is none.
    for op in [0, 8, u16::MAX] {
        let header = Header {
            op,
            ..conn.header(Op::Rw)
        };
        guest.send_packet(&header, &[]);
        guest.expect(&conn, Op::Rst);
    }
    assert!(!guest.driver.broken());
}

#[test]
fn a_connection_ends_with_a_packet_that_breaks_its_rules() {
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let mut port = 1000;
    let mut broken_by = |change: &dyn Fn(&mut Header)| {
        port += 1;
        let (conn, mut socket) = guest.connect(port, &listener, 5000);
        let mut header = conn.header(Op::Rw);
        change(&mut header);
        guest.send_packet(&header, b"some");
        guest.expect(&conn, Op::Rst);
        assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    };
    broken_by(&|header| header.op = Op::Request as u16);
    broken_by(&|header| header.op = Op::Response as u16);
    broken_by(&|header| header.op = 77);
    broken_by(&|header| header.len = 5);
    broken_by(&|header| header.len = u32::MAX);
}

#[test]
fn packets_without_a_header_are_dropped() {
    let mut guest = Guest::new();
    for length in [1, HEADER_LEN - 1] {
        guest.send_raw(&vec![0xff; length]);
        assert_eq!(guest.wait_used(queue::SEND), [0]);
    }
    guest.expect_silence();
    assert!(!guest.driver.broken());
}

#[test]
fn chains_of_the_wrong_kind_stop_the_device() {
    type Spoil = fn(&mut Guest, u64);
    let spoils: [(&str, usize, Spoil); 5] = [
        ("a packet to write to", queue::SEND, |guest, at| {
            guest.driver.queue(queue::SEND, &[(at, 100, READ_WRITE)]);
        }),
        ("a packet outside of memory", queue::SEND, |guest, _| {
            guest
                .driver
                .queue(queue::SEND, &[(u64::MAX - 50, 100, READ_ONLY)]);
        }),
        ("a buffer to read from", queue::RECEIVE, |guest, at| {
            guest.driver.queue(queue::RECEIVE, &[(at, 100, READ_ONLY)]);
        }),
        ("a buffer too small", queue::RECEIVE, |guest, at| {
            guest.driver.queue(queue::RECEIVE, &[(at, 43, READ_WRITE)]);
        }),
        ("a buffer outside of memory", queue::RECEIVE, |guest, _| {
            guest
                .driver
                .queue(queue::RECEIVE, &[(1 << 40, 100, READ_WRITE)]);
        }),
    ];
    for (what, index, spoil) in spoils {
        let mut guest = Guest::without_buffers();
        let at = guest.driver.buffer(PAGE as u64);
        spoil(&mut guest, at);
        // Something that needs a buffer.
        guest.send_raw(&Conn::new(1, 2).header(Op::Rw).encode());
        guest.driver.kick(index);
        assert!(guest.driver.broken(), "{what}");
        // A client does not wait for a device that has stopped.
        let mut client = guest.client();
        assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0, "{what}");
    }
}

#[test]
fn answers_wait_for_buffers_and_the_guest_for_them() {
    let mut guest = Guest::without_buffers();
    let packet = Conn::new(1000, 5000).header(Op::Rw).encode();
    let mut taken = 0;
    // A flood of what has to be answered, and no buffer for an answer.
    for _ in 0..400 {
        guest.send_raw(&packet);
        taken += guest.driver.used(queue::SEND).len();
        if guest.sent - taken == 30 {
            break;
        }
    }
    let sent = guest.sent;
    assert!(taken >= 100 && taken < sent, "{taken} of {sent} taken");
    // With buffers, every one is.
    guest.post(8);
    for _ in 0..sent {
        guest.expect(&Conn::new(1000, 5000), Op::Rst);
    }
    guest.expect_silence();
    taken += guest.driver.used(queue::SEND).len();
    assert_eq!(taken, sent);
}

#[test]
fn there_are_at_most_1023_connections() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure outlives both calls, which change a number.
    let enough = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0 && limit.rlim_max >= 4096
    };
    if !enough {
        println!("SKIPPED: there_are_at_most_1023_connections: too few descriptors");
        return;
    }
    let mut guest = Guest::new();
    let listener = guest.listen(5000);
    let mut pairs: Vec<_> = (0..MAX_CONNECTIONS as u32)
        .map(|port| guest.connect(1000 + port, &listener, 5000))
        .collect();
    assert_eq!(pairs.len(), 1023);
    let more = Conn::new(1, 5000);
    guest.send(&more, Op::Request, 0, &[]);
    guest.expect(&more, Op::Rst);
    // Nor can a client have one.
    let mut client = guest.client();
    assert_eq!(client.read(&mut [0; 1]).unwrap_or(0), 0);
    // Where one goes, another can come.
    let (conn, _socket) = pairs.swap_remove(500);
    guest.send(&conn, Op::Rst, 0, &[]);
    guest.connect(1, &listener, 5000);
}

fn any_header() -> impl Strategy<Value = Header> {
    (
        (0..4_u32, 4999..5002_u32),
        prop_oneof![4 => Just(1_u16), 1 => any::<u16>()],
        0..9_u16,
        (any::<u32>(), any::<u32>(), 0..4_u32),
        prop_oneof![4 => 0..20_u32, 1 => any::<u32>()],
    )
        .prop_map(
            |(ports, kind, op, (buf_alloc, fwd_cnt, flags), len)| Header {
                src_cid: GUEST_CID,
                dst_cid: HOST_CID,
                src_port: ports.0,
                dst_port: ports.1,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest sends, the device goes on for those who behave.
    #[test]
    fn no_sequence_of_packets_harms_the_device(
        headers in proptest::collection::vec(any_header(), 0..60),
    ) {
        let mut guest = Guest::new();
        let listener = guest.listen(5000);
        listener.set_nonblocking(true).unwrap();
        let mut sockets = Vec::new();
        for header in &headers {
            guest.send_packet(header, b"0123456789");
            guest.poll();
            sockets.extend(listener.accept().map(|(socket, _)| socket));
        }
        prop_assert!(!guest.driver.broken());
        drop(sockets);
        // Everything owed is told at last.
        while guest.receive_within(Duration::from_millis(5)).is_some() {}
        while let Ok(waiting) = listener.accept() {
            drop(waiting);
        }
        listener.set_nonblocking(false).unwrap();
        let conn = Conn::new(77, 5000);
        guest.send(&conn, Op::Request, 0, &[]);
        let deadline = std::time::Instant::now() + LONG;
        loop {
            let packet = guest.receive();
            if packet.header.dst_port == 77 {
                prop_assert_eq!(packet.op(), Op::Response);
                break;
            }
            prop_assert!(std::time::Instant::now() < deadline);
        }
    }
}
