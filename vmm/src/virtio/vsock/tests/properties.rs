// SPDX-License-Identifier: Apache-2.0
//! Credit, whatever is said, sent and taken, in any order: counted here without
//! an end, where the device's numbers go round.

use std::io::Write;

use proptest::prelude::*;

use super::{pattern, Conn, Guest, Op};
use crate::virtio::vsock::{
    connection::{Connection, HostEvent, Output, Phase, Verdict, BUFFER},
    packet::{shutdown, Header},
};

/// What may happen to a connection.
#[derive(Debug, Clone)]
enum Step {
    /// The guest tells of its buffer, and of a part (in 255ths) of what it was
    /// sent that it has taken since.
    Guest {
        buffer: u32,
        takes: u8,
    },
    /// It tells what is not so.
    Lie {
        buffer: u32,
        taken: u32,
    },
    /// It sends; as much as it was told that it may at most, unless it lies.
    Send {
        length: u32,
    },
    /// The host's client takes a part of what is held.
    Take {
        part: u8,
    },
    /// The host has data, of which a part of what may be sent is sent at a time.
    Data {
        part: u8,
    },
    /// The guest wants to know its credit, or ends something.
    Ask,
    Shutdown {
        flags: u32,
    },
    /// Something ends on the host's side.
    Host(HostEvent),
}

fn steps(honest: bool) -> impl Strategy<Value = Vec<Step>> {
    let buffer = prop_oneof![
        Just(0_u32),
        0..200_000_u32,
        Just(u32::MAX),
        Just(1 << 31),
        any::<u32>()
    ];
    let length = prop_oneof![1..=BUFFER, Just(BUFFER), 1..100_u32];
    let orderly = prop_oneof![
        4 => (buffer.clone(), any::<u8>()).prop_map(|(buffer, takes)| Step::Guest { buffer, takes }),
        4 => length.prop_map(|length| Step::Send { length }),
        3 => any::<u8>().prop_map(|part| Step::Take { part }),
        5 => any::<u8>().prop_map(|part| Step::Data { part }),
        1 => Just(Step::Ask),
    ];
    let ending = prop_oneof![
        2 => (buffer, any::<u32>()).prop_map(|(buffer, taken)| Step::Lie { buffer, taken }),
        1 => any::<u32>().prop_map(|length| Step::Send { length }),
        1 => (1..=shutdown::SEND | shutdown::RECEIVE).prop_map(|flags| Step::Shutdown { flags }),
        1 => prop_oneof![
            Just(HostEvent::Ended),
            Just(HostEvent::Unwritable),
            Just(HostEvent::Failed),
            Just(HostEvent::Timeout),
        ]
        .prop_map(Step::Host),
    ];
    let weight = if honest { 0 } else { 1 };
    let step = prop_oneof![12 => orderly, weight => ending];
    prop::collection::vec(step, 1..100)
}

/// Both ends' true counts.
#[derive(Default)]
struct Counts {
    /// Bytes to the guest: sent, taken by it, and its buffer as it was last told.
    sent: u64,
    taken: u64,
    buffer: u64,
    /// What it was sent since is more than these numbers can tell.
    lied: bool,
    /// Bytes of the guest: sent, and what it was told the host had taken.
    guest_sent: u64,
    host_taken: u64,
    told: u64,
}

