// SPDX-License-Identifier: Apache-2.0
//! `-info` and `-v`: what this runtime is.

use std::io::{self, Read, Write};

use bulkhead_shim_protocol::types::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField};

/// The runtime's name for containerd.
const NAME: &str = "io.containerd.bulkhead.v2";

/// Prints `RuntimeInfo`. containerd may give options on standard input; they
/// change nothing.
///
/// # Errors
/// When standard output cannot be written.
pub fn run() -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new())?;
    let bytes = runtime_info().write_to_bytes().map_err(io::Error::other)?;
    io::stdout().write_all(&bytes)
}

fn runtime_info() -> RuntimeInfo {
    RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Prints the version for people.
///
/// # Errors
/// When standard output cannot be written.
pub fn version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "{} {}",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION")
    )
}
