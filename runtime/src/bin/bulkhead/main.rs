// SPDX-License-Identifier: Apache-2.0
//! `bulkhead`: microVM containers from the command line.
#![forbid(unsafe_code)]

fn main() {}
