// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-vmm` as a process: driven over its control socket, with guests of
//! a few instructions.

mod bzimage;
mod configuration;
mod engines;
mod exits;
mod features;
mod golden;
mod guest;
mod hotplug;
mod jail;
mod lifecycle;
mod resize;
mod rules;
mod snapshot;
mod timers;
mod vmm;
