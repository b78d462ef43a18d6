// SPDX-License-Identifier: Apache-2.0

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use super::{device::queue, Console, Outputs};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Tokens of the descriptors.
const CONSOLE_FILE: u32 = 6;
const LOG_FILE: u32 = 7;
const NONE: [u32; 0] = [];

fn pair() -> (UnixStream, File) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, File::from(OwnedFd::from(theirs)))
}

/// A device at whose ports somebody is.
struct Rig {
    console: UnixStream,
    log: UnixStream,
    driver: Driver<Console>,
}

impl Rig {
    fn new() -> Self {
        let (console, file) = pair();
        let (log, other) = pair();
        let outputs = Outputs {
            console: Some(file),
            input: true,
            log: Some(other),
        };
        Self {
            console,
            log,
            driver: Driver::new(Console::new(outputs)),
        }
    }

    /// One of which the guest has opened both ports.
    fn open() -> Self {
        let mut this = Self::new();
        for port in [0, 1] {
            this.control(port, PORT_OPEN, 1);
        }
        this
    }

    fn control(&mut self, id: u32, event: u16, value: u16) {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.transmit(queue::CONTROL_TRANSMIT, &message);
    }

    fn transmit(&mut self, queue: usize, bytes: &[u8]) {
        let at = self.driver.buffer(bytes.len() as u64);
        self.driver.write(at, bytes);
        self.driver
            .queue(queue, &[(at, bytes.len() as u32, READ_ONLY)]);
        self.driver.kick(queue);
    }

    /// A buffer to receive by.
    fn offer(&mut self, queue: usize, length: u32) -> u64 {
        let at = self.driver.buffer(length.into());
        self.driver.queue(queue, &[(at, length, READ_WRITE)]);
        self.driver.kick(queue);
        at
    }

    /// The next control message of the device: port, event, and what follows the
    /// value.
    fn told(&mut self) -> Option<(u32, u16, Vec<u8>)> {
        let at = self.offer(queue::CONTROL_RECEIVE, 64);
        let length = *self.driver.used(queue::CONTROL_RECEIVE).first()?;
        let message = self.driver.read(at, length as usize);
        let id = u32::from_le_bytes(message[..4].try_into().unwrap());
        let event = u16::from_le_bytes(message[4..6].try_into().unwrap());
        assert_eq!(message[6..8], [1, 0]);
        Some((id, event, message[8..].to_vec()))
    }
}

fn all(from: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match from.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            bytes
        }
    }
}

#[test]
fn the_ports_are_introduced() {
    let mut rig = Rig::new();
    let mut config = [0; 8];
    rig.driver.device().read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0]);
    // It is asked before there is a buffer for the answer.
    rig.control(u32::MAX, 0, 1);
    assert_eq!(rig.told(), Some((0, PORT_ADD, vec![])));
    assert_eq!(rig.told(), Some((1, PORT_ADD, vec![])));
    rig.control(0, PORT_READY, 1);
    rig.control(1, PORT_READY, 1);
    assert_eq!(rig.told(), Some((0, CONSOLE_PORT, vec![])));
    assert_eq!(rig.told(), Some((1, PORT_NAME, b"log".to_vec())));
    assert_eq!(rig.told(), Some((0, PORT_OPEN, vec![])));
    assert_eq!(rig.told(), Some((1, PORT_OPEN, vec![])));
    assert_eq!(rig.told(), None);
    assert_eq!(rig.driver.interrupts(queue::CONTROL_RECEIVE), 6);
    assert_eq!(rig.driver.used(queue::CONTROL_TRANSMIT), [0, 0, 0]);
    assert!(!rig.driver.broken());
}

#[test]
fn a_guest_that_only_asks_is_told_once() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        rig.control(0, 0, 1);
        rig.control(0, PORT_READY, 1);
        // Nobody's, of a kind that nobody sends, and one that has failed.
        rig.control(2, PORT_READY, 1);
        rig.control(1, 77, 1);
        rig.control(1, PORT_READY, 0);
        rig.driver.forget_buffers();
    }
    let told: Vec<_> = std::iter::from_fn(|| rig.told()).collect();
    let told: Vec<_> = told.iter().map(|(id, event, _)| (*id, *event)).collect();
    let wanted = [
        (0, PORT_ADD),
        (1, PORT_ADD),
        (0, CONSOLE_PORT),
        (0, PORT_OPEN),
    ];
    assert_eq!(told, wanted);
}

