// SPDX-License-Identifier: Apache-2.0
//! What an operator can ask about one pod: a Unix socket in the sandbox's
//! directory that answers HTTP GET with metrics, state, events and the guest's
//! last words. Whoever runs the sandbox serves it; root alone may ask.
//!
//! | path | answer |
//! |---|---|
//! | `/metrics` | Prometheus's text format |
//! | `/state` | one JSON object, [`State`] |
//! | `/events` | a JSON object a line, [`Happened`]; `?follow`: does not end |
//! | `/console` | the guest's last lines |

pub mod client;
pub(crate) mod history;
pub mod metrics;
pub(crate) mod server;
mod state;

pub(crate) use self::state::{status, time};
pub use self::{
    history::Happened,
    state::{ContainerState, ExecState, Start, State},
};

/// Name of the socket in a sandbox's directory.
pub(crate) const SOCKET: &str = "o";
