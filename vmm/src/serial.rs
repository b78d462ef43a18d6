// SPDX-License-Identifier: Apache-2.0
//! The first serial port (16550): what the guest writes goes to a descriptor,
//! nothing comes back. Never blocks a vCPU: what cannot be written at once is
//! dropped and counted, and so is what a file is not to grow by any more.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Mutex, Once},
};

use serde::{Deserialize, Serialize};
use vm_superio::{
    serial::{NoEvents, SerialState},
    Serial, Trigger,
};
use vmm_sys_util::eventfd::EventFd;

use crate::{arch::x86_64::layout, bus::BusDevice, pci::host::NotifyRegistrar};

/// Bytes gathered before they are written: one line in most cases.
const BUFFER: usize = 512;

/// Bytes that a file gets of one machine: a guest writes all day if it likes.
/// Pipes and terminals have somebody who reads them.
pub const FILE_LIMIT: u64 = 16 << 20;
/// What follows these bytes.
const FULL: &[u8] =
    b"\n[bulkhead-vmm: 16 MiB of the guest's console are here; the rest is not kept]\n";

/// The first of those registers that do nothing by being written: control of
/// buffers, lines and modem, and scratch.
const FIRST_QUIET: u16 = 2;
/// And how many they are.
const QUIET: u32 = 6;

/// The serial port.
pub struct SerialPort {
    serial: Mutex<Serial<Irq, NoEvents, Console>>,
    /// Writes to some of its registers may come late, from the first use on.
    registrar: Option<Arc<dyn NotifyRegistrar>>,
    used: Once,
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Gathers bytes to lines: a system call per byte would cost more than the
/// exit that brought it.
struct Console {
    output: Option<File>,
    buffer: Vec<u8>,
    dropped: u64,
    /// Bytes that the output may yet get; none: as many as there are.
    left: Option<u64>,
}

/// The port's registers, to be saved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SerialRegisters {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line: [u8; 2],
    modem: [u8; 2],
    scratch: u8,
    input: Vec<u8>,
}

impl Console {
    fn new(output: Option<File>) -> Self {
        let found = output.as_ref().map(File::metadata);
        let is_file = matches!(found, Some(Ok(found)) if found.is_file());
        Self {
            output,
            buffer: Vec::with_capacity(BUFFER),
            dropped: 0,
            left: is_file.then_some(FILE_LIMIT),
        }
    }

    fn drain(&mut self) {
        if let Some(output) = &mut self.output {
            let left = self.left.unwrap_or(u64::MAX);
            let allowed = self
                .buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let written = match allowed {
                0 => 0,
                _ => output.write(&self.buffer[..allowed]).unwrap_or_default(),
            };
            self.dropped += (self.buffer.len() - written) as u64;
            if let Some(left) = &mut self.left {
                *left -= written as u64;
                if *left == 0 && written > 0 {
                    // As what cannot be written: nobody is told.
                    let _ = output.write(FULL);
                }
            }
        }
        self.buffer.clear();
    }
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.output.is_some() {
            self.buffer.extend_from_slice(data);
            if data.contains(&b'\n') || self.buffer.len() >= BUFFER {
                self.drain();
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // The port flushes after every byte; lines are enough.
        Ok(())
    }
}

impl SerialPort {
    /// A port that writes to `output` (made non-blocking by the caller) and
    /// interrupts by `irq`.
    pub fn new(
        output: Option<File>,
        irq: EventFd,
        registrar: Option<Arc<dyn NotifyRegistrar>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            serial: Mutex::new(Serial::new(Irq(irq), Console::new(output))),
            registrar,
            used: Once::new(),
        })
    }

    /// The registers. What has been gathered is written first: it is this
    /// machine's.
    pub fn save(&self) -> SerialRegisters {
        let mut serial = self.lock();
        serial.writer_mut().drain();
        let state = serial.state();
        SerialRegisters {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line: [state.line_control, state.line_status],
            modem: [state.modem_control, state.modem_status],
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }

    /// A port that goes on where a saved one was.
    ///
    /// # Errors
    /// More input is saved than a port holds.
    pub fn restore(
        saved: SerialRegisters,
        output: Option<File>,
        irq: EventFd,
        registrar: Option<Arc<dyn NotifyRegistrar>>,
    ) -> io::Result<Arc<Self>> {
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line[0],
            line_status: saved.line[1],
            modem_control: saved.modem[0],
            modem_status: saved.modem[1],
            scratch: saved.scratch,
            in_buffer: saved.input,
        };
        let serial = Serial::from_state(&state, Irq(irq), NoEvents, Console::new(output))
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(Arc::new(Self {
            serial: Mutex::new(serial),
            registrar,
            used: Once::new(),
        }))
    }

    /// Writes what has been gathered, when the VM ends.
    pub fn flush(&self) {
        self.lock().writer_mut().drain();
    }

    /// Bytes that could not be written.
    pub fn dropped(&self) -> u64 {
        self.lock().writer().dropped
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Serial<Irq, NoEvents, Console>> {
        self.serial
            .lock()
            .expect("no holder of the serial port's lock panics")
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(registrar) = &self.registrar {
            let first = layout::SERIAL_PORT + FIRST_QUIET;
            self.used
                .call_once(|| registrar.gather_port_writes(first, QUIET));
        }
        if let [byte] = data {
            // Fails only when the interrupt's counter overflows: it is
            // pending then.
            let _ = self.lock().write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        os::{fd::OwnedFd, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn lines_arrive_and_a_full_reader_does_not_block() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let file = File::from(OwnedFd::from(ours));
        let port = SerialPort::new(Some(file), EventFd::new(0).unwrap(), None);
        for byte in b"hello\n" {
            port.write(0, &[*byte]);
        }
        let mut data = [0; 6];
        theirs.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"hello\n");
        for _ in 0..4 << 20 {
            port.write(0, b"x");
        }
        assert!(port.dropped() > 0);
    }

    #[test]
    fn a_file_does_not_grow_without_end() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap();
        let output = file.as_file().try_clone().unwrap();
        let mut console = Console::new(Some(output));
        let line = [&[b'x'; 1000][..], b"\n"].concat();
        let mut said = 0;
        for _ in 0..20_000 {
            console.write_all(&line).unwrap();
            said += line.len() as u64;
        }
        console.drain();
        let length = file.as_file().metadata().unwrap().len();
        assert_eq!(length, FILE_LIMIT + FULL.len() as u64);
        assert_eq!(console.dropped, said - FILE_LIMIT);
        let bytes = std::fs::read(file.as_path()).unwrap();
        let told = format!("{} MiB", FILE_LIMIT >> 20);
        let last = std::str::from_utf8(&bytes[FILE_LIMIT as usize..]).unwrap();
        assert!(last.starts_with('\n') && last.ends_with('\n'), "{last:?}");
        assert!(last.contains(&told), "{last:?}");
        // A pipe is read by somebody.
        let (_theirs, ours) = UnixStream::pair().unwrap();
        assert_eq!(
            Console::new(Some(File::from(OwnedFd::from(ours)))).left,
            None
        );
    }

    #[test]
    fn the_last_line_comes_with_flush_and_odd_accesses_do_nothing() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let port = SerialPort::new(
            Some(File::from(OwnedFd::from(ours))),
            EventFd::new(0).unwrap(),
            None,
        );
        port.write(0, b"z");
        port.write(0, b"zz");
        port.read(0, &mut [0; 8]);
        port.read(900, &mut [0; 1]);
        port.flush();
        let mut data = [0; 1];
        theirs.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"z");
    }
}
