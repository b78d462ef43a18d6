// SPDX-License-Identifier: Apache-2.0
//! Many commands over one stream: the owner's side of the protocol.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::error::{io_step, BoxError};
use super::proto::{word, Exit, Frame, Kind, Ready, Spec, CHUNK, WINDOW};

/// What a running command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wrote to standard output, or to its terminal.
    Stdout(Vec<u8>),
    /// It wrote to standard error.
    Stderr(Vec<u8>),
    /// It ended; nothing follows.
    Exit(Exit),
}

enum Incoming {
    Event(Event),
    Failed(String),
    Ready(Ready),
}

#[derive(Default)]
struct Table {
    sessions: HashMap<u32, Slot>,
    next: u32,
    gone: Option<String>,
}

/// Who gets the frames of a session.
enum Slot {
    /// A [`Session`] in this process.
    Local {
        events: Sender<Incoming>,
        stdin: Arc<Window>,
    },
    /// Another process, which knows the session by its own number.
    Relay { client: Sender<Frame>, id: u32 },
}

/// Room the box has for a command's standard input.
#[derive(Default)]
struct Window {
    room: Mutex<(u32, bool)>,
    changed: Condvar,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, (u32, bool)> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: u32) {
        self.lock().0 += bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().1 = true;
        self.changed.notify_all();
    }

    /// Waits for room and takes up to `want` of it; `None` when closed.
    fn take(&self, want: u32) -> Option<u32> {
        let mut room = self
            .changed
            .wait_while(self.lock(), |(room, closed)| *room == 0 && !*closed)
            .unwrap_or_else(PoisonError::into_inner);
        if room.1 {
            return None;
        }
        let got = room.0.min(want);
        room.0 -= got;
        Some(got)
    }
}

struct Inner {
    writer: Mutex<UnixStream>,
    table: Mutex<Table>,
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.write_all(&frame.encode())
    }

    fn gone(&self) -> BoxError {
        let why = self.table().gone.clone();
        BoxError::Gone(why.unwrap_or_else(|| "its connection is closed".into()))
    }

    /// Enters a session and gives it a number.
    fn add(&self, slot: Slot) -> Result<u32, BoxError> {
        let mut table = self.table();
        if let Some(why) = &table.gone {
            return Err(BoxError::Gone(why.clone()));
        }
        let id = table.next;
        table.next += 1;
        table.sessions.insert(id, slot);
        Ok(id)
    }

    fn receive(&self, frame: Frame) {
        let mut table = self.table();
        let last = matches!(frame.kind, Kind::Exit | Kind::SpawnFailed);
        let session = frame.session;
        let (events, stdin) = match table.sessions.get(&session) {
            // The end of a session that its owner has dropped.
            None => return,
            Some(Slot::Local { events, stdin }) => (events, stdin),
            Some(Slot::Relay { client, id }) => {
                // A client that has gone is noticed where it is read.
                let _ = client.send(Frame {
                    session: *id,
                    ..frame
                });
                if last {
                    table.sessions.remove(&session);
                }
                return;
            }
        };
        let incoming = match frame.kind {
            Kind::Stdout => Incoming::Event(Event::Stdout(frame.payload)),
            Kind::Stderr => Incoming::Event(Event::Stderr(frame.payload)),
            Kind::Exit => match serde_json::from_slice(&frame.payload) {
                Ok(exit) => Incoming::Event(Event::Exit(exit)),
                Err(error) => Incoming::Failed(error.to_string()),
            },
            Kind::SpawnFailed => {
                Incoming::Failed(String::from_utf8_lossy(&frame.payload).into_owned())
            }
            Kind::Ready => match serde_json::from_slice(&frame.payload) {
                Ok(ready) => Incoming::Ready(ready),
                Err(error) => Incoming::Failed(error.to_string()),
            },
            Kind::StdinCredit => return stdin.add(word(&frame.payload, 0)),
            _ => return,
        };
        // A dropped receiver has lost interest, which is its right.
        let _ = events.send(incoming);
        if last {
            stdin.close();
            table.sessions.remove(&session);
        }
    }

    fn end(&self, why: &str) {
        let mut table = self.table();
        table.gone.get_or_insert_with(|| why.to_owned());
        for (_, slot) in table.sessions.drain() {
            if let Slot::Local { stdin, .. } = slot {
                stdin.close();
            }
        }
    }
}

