// SPDX-License-Identifier: Apache-2.0
//! Requests of the host, in any bytes; the first selects the call.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| bulkhead_agent::fuzzing::request(data));
