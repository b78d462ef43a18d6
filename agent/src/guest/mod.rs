// SPDX-License-Identifier: Apache-2.0
//! What the guest as a whole tells of itself, its figures and its kernel's log,
//! and what it is told: changes of shared files.

pub mod announce;
pub mod log;
pub mod stats;
