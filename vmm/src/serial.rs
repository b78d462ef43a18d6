// SPDX-License-Identifier: Apache-2.0
//! The first serial port (16550): what the guest writes goes to a descriptor,
//! nothing comes back. Never blocks a vCPU: what cannot be written at once is
//! dropped and counted.

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
        Self {
            output,
            buffer: Vec::with_capacity(BUFFER),
            dropped: 0,
        }
    }

    fn drain(&mut self) {
        if let Some(output) = &mut self.output {
            let written = output.write(&self.buffer).unwrap_or_default();
            self.dropped += (self.buffer.len() - written) as u64;
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