/// Lets a connection go through steps; what is promised holds after each.
fn go_through(steps: Vec<Step>, honest: bool) -> Result<(), TestCaseError> {
    let mut counts = Counts::default();
    let request = Header {
        op: Op::Request as u16,
        ..Header::default()
    };
    let mut connection = Connection::accepted(&request);
    for step in steps {
        let part = |all: u64, part: u8| all * u64::from(part) / 255;
        let mut header = Header {
            buf_alloc: counts.buffer as u32,
            fwd_cnt: counts.taken as u32,
            ..Header::default()
        };
        match step {
            Step::Guest { buffer, takes } => {
                counts.taken += part(counts.sent - counts.taken, takes);
                counts.buffer = buffer.into();
                header.buf_alloc = buffer;
                header.fwd_cnt = counts.taken as u32;
                connection.on_guest(Op::CreditUpdate, &header);
            }
            Step::Lie { buffer, taken } => {
                counts.lied = true;
                (header.buf_alloc, header.fwd_cnt) = (buffer, taken);
                connection.on_guest(Op::CreditUpdate, &header);
                counts.buffer = buffer.into();
            }
            Step::Send { length } => {
                let allowed = u64::from(BUFFER) - (counts.guest_sent - counts.told);
                let length = if honest {
                    u64::from(length).min(allowed)
                } else {
                    length.into()
                };
                header.len = length as u32;
                let verdict = connection.on_guest(Op::Rw, &header);
                match verdict {
                    Verdict::Deliver => {
                        prop_assert!(length <= allowed, "{length} bytes of {allowed}");
                        counts.guest_sent += length;
                    }
                    Verdict::Discard => {
                        counts.guest_sent += length;
                        counts.host_taken = counts.guest_sent;
                    }
                    _ => prop_assert!(!honest, "an honest guest is refused: {verdict:?}"),
                }
            }
            Step::Take { part: taken } => {
                let bytes = part(connection.held().into(), taken) as u32;
                connection.host_took(bytes);
                counts.host_taken += u64::from(bytes);
            }
            Step::Data { part: size } => {
                connection.host_has_data();
                while let Some(output) = connection.next(true) {
                    let mut header = Header::default();
                    let mut output = output;
                    if let Output::Data(most) = output {
                        let in_flight = counts.sent - counts.taken;
                        if !counts.lied {
                            let room = counts.buffer.saturating_sub(in_flight);
                            prop_assert_eq!(u64::from(most), room);
                        }
                        let length = part(most.into(), size).max(1) as u32;
                        output = Output::Data(length);
                        counts.sent += u64::from(length);
                    }
                    connection.told(output, &mut header);
                    prop_assert_eq!(header.buf_alloc, BUFFER);
                    counts.told = counts.host_taken;
                    if matches!(output, Output::Data(_)) && size < 64 {
                        break;
                    }
                }
            }
            Step::Ask => {
                connection.on_guest(Op::CreditRequest, &header);
            }
            Step::Shutdown { flags } => {
                header.flags = flags;
                connection.on_guest(Op::Shutdown, &header);
            }
            Step::Host(event) => {
                let held = connection.held();
                connection.on_host(event);
                counts.host_taken += u64::from(held - connection.held());
            }
        }
        prop_assert!(connection.held() <= BUFFER, "{} held", connection.held());
        prop_assert_eq!(
            u64::from(connection.held()),
            counts.guest_sent - counts.host_taken
        );
        prop_assert!(counts.lied || !honest || counts.sent - counts.taken <= u64::from(u32::MAX));
        if honest {
            prop_assert_eq!(connection.phase(), Phase::Open);
        } else if connection.phase() != Phase::Open {
            break;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// An honest guest is sent exactly what it has room for, and may send what
    /// it was told, for ever.
    #[test]
    fn who_keeps_to_the_rules_is_served(steps in steps(true)) {
        go_through(steps, true)?;
    }

    /// Another makes the host hold no more than it promised to.
    #[test]
    fn who_does_not_is_held_to_them(steps in steps(false)) {
        go_through(steps, false)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The same by the device with a client that has written more than fits: what
    /// arrives is what there is room for, not a byte more, and in order.
    #[test]
    fn the_guest_gets_what_it_has_room_for(
        steps in prop::collection::vec((0_u32..60_000, any::<u8>()), 1..8)
    ) {
        let mut guest = Guest::new();
        let listener = guest.listen(5000);
        let mut conn = Conn::new(1000, 5000);
        conn.buf_alloc = 0;
        guest.send(&conn, Op::Request, 0, &[]);
        guest.expect(&conn, Op::Response);
        let (mut socket, _) = listener.accept().unwrap();
        let data = pattern(600_000);
        let written = data.clone();
        let writer = std::thread::spawn(move || {
            // Until the guest is gone.
            let _ = socket.write_all(&written);
            socket
        });
        // Nothing fits, so it asks.
        guest.expect(&conn, Op::CreditRequest);
        let mut got = Vec::new();
        for (buffer, takes) in steps {
            let before = conn.fwd_cnt;
            let left = got.len() as u32 - before;
            conn.fwd_cnt += left * u32::from(takes) / 255;
            conn.buf_alloc = buffer;
            guest.send(&conn, Op::CreditUpdate, 0, &[]);
            let fits = (conn.fwd_cnt + buffer) as usize;
            if fits <= got.len() {
                continue;
            }
            while got.len() < fits {
                got.extend(guest.expect(&conn, Op::Rw).data);
            }
            prop_assert_eq!(got.len(), fits);
            guest.expect(&conn, Op::CreditRequest);
        }
        guest.expect_silence();
        prop_assert!(got == data[..got.len()]);
        drop(guest);
        writer.join().unwrap();
    }
}
