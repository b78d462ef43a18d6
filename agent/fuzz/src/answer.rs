// SPDX-License-Identifier: Apache-2.0
//! What a container's child or the kernel answers, in any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| bulkhead_agent::fuzzing::answer(data));
