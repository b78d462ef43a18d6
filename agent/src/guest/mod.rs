// SPDX-License-Identifier: Apache-2.0
//! What the guest as a whole tells of itself: its figures, and its kernel's
//! log.

pub mod log;
pub mod stats;
