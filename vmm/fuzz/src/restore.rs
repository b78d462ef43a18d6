// SPDX-License-Identifier: Apache-2.0
//! States of functions and of the devices behind them that no VMM wrote: any
//! bytes as a state, a right state with changed bytes, and any bytes as the
//! device's own; and then the device at work.
#![no_main]

mod machine;

use bulkhead_vmm::virtio::transport::FunctionState;
use libfuzzer_sys::fuzz_target;
use machine::{Machine, KINDS};
use vm_memory::{Bytes, GuestAddress};

/// The state that a device has which nobody has used.
fn fresh(kind: u8) -> Vec<u8> {
    let state = Machine::new(kind).function.save().expect("a new device");
    postcard::to_stdvec(&state).expect("it can be written")
}

/// The same with bytes changed as pairs of a place and a byte say.
fn changed(kind: u8, changes: &[u8]) -> Vec<u8> {
    let mut state = fresh(kind);
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % state.len();
        state[at] = change[2];
    }
    state
}

/// The same with other content of the device's: the last that is in it, after
/// its length, which is less than 128 of all that are fuzzed but of memory.
fn own(kind: u8, content: &[u8]) -> Vec<u8> {
    let all = fresh(kind);
    let state: FunctionState = postcard::from_bytes(&all).expect("it was written");
    let length = state.device().len();
    let prefix = if length < 128 { 1 } else { 2 };
    let mut other = all[..all.len() - length - prefix].to_vec();
    other.extend(postcard::to_stdvec(content).expect("it can be written"));
    other
}

fuzz_target!(|data: &[u8]| {
    let [mode, split, rest @ ..] = data else {
        return;
    };
    let kind = mode % KINDS;
    let (state, memory) = rest.split_at(usize::from(*split).min(rest.len()));
    let state = match mode / KINDS % 3 {
        0 => state.to_vec(),
        1 => changed(kind, state),
        _ => own(kind, state),
    };
    let Ok(state) = postcard::from_bytes::<FunctionState>(&state) else {
        return;
    };
    let machine = Machine::new(kind);
    for (index, bytes) in memory.chunks(16).enumerate() {
        let _ = machine
            .memory
            .write_slice(bytes, GuestAddress(index as u64 * 64));
    }
    if machine.function.restore(&state).is_ok() {
        // It works, and is saved.
        for token in 0..machine.queues() as u32 + 8 {
            machine.event(token);
        }
        let _ = machine.function.save();
        // A driver begins anew.
        machine.write(0x14, &[0]);
    }
});
