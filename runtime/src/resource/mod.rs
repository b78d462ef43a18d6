// SPDX-License-Identifier: Apache-2.0
//! What a sandbox takes from the host: acquire, release, recover.

pub mod cgroup;
pub mod idmap;
pub mod journal;
pub mod mount;
pub mod network;
pub mod process;
