// SPDX-License-Identifier: Apache-2.0
//! Bulkhead's runtime: a pod in its own microVM.
//!
//! [`sandbox::Sandbox`] is the entry: it boots the virtual machine, runs
//! containers in it through the guest's agent, and gives back everything it
//! took from the host. The shim and the `bulkhead` command are front ends of
//! it. Everything here runs on one tokio `current_thread` runtime; what blocks
//! for long runs on a thread of its own.

#![deny(unsafe_code)] // the modules named `sys` alone

pub mod agent;
pub mod check;
pub mod clock;
pub mod config;
pub mod density;
pub mod error;
pub mod fault;
pub mod hooks;
pub mod hypervisor;
pub mod io;
pub mod ksm;
pub mod node;
pub mod oci;
pub mod operator;
pub mod resource;
pub mod sandbox;
pub mod spans;
mod sys;
pub mod timeline;

pub use error::{Error, ErrorKind};
