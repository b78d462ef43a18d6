// SPDX-License-Identifier: Apache-2.0
//! The specification of a container, in any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| bulkhead_agent::fuzzing::specification(data));
