// SPDX-License-Identifier: Apache-2.0
//! What `start` reads from standard input and prints on standard output.
//!
//! Up to containerd 2.2 the input is the runtime's options in an `Any`, or
//! nothing, and the reply the address as text. From 2.3 on the input is
//! `BootstrapParams` and the reply may be `BootstrapResult`. Every version
//! still takes the address alone, but as one of a shim that serves version 2 of
//! the task service only. CRI-O sends nothing and takes the address alone.

use std::path::PathBuf;

use bulkhead_shim_protocol::bootstrap::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::{well_known_types::any::Any, EnumOrUnknown, Message};

/// Version of the task service that `BootstrapResult` announces.
const TASK_VERSION: i32 = 3;

/// How to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The address as text.
    Address,
    /// `BootstrapResult`.
    Result,
}

/// What standard input said.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// How to answer.
    pub reply: Reply,
    /// The runtime's options.
    pub options: Option<Any>,
    /// Where events go, where the input says so.
    pub ttrpc_address: Option<String>,
    /// containerd's gRPC socket, where the input says so.
    pub grpc_address: Option<String>,
    /// Where sockets are, where the input says so.
    pub socket_dir: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
}

/// The input is neither of what containerd sends.
#[derive(Debug, thiserror::Error)]
#[error("standard input is neither bootstrap parameters nor options")]
pub struct InputError(#[source] protobuf::Error);

impl Input {
    /// Reads standard input. `id` and `namespace`, from the command line, tell
    /// bootstrap parameters from options: both can be decoded as either.
    ///
    /// # Errors
    /// When it is neither.
    pub fn parse(input: &[u8], id: &str, namespace: &str) -> Result<Self, InputError> {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == id && params.namespace == namespace => {
                Ok(Self::from_params(params))
            }
            _ => Self::from_options(input),
        }
    }

    fn from_params(params: BootstrapParams) -> Self {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let debug = [LogLevel::LOG_LEVEL_DEBUG, LogLevel::LOG_LEVEL_TRACE]
            .map(EnumOrUnknown::new)
            .contains(&params.log_level);
        Self {
            reply: Reply::Result,
            options: params
                .extensions
                .into_iter()
                .find_map(|extension| extension.value.into_option()),
            ttrpc_address: given(params.containerd_ttrpc_address),
            grpc_address: given(params.containerd_grpc_address),
            socket_dir: params.socket_dir.and_then(given).map(PathBuf::from),
            debug,
        }
    }

    fn from_options(input: &[u8]) -> Result<Self, InputError> {
        let options = Any::parse_from_bytes(input).map_err(InputError)?;
        Ok(Self {
            reply: Reply::Address,
            options: Some(options).filter(|options| !options.type_url.is_empty()),
            ttrpc_address: None,
            grpc_address: None,
            socket_dir: None,
            debug: false,
        })
    }
}

impl Reply {
    /// The bytes that go to standard output.
    ///
    /// # Errors
    /// When protobuf cannot write them.
    pub fn encode(self, address: &str) -> protobuf::Result<Vec<u8>> {
        match self {
            Self::Address => Ok(address.as_bytes().to_vec()),
            Self::Result => BootstrapResult {
                version: TASK_VERSION,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_shim_protocol::{bootstrap::Extension, runc, Named};
    use protobuf::MessageField;

    use super::*;

    fn options() -> Any {
        runc::Options {
            systemd_cgroup: true,
            ..Default::default()
        }
        .to_any()
        .unwrap()
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "id".into(),
            namespace: "ns".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG),
            containerd_ttrpc_address: "/c.ttrpc".into(),
            containerd_grpc_address: "/c".into(),
            extensions: vec![Extension {
                value: MessageField::some(options()),
                ..Default::default()
            }],
            socket_dir: Some("/short".into()),
            ..Default::default()
        }
    }

    #[test]
    fn nothing_is_answered_with_the_address() {
        let input = Input::parse(b"", "id", "ns").unwrap();
        assert_eq!(input.reply, Reply::Address);
        assert_eq!(input.options, None);
        assert_eq!(input.reply.encode("unix:///s").unwrap(), b"unix:///s");
    }

    #[test]
    fn options_are_answered_with_the_address() {
        let bytes = options().write_to_bytes().unwrap();
        let input = Input::parse(&bytes, "id", "ns").unwrap();
        assert_eq!(input.reply, Reply::Address);
        assert_eq!(input.options, Some(options()));
    }

    #[test]
    fn parameters_are_answered_with_a_result() {
        let bytes = params().write_to_bytes().unwrap();
        let input = Input::parse(&bytes, "id", "ns").unwrap();
        assert_eq!(input.reply, Reply::Result);
        assert_eq!(input.options, Some(options()));
        assert_eq!(input.ttrpc_address.as_deref(), Some("/c.ttrpc"));
        assert_eq!(input.grpc_address.as_deref(), Some("/c"));
        assert_eq!(input.socket_dir, Some(PathBuf::from("/short")));
        assert!(input.debug);
        let reply = input.reply.encode("unix:///s").unwrap();
        let reply = BootstrapResult::parse_from_bytes(&reply).unwrap();
        assert_eq!(reply.version, 3);
        assert_eq!(reply.address, "unix:///s");
        assert_eq!(reply.protocol, "ttrpc");
    }

    /// Options decode as parameters whose instance is a type's name; only the
    /// command line tells.
    #[test]
    fn parameters_of_another_container_are_not_taken_for_ours() {
        let bytes = params().write_to_bytes().unwrap();
        for (id, namespace) in [("other", "ns"), ("id", "other")] {
            if let Ok(input) = Input::parse(&bytes, id, namespace) {
                assert_eq!(input.reply, Reply::Address);
            }
        }
    }

    #[test]
    fn noise_is_refused() {
        assert!(Input::parse(b"\xff\xff\xff", "id", "ns").is_err());
    }
}
