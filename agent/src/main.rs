// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-agent`; all of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_agent::main()
}
