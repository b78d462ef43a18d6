// SPDX-License-Identifier: Apache-2.0
//! A program for figures of devices: `bulkhead-load WHAT ...` does what
//! [`load::run`] says, and prints the nanoseconds that each part took.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use bulkhead_tests::load;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match load::run(&arguments) {
        Ok(took) => {
            for part in took {
                println!("{part}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("bulkhead-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