/// A connection to a box, directly or through the process that holds it.
#[derive(Clone)]
pub struct Mux {
    inner: Arc<Inner>,
}

/// The session number of the machine itself.
const MACHINE: u32 = 0;

/// Waits for [`Ready`], made by [`Mux::new`].
pub struct Boot(Receiver<Incoming>);

impl Boot {
    /// What the box says when it is up; `None` when it did not within `limit`
    /// or never will.
    pub fn wait(&self, limit: Duration) -> Option<Ready> {
        match self.0.recv_timeout(limit) {
            Ok(Incoming::Ready(ready)) => Some(ready),
            _ => None,
        }
    }
}

impl Mux {
    /// Takes over `stream` and starts the thread that reads it.
    ///
    /// # Errors
    /// When the stream cannot be duplicated or no thread started.
    pub fn new(stream: UnixStream) -> Result<(Self, Boot), BoxError> {
        let mut reader = stream.try_clone().map_err(io_step("copy a socket"))?;
        let (events, ready) = mpsc::channel();
        let stdin = Arc::default();
        let mut table = Table {
            next: MACHINE + 1,
            ..Table::default()
        };
        table
            .sessions
            .insert(MACHINE, Slot::Local { events, stdin });
        let inner = Arc::new(Inner {
            writer: Mutex::new(stream),
            table: Mutex::new(table),
        });
        let shared = Arc::clone(&inner);
        thread::Builder::new()
            .name("box-reader".into())
            .spawn(move || loop {
                match Frame::read(&mut reader) {
                    Ok(Some(frame)) => shared.receive(frame),
                    Ok(None) => break shared.end("it ended"),
                    Err(error) => break shared.end(&error.to_string()),
                }
            })
            .map_err(io_step("start a thread"))?;
        Ok((Self { inner }, Boot(ready)))
    }

    /// Starts a command.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when the box has ended. A command that does not
    /// exist shows when the first event is taken.
    pub fn spawn(&self, spec: &Spec) -> Result<Session, BoxError> {
        let (events, incoming) = mpsc::channel();
        let stdin = Arc::new(Window::default());
        stdin.add(WINDOW);
        let id = {
            let stdin = Arc::clone(&stdin);
            self.inner.add(Slot::Local { events, stdin })?
        };
        let json = serde_json::to_vec(spec).expect("a spec holds only strings and numbers");
        self.inner
            .send(&Frame::new(id, Kind::Spawn, json))
            .map_err(|_| self.inner.gone())?;
        Ok(Session {
            input: Input {
                inner: Arc::clone(&self.inner),
                id,
                window: stdin,
            },
            incoming,
            ended: false,
        })
    }

    /// Serves another process on `stream` as the box would: its sessions run
    /// in the box under other numbers, and die when it goes. Returns when it
    /// has gone; `true` when it asked for the box's end.
    ///
    /// # Errors
    /// When the stream breaks.
    pub fn relay(&self, mut stream: UnixStream, ready: &Ready) -> Result<bool, BoxError> {
        let mut writer = stream.try_clone().map_err(io_step("copy a socket"))?;
        let (client, frames) = mpsc::channel::<Frame>();
        let json = serde_json::to_vec(ready).expect("it holds only strings and numbers");
        // Its receiver is alive: it is in this function.
        let _ = client.send(Frame::new(MACHINE, Kind::Ready, json));
        // A client's own window bounds what can be waiting here.
        let writing = thread::spawn(move || {
            for frame in frames {
                if frame.write(&mut writer).is_err() {
                    break;
                }
            }
            // Also when the box has ended: the client must notice.
            let _ = writer.shutdown(Shutdown::Both);
        });
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let mut power_off = false;
        while let Ok(Some(frame)) = Frame::read(&mut stream) {
            let id = frame.session;
            if frame.kind == Kind::PowerOff {
                power_off = true;
                break;
            }
            if frame.kind == Kind::Spawn {
                let client = client.clone();
                match self.inner.add(Slot::Relay { client, id }) {
                    Ok(number) => numbers.insert(id, number),
                    Err(_) => break,
                };
            }
            if let Some(session) = numbers.get(&id).copied() {
                if self.inner.send(&Frame { session, ..frame }).is_err() {
                    break;
                }
            }
        }
        for number in numbers.into_values() {
            if self.inner.table().sessions.remove(&number).is_some() {
                // A box that is gone has killed it already.
                let _ = self.inner.send(&Frame::new(number, Kind::Kill, []));
            }
        }
        drop(client);
        let _ = writing.join();
        Ok(power_off)
    }

