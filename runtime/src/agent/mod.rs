// SPDX-License-Identifier: Apache-2.0
//! The host's side of the agent protocol.

mod error;

pub use error::AgentError;
