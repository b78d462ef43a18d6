// SPDX-License-Identifier: Apache-2.0
//! Ways in which a guest ends its VM: the ACPI sleep and reset registers
//! (ACPI 6.5 §4.8.3.7), the keyboard controller's reset line, and pvpanic.

use std::sync::Arc;

use bulkhead_vmm_api::ExitReason;

use crate::bus::BusDevice;

/// Offsets of the registers from their first port.
pub const SLEEP_CONTROL: u16 = 0;
/// Reads as zero: nothing woke the machine.
pub const SLEEP_STATUS: u16 = 1;
/// The reset register.
pub const RESET: u16 = 2;
/// What a guest writes to it.
pub const RESET_VALUE: u8 = 0x42;
/// SLP_TYP of soft off, as `_S5_` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// SLP_EN.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Keyboard controller's command that pulses the reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// pvpanic's events that it can tell, which are also what a guest writes.
const PANICKED: u8 = 1;

/// Called when the guest ends itself.
pub type OnEnd = Arc<dyn Fn(ExitReason) + Send + Sync>;

/// The ACPI registers.
pub struct PowerRegisters(pub OnEnd);

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        if offset == u64::from(SLEEP_CONTROL)
            && value & SLEEP_ENABLE != 0
            && (value >> 2) & 7 == SLEEP_TYPE_OFF
        {
            self.0(ExitReason::PowerOff);
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.0(ExitReason::Reset);
        }
    }
}

/// The keyboard controller: only its reset.
pub struct KeyboardReset(pub OnEnd);

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Input buffer empty: a command can be written at once.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&KEYBOARD_RESET) {
            self.0(ExitReason::Reset);
        }
    }
}

/// pvpanic: the guest's kernel says that it panicked.
pub struct PanicPort(pub OnEnd);

impl BusDevice for PanicPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|value| value & PANICKED != 0) {
            self.0(ExitReason::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn record() -> (Arc<Mutex<Vec<ExitReason>>>, OnEnd) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let inner = Arc::clone(&seen);
        (
            seen,
            Arc::new(move |reason| inner.lock().unwrap().push(reason)),
        )
    }

    #[test]
    fn only_soft_off_and_the_reset_value_end_the_machine() {
        let (seen, on_end) = record();
        let registers = PowerRegisters(on_end);
        registers.write(0, &[5 << 2]);
        registers.write(0, &[(3 << 2) | SLEEP_ENABLE]);
        registers.write(2, &[0]);
        registers.write(1, &[0xff]);
        registers.write(0, &[]);
        assert!(seen.lock().unwrap().is_empty());
        registers.write(0, &[(5 << 2) | SLEEP_ENABLE]);
        registers.write(2, &[RESET_VALUE]);
        assert_eq!(
            *seen.lock().unwrap(),
            [ExitReason::PowerOff, ExitReason::Reset]
        );
    }

    #[test]
    fn a_panic_is_told_and_others_are_not() {
        let (seen, on_end) = record();
        let port = PanicPort(on_end);
        port.write(0, &[2]);
        assert!(seen.lock().unwrap().is_empty());
        port.write(0, &[1]);
        assert_eq!(*seen.lock().unwrap(), [ExitReason::Panic]);
        let mut data = [0; 2];
        port.read(0, &mut data);
        assert_eq!(data, [1, 0]);
    }
}