#[test]
fn bytes_go_out_by_both_ports_and_come_in_by_one() {
    let mut rig = Rig::open();
    rig.transmit(queue::CONSOLE_TRANSMIT, b"hello ");
    let (first, second) = (rig.driver.buffer(64), rig.driver.buffer(64));
    rig.driver.write(first, b"wor");
    rig.driver.write(second, b"ld");
    rig.driver.queue(
        queue::CONSOLE_TRANSMIT,
        &[(first, 3, READ_ONLY), (second, 2, READ_ONLY)],
    );
    rig.driver.kick(queue::CONSOLE_TRANSMIT);
    rig.transmit(queue::LOG_TRANSMIT, b"a line\n");
    assert_eq!(all(&mut rig.console), b"hello world");
    assert_eq!(all(&mut rig.log), b"a line\n");
    assert_eq!(rig.driver.used(queue::CONSOLE_TRANSMIT), [0, 0]);
    assert_eq!(rig.driver.used(queue::LOG_TRANSMIT), [0]);
    // Of what comes in, a buffer takes what fits.
    rig.console.write_all(b"typed").unwrap();
    let at = rig.offer(queue::CONSOLE_RECEIVE, 3);
    let rest = rig.offer(queue::CONSOLE_RECEIVE, 64);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), [3, 2]);
    assert_eq!(rig.driver.read(at, 3), b"typ");
    assert_eq!(rig.driver.read(rest, 2), b"ed");
    let later = rig.offer(queue::CONSOLE_RECEIVE, 64);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), NONE);
    rig.console.write_all(b"!").unwrap();
    rig.driver.event(CONSOLE_FILE);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), [1]);
    assert_eq!(rig.driver.read(later, 1), b"!");
    // Nothing is read for the log, whatever comes there.
    rig.log.write_all(b"?").unwrap();
    rig.offer(4, 64);
    assert_eq!(rig.driver.used(4), NONE);
    let metrics = rig.driver.metrics();
    assert_eq!((metrics.bytes_from_guest, metrics.errors), (18, 0));
    assert_eq!(metrics.bytes_to_guest, 6);
}

#[test]
fn input_waits_for_who_takes_it_and_may_end() {
    let mut rig = Rig::new();
    rig.console.write_all(b"early").unwrap();
    let at = rig.offer(queue::CONSOLE_RECEIVE, 64);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), NONE);
    rig.control(0, PORT_OPEN, 1);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), [5]);
    assert_eq!(rig.driver.read(at, 5), b"early");
    rig.control(0, PORT_OPEN, 0);
    rig.offer(queue::CONSOLE_RECEIVE, 64);
    rig.console.write_all(b"last").unwrap();
    rig.console.shutdown(std::net::Shutdown::Write).unwrap();
    rig.driver.event(CONSOLE_FILE);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), NONE);
    rig.control(0, PORT_OPEN, 1);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), [4]);
    rig.offer(queue::CONSOLE_RECEIVE, 64);
    rig.driver.event(CONSOLE_FILE);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), NONE);
    // Its output goes on.
    rig.transmit(queue::CONSOLE_TRANSMIT, b"x");
    assert_eq!(all(&mut rig.console), b"x");
    assert!(!rig.driver.broken());
}

#[test]
fn a_console_that_nobody_reads_drops_and_goes_on() {
    let mut rig = Rig::open();
    for _ in 0..100 {
        rig.transmit(queue::CONSOLE_TRANSMIT, &[b'x'; 32 << 10]);
        rig.driver.forget_buffers();
        assert_eq!(rig.driver.used(queue::CONSOLE_TRANSMIT), [0]);
    }
    let read = all(&mut rig.console).len() as u64;
    let metrics = rig.driver.metrics();
    assert!(metrics.errors > 10, "{metrics:?}");
    assert_eq!(metrics.bytes_from_guest, read);
    rig.transmit(queue::CONSOLE_TRANSMIT, b"again");
    assert_eq!(all(&mut rig.console), b"again");
    // Gone for good.
    drop(rig.console);
    let at = rig.driver.buffer(64);
    for _ in 0..3 {
        rig.driver
            .queue(queue::CONSOLE_TRANSMIT, &[(at, 5, READ_ONLY)]);
        rig.driver.kick(queue::CONSOLE_TRANSMIT);
    }
    assert_eq!(rig.driver.used(queue::CONSOLE_TRANSMIT), [0; 4]);
    assert_eq!(rig.driver.metrics().errors, metrics.errors + 3);
    assert!(!rig.driver.broken());
}