    /// Asks for the end of the box.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when it has ended already.
    pub fn power_off(&self) -> Result<(), BoxError> {
        self.inner
            .send(&Frame::new(MACHINE, Kind::PowerOff, []))
            .map_err(|_| self.inner.gone())
    }

    /// Closes the connection: a box ends with that of its owner.
    pub fn close(&self) {
        let writer = self
            .inner
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // It may be closed already.
        let _ = writer.shutdown(Shutdown::Both);
    }
}

/// The way into a running command.
#[derive(Clone)]
pub struct Input {
    inner: Arc<Inner>,
    id: u32,
    window: Arc<Window>,
}

impl Input {
    fn send(&self, kind: Kind, payload: Vec<u8>) -> Result<(), BoxError> {
        self.inner
            .send(&Frame::new(self.id, kind, payload))
            .map_err(|_| self.inner.gone())
    }

    /// Writes to standard input; waits while the command does not read.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when the command or the box has ended.
    pub fn write(&self, mut data: &[u8]) -> Result<(), BoxError> {
        while !data.is_empty() {
            let want = data.len().min(CHUNK) as u32;
            let room = self
                .window
                .take(want)
                .ok_or_else(|| BoxError::Gone("the command ended".into()))?;
            let (now, later) = data.split_at(room as usize);
            self.send(Kind::Stdin, now.to_vec())?;
            data = later;
        }
        Ok(())
    }

    /// Ends standard input; on a terminal, types the end-of-file character.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when the box has ended.
    pub fn close(&self) -> Result<(), BoxError> {
        self.send(Kind::StdinEof, Vec::new())
    }

    /// Tells the terminal its size.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when the box has ended.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), BoxError> {
        let mut payload = rows.to_le_bytes().to_vec();
        payload.extend(cols.to_le_bytes());
        self.send(Kind::Resize, payload)
    }

    /// Sends a signal to the command's process.
    ///
    /// # Errors
    /// [`BoxError::Gone`] when the box has ended.
    pub fn signal(&self, number: u32) -> Result<(), BoxError> {
        self.send(Kind::Signal, number.to_le_bytes().to_vec())
    }
}

/// A command running in a box. Dropping it kills what it started.
pub struct Session {
    input: Input,
    incoming: Receiver<Incoming>,
    ended: bool,
}

impl Session {
    /// The way in, for use by other threads.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// The next thing that the command does.
    ///
    /// # Errors
    /// [`BoxError::Spawn`] when it could not be started, [`BoxError::Gone`]
    /// when the box ended below it.
    pub fn next_event(&mut self) -> Result<Event, BoxError> {
        match self.incoming.recv() {
            Ok(incoming) => self.take(incoming),
            Err(_) => Err(self.lost()),
        }
    }

    /// As [`Session::next_event`]; `None` when nothing happens within `limit`.
    ///
    /// # Errors
    /// As [`Session::next_event`].
    pub fn next_event_within(&mut self, limit: Duration) -> Result<Option<Event>, BoxError> {
        match self.incoming.recv_timeout(limit) {
            Ok(incoming) => self.take(incoming).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.lost()),
        }
    }

    fn lost(&mut self) -> BoxError {
        self.ended = true;
        self.input.inner.gone()
    }

    fn take(&mut self, incoming: Incoming) -> Result<Event, BoxError> {
        let event = match incoming {
            Incoming::Event(event) => event,
            Incoming::Failed(why) => {
                self.ended = true;
                return Err(BoxError::Spawn(why));
            }
            Incoming::Ready(_) => {
                return Err(BoxError::Gone("it broke the protocol".into()));
            }
        };
        let credit = match &event {
            Event::Stdout(data) => Some((1u32, data.len())),
            Event::Stderr(data) => Some((2, data.len())),
            Event::Exit(_) => {
                self.ended = true;
                None
            }
        };
        if let Some((channel, bytes)) = credit {
            let mut payload = channel.to_le_bytes().to_vec();
            payload.extend((bytes as u32).to_le_bytes());
            // A box that is gone says so at the next event.
            let _ = self.input.send(Kind::Credit, payload);
        }
        Ok(event)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            // A box that is gone has killed it already.
            let _ = self.input.send(Kind::Kill, Vec::new());
            self.input.inner.table().sessions.remove(&self.input.id);
        }
    }
}
