// SPDX-License-Identifier: Apache-2.0
//! The device against a driver that speaks packets, and clients with real
//! sockets. It runs on its loop, as in a VM.

mod credit;
mod guest_connects;
mod host_connects;
mod hostile;
mod properties;

use std::{
    collections::VecDeque,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bulkhead_vmm_api::VsockConfig;
use vmm_sys_util::tempdir::TempDir;

use super::{
    device::queue,
    packet::{Header, Op, HEADER_LEN, HOST_CID, TYPE_STREAM},
    Vsock,
};
use crate::virtio::testing::{Driver, READ_ONLY, READ_WRITE};

const GUEST_CID: u64 = 3;
/// Data per receive buffer, as Linux posts them.
const PAGE: usize = 4096;
/// Receive buffers.
const BUFFERS: usize = 32;
/// How long something may take that has to happen.
const LONG: Duration = Duration::from_secs(10);
/// How long is waited for what must not happen.
const SHORT: Duration = Duration::from_millis(100);

/// A packet that the guest received.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Packet {
    fn op(&self) -> Op {
        Op::from_raw(self.header.op).expect("the device sends operations that exist")
    }
}

/// The guest's driver, and the directory with the host's sockets.
struct Guest {
    driver: Driver<Vsock>,
    directory: TempDir,
    connects: Arc<Mutex<Vec<u32>>>,
    posted: VecDeque<u64>,
    received: VecDeque<Packet>,
    /// Where packets to send are put, in turn.
    space: Vec<u64>,
    sent: usize,
}

/// A connection as the guest sees it.
#[derive(Debug, Clone)]
struct Conn {
    guest: u32,
    host: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.post(BUFFERS);
        guest
    }

    fn without_buffers() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let config = VsockConfig {
            cid: GUEST_CID as u32,
            listener: Some(0),
            uds_path: path.to_str().unwrap().into(),
            ready_port: None,
        };
        let connects = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&connects);
        let device = Vsock::new(
            &config,
            Some(listener.into()),
            Arc::new(move |port| seen.lock().unwrap().push(port)),
        )
        .unwrap();
        let mut driver = Driver::live(device);
        let space = (0..32)
            .map(|_| driver.buffer((HEADER_LEN + 64 * 1024) as u64))
            .collect();
        Self {
            driver,
            directory,
            connects,
            posted: VecDeque::new(),
            received: VecDeque::new(),
            space,
            sent: 0,
        }
    }

    fn path(&self, port: u32) -> PathBuf {
        self.directory.as_path().join(format!("vsock_{port}"))
    }

    /// A server of the host's.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(port)).unwrap()
    }

    /// A client of the host's.
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.directory.as_path().join("vsock")).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        client
    }

    /// Posts more receive buffers.
    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.driver.buffer((HEADER_LEN + PAGE) as u64);
            self.repost(buffer);
        }
        self.driver.kick(queue::RECEIVE);
    }

    fn repost(&mut self, buffer: u64) {
        let length = (HEADER_LEN + PAGE) as u32;
        self.driver
            .queue(queue::RECEIVE, &[(buffer, length, READ_WRITE)]);
        self.posted.push_back(buffer);
    }

    fn poll(&mut self) {
        let used = self.driver.used(queue::RECEIVE);
        for length in &used {
            let buffer = self.posted.pop_front().unwrap();
            let raw = self.driver.read(buffer, *length as usize);
            let header = Header::parse(raw[..HEADER_LEN].try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
            assert_eq!(header.len as usize, raw.len() - HEADER_LEN);
            self.received.push_back(Packet {
                header,
                data: raw[HEADER_LEN..].to_vec(),
            });
            self.repost(buffer);
        }
        if !used.is_empty() {
            self.driver.kick(queue::RECEIVE);
        }
    }

    /// The next packet within some time.
    fn receive_within(&mut self, patience: Duration) -> Option<Packet> {
        let deadline = Instant::now() + patience;
        loop {
            self.poll();
            if let Some(packet) = self.received.pop_front() {
                return Some(packet);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn receive(&mut self) -> Packet {
        self.receive_within(LONG).expect("a packet comes")
    }

    /// The next packet, which is of a kind and of a connection.
    fn expect(&mut self, conn: &Conn, op: Op) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op(), op, "{packet:?}");
        assert_eq!(packet.header.dst_port, conn.guest, "{packet:?}");
        assert_eq!(packet.header.src_port, conn.host, "{packet:?}");
        packet
    }

    fn expect_silence(&mut self) {
        assert_eq!(self.receive_within(SHORT), None);
    }

    /// Sends bytes as they are.
    fn send_raw(&mut self, bytes: &[u8]) {
        let at = self.space[self.sent % self.space.len()];
        self.sent += 1;
        self.driver.write(at, bytes);
        self.driver
            .queue(queue::SEND, &[(at, bytes.len() as u32, READ_ONLY)]);
        self.driver.kick(queue::SEND);
    }

    fn send_packet(&mut self, header: &Header, data: &[u8]) {
        self.send_raw(&[&header.encode()[..], data].concat());
        assert!(!self.wait_used(queue::SEND).is_empty());
    }

    fn wait_used(&mut self, index: usize) -> Vec<u32> {
        let deadline = Instant::now() + LONG;
        loop {
            let used = self.driver.used(index);
            if !used.is_empty() || Instant::now() > deadline {
                return used;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn send(&mut self, conn: &Conn, op: Op, flags: u32, data: &[u8]) {
        let header = Header {
            flags,
            len: data.len() as u32,
            ..conn.header(op)
        };
        self.send_packet(&header, data);
    }

    /// Connects to a server of the host's.
    fn connect(&mut self, guest: u32, listener: &UnixListener, host: u32) -> (Conn, UnixStream) {
        let conn = Conn::new(guest, host);
        self.send(&conn, Op::Request, 0, &[]);
        self.expect(&conn, Op::Response);
        let (socket, _) = listener.accept().unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        (conn, socket)
    }

    /// Data that comes until there is so much of it; the guest takes it at
    /// once, and says so when half of its buffer is owed.
    fn receive_data(&mut self, conn: &mut Conn, length: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let mut told = conn.fwd_cnt;
        while data.len() < length {
            let packet = self.receive();
            match packet.op() {
                Op::Rw => {
                    conn.fwd_cnt = conn.fwd_cnt.wrapping_add(packet.header.len);
                    data.extend_from_slice(&packet.data);
                }
                Op::CreditRequest => {}
                other => panic!("{other:?} instead of data"),
            }
            if conn.fwd_cnt.wrapping_sub(told) >= conn.buf_alloc / 2
                || packet.op() == Op::CreditRequest
            {
                told = conn.fwd_cnt;
                self.send(conn, Op::CreditUpdate, 0, &[]);
            }
        }
        data
    }
}

impl Conn {
    fn new(guest: u32, host: u32) -> Self {
        Self {
            guest,
            host,
            buf_alloc: 256 * 1024,
            fwd_cnt: 0,
        }
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }
}

/// Bytes that tell if some are missing or out of order.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8)) as u8).collect()
}