#[test]
fn a_log_that_nobody_reads_waits_and_loses_nothing() {
    let mut rig = Rig::open();
    let mut sent = Vec::new();
    let mut used = 0;
    for byte in 0..40_u8 {
        rig.transmit(queue::LOG_TRANSMIT, &[byte; 32 << 10]);
        sent.extend([byte; 32 << 10]);
        used += rig.driver.used(queue::LOG_TRANSMIT).len();
    }
    assert!(used < 40, "the socket took {used} buffers");
    let mut received = Vec::new();
    while received.len() < sent.len() {
        let before = received.len();
        received.extend(all(&mut rig.log));
        assert!(received.len() > before);
        // There is room, as the loop would tell.
        rig.driver.event(LOG_FILE);
        used += rig.driver.used(queue::LOG_TRANSMIT).len();
    }
    assert!(received == sent);
    assert_eq!(used, 40);
    assert_eq!(rig.driver.metrics().errors, 0);
}

#[test]
fn a_log_without_a_reader_is_dropped() {
    let mut rig = Rig::open();
    for _ in 0..20 {
        rig.transmit(queue::LOG_TRANSMIT, &[b'x'; 32 << 10]);
    }
    let before = rig.driver.used(queue::LOG_TRANSMIT).len();
    assert!(before < 20);
    drop(rig.log);
    rig.driver.event(LOG_FILE);
    assert_eq!(rig.driver.used(queue::LOG_TRANSMIT).len(), 20 - before);
    assert_eq!(rig.driver.metrics().errors, 20 - before as u64);
    assert!(!rig.driver.broken());
}

#[test]
fn ports_that_lead_nowhere_take_all() {
    let mut driver = Driver::new(Console::new(Outputs::default()));
    let at = driver.buffer(64);
    for queue in [queue::CONSOLE_TRANSMIT, queue::LOG_TRANSMIT] {
        // As long as four gigabytes, which nobody looks at.
        driver.queue(queue, &[(at, u32::MAX, READ_ONLY)]);
        driver.kick(queue);
        assert_eq!(driver.used(queue), [0]);
    }
    driver.queue(queue::CONSOLE_RECEIVE, &[(at, 64, READ_WRITE)]);
    driver.kick(queue::CONSOLE_RECEIVE);
    assert_eq!(driver.used(queue::CONSOLE_RECEIVE), NONE);
    assert_eq!(driver.metrics().errors, 0);
}

#[test]
fn a_long_buffer_takes_several_turns() {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    let outputs = Outputs {
        console: Some(file.try_clone().unwrap()),
        input: false,
        log: None,
    };
    let mut driver = Driver::new(Console::new(outputs));
    // The same mebibyte three times.
    let at = driver.buffer(1 << 20);
    driver.write(at, &vec![b'y'; 1 << 20]);
    let part = (at, 1 << 20, READ_ONLY);
    driver.queue(queue::CONSOLE_TRANSMIT, &[part, part, part]);
    for turn in 1..=12 {
        driver.kick(queue::CONSOLE_TRANSMIT);
        assert_eq!(file.metadata().unwrap().len(), turn * (256 << 10));
        let done = driver.used(queue::CONSOLE_TRANSMIT).len();
        assert_eq!(done, usize::from(turn == 12));
    }
}

#[test]
fn what_breaks_a_rule_stops_the_device() {
    type Chain = &'static [(u64, u32, u16)];
    const WILD: u64 = 0xffff_0000_0000;
    let rules: [(usize, Chain); 8] = [
        // Half a control message, or one that is nowhere.
        (queue::CONTROL_TRANSMIT, &[(0x80_0000, 7, READ_ONLY)]),
        (queue::CONTROL_TRANSMIT, &[(WILD, 8, READ_ONLY)]),
        // No room for one.
        (queue::CONTROL_RECEIVE, &[(0x80_0000, 7, READ_WRITE)]),
        (queue::CONTROL_RECEIVE, &[(WILD, 8, READ_WRITE)]),
        (queue::CONSOLE_TRANSMIT, &[(WILD, 1, READ_ONLY)]),
        (queue::LOG_TRANSMIT, &[(u64::MAX, u32::MAX, READ_ONLY)]),
        (queue::CONSOLE_RECEIVE, &[(WILD, 8, READ_WRITE)]),
        // A buffer that holds nothing.
        (queue::CONSOLE_RECEIVE, &[(0x80_0000, 8, READ_ONLY)]),
    ];
    for (queue, chain) in rules {
        let mut rig = Rig::open();
        rig.console.write_all(b"input").unwrap();
        rig.control(0, 0, 1);
        assert!(!rig.driver.broken());
        rig.driver.queue(queue, chain);
        rig.driver.kick(queue);
        assert!(rig.driver.broken(), "{queue} {chain:?}");
        // And stays so.
        rig.driver.event(CONSOLE_FILE);
        rig.transmit(queue::CONSOLE_TRANSMIT, b"x");
        assert_eq!(all(&mut rig.console), b"");
    }
}

