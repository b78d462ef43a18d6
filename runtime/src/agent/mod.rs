// SPDX-License-Identifier: Apache-2.0
//! The host's side of the agent protocol: the call of the agent when it is
//! ready, requests to it, and the streams that it opens.

mod client;
mod error;
mod streams;

pub use self::{
    client::Agent,
    error::AgentError,
    streams::{Expected, Streams},
};
