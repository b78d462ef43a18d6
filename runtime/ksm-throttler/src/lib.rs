// SPDX-License-Identifier: Apache-2.0
//! Page merging (KSM) by profit: the parts of `bulkhead-ksm-throttler`.
//!
//! [`controller`] decides, and is pure: figures in, a decision out. [`sysfs`],
//! [`ksmd`] and [`meter`] read the figures, [`knobs`] carries a decision out, [`saved`]
//! keeps the values found where a crash does not lose them, [`socket`] hears
//! the kicks and [`daemon`] is the loop around all of it.

#![forbid(unsafe_code)]

pub mod cli;
pub mod controller;
pub mod daemon;
pub mod error;
pub mod group;
pub mod knobs;
pub mod ksmd;
pub mod meter;
pub mod metrics;
pub mod saved;
pub mod socket;
pub mod status;
pub mod sysfs;

pub use error::KsmError;

/// Where the daemon hears kicks unless told otherwise.
pub const SOCKET: &str = "/run/bulkhead/ksm.sock";

/// Where it answers with its metrics unless told otherwise.
pub const METRICS_SOCKET: &str = "/run/bulkhead/ksm-metrics.sock";

/// Where it keeps the values found unless told otherwise.
pub const STATE_FILE: &str = "/run/bulkhead/ksm-state.json";