#[test]
fn a_driver_that_starts_anew_is_told_anew() {
    let mut rig = Rig::open();
    rig.control(0, 0, 1);
    rig.driver.restart();
    assert_eq!(rig.told(), None);
    rig.console.write_all(b"input").unwrap();
    rig.offer(queue::CONSOLE_RECEIVE, 64);
    assert_eq!(rig.driver.used(queue::CONSOLE_RECEIVE), NONE);
    rig.control(0, 0, 1);
    // Its buffer is there already.
    assert_eq!(rig.driver.used(queue::CONTROL_RECEIVE), [8]);
    assert_eq!(rig.told(), Some((1, PORT_ADD, vec![])));
}

#[test]
fn a_saved_device_goes_on() {
    let mut rig = Rig::open();
    rig.control(0, PORT_READY, 1);
    // Half of a buffer is written.
    for _ in 0..20 {
        rig.transmit(queue::LOG_TRANSMIT, &[b'x'; 32 << 10]);
    }
    let written = rig.driver.metrics().bytes_from_guest;
    let state = rig.driver.device().save().unwrap();
    let mut other = Rig::new();
    other.driver.device().restore(&state).unwrap();
    assert_eq!(rig.driver.device().save().unwrap(), state);
    assert_eq!(other.told(), Some((0, CONSOLE_PORT, vec![])));
    // Its console is open.
    other.console.write_all(b"input").unwrap();
    other.offer(queue::CONSOLE_RECEIVE, 64);
    assert_eq!(other.driver.used(queue::CONSOLE_RECEIVE), [5]);
    // And the buffer's other half is still to come.
    other.transmit(queue::LOG_TRANSMIT, &[b'x'; 32 << 10]);
    let part = written % (32 << 10);
    assert_eq!(all(&mut other.log).len() as u64, (32 << 10) - part);
    let refused = Console::new(Outputs::default()).restore(&state[1..]);
    assert!(refused.is_err());
}

#[test]
fn a_live_device_works_by_itself() {
    let (mut console, file) = pair();
    let (mut log, other) = pair();
    console.set_nonblocking(false).unwrap();
    log.set_nonblocking(false).unwrap();
    let outputs = Outputs {
        console: Some(file),
        input: true,
        log: Some(other),
    };
    let mut driver = Driver::live(Console::new(outputs));
    let open = driver.buffer(64);
    for port in [0_u8, 1] {
        driver.write(open, &[port, 0, 0, 0, PORT_OPEN as u8, 0, 1, 0]);
        driver.queue(queue::CONTROL_TRANSMIT, &[(open, 8, READ_ONLY)]);
        driver.notify(queue::CONTROL_TRANSMIT);
        while driver.used(queue::CONTROL_TRANSMIT).is_empty() {
            std::thread::yield_now();
        }
    }
    // More of the log than fits anywhere: it waits until it is read.
    let at = driver.buffer(1 << 20);
    driver.write(at, &vec![b'z'; 1 << 20]);
    driver.queue(queue::LOG_TRANSMIT, &[(at, 1 << 20, READ_ONLY)]);
    driver.notify(queue::LOG_TRANSMIT);
    let mut received = vec![0; 1 << 20];
    log.read_exact(&mut received).unwrap();
    assert!(received.iter().all(|byte| *byte == b'z'));
    // Input, of which the loop tells.
    let at = driver.buffer(64);
    driver.queue(queue::CONSOLE_RECEIVE, &[(at, 64, READ_WRITE)]);
    driver.notify(queue::CONSOLE_RECEIVE);
    console.write_all(b"typed").unwrap();
    while driver.used(queue::CONSOLE_RECEIVE).is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(driver.read(at, 5), b"typed");
    // An end that keeps nobody busy.
    drop(console);
    driver.device().reset();
}
