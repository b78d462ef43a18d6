// SPDX-License-Identifier: Apache-2.0
//! Options that a client gives for a container's runtime.

use std::path::PathBuf;

use bulkhead_shim_protocol::{runc, runtimeoptions, Named};
use protobuf::{well_known_types::any::Any, Message};

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Bulkhead's configuration, instead of the host's.
    pub config: Option<PathBuf>,
}

/// Why options cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Not a type that says something to this runtime.
    #[error("unknown type {0:?}")]
    Unknown(String),
    /// Not a message of the type it claims to be.
    #[error("{0}")]
    Malformed(&'static str, #[source] protobuf::Error),
    /// Known and not built.
    #[error("a configuration in the options themselves (config_body) is not supported yet: give its path")]
    Inline,
}

impl Options {
    /// Reads options. Those of runc are accepted from clients that send them
    /// to every runtime, and say nothing here.
    ///
    /// # Errors
    /// For other types, and what is not of the type it claims.
    pub fn parse(options: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let name = any.type_url.rsplit('/').next().unwrap_or_default();
        match name {
            runtimeoptions::Options::TYPE_URL => {
                let options =
                    runtimeoptions::Options::parse_from_bytes(&any.value).map_err(|source| {
                        OptionsError::Malformed(runtimeoptions::Options::TYPE_URL, source)
                    })?;
                // containerd sends the file's contents only where it has no
                // path of it.
                if options.config_path.is_empty() && !options.config_body.is_empty() {
                    return Err(OptionsError::Inline);
                }
                Ok(Self {
                    config: Some(options.config_path)
                        .filter(|path| !path.is_empty())
                        .map(PathBuf::from),
                })
            }
            runc::Options::TYPE_URL => runc::Options::parse_from_bytes(&any.value)
                .map(|_| Self::default())
                .map_err(|source| OptionsError::Malformed(runc::Options::TYPE_URL, source)),
            other => Err(OptionsError::Unknown(other.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(path: &str, body: &[u8]) -> Any {
        runtimeoptions::Options {
            config_path: path.into(),
            config_body: body.into(),
            ..Default::default()
        }
        .to_any()
        .unwrap()
    }

    #[test]
    fn options_that_are_understood() {
        assert_eq!(Options::parse(None).unwrap(), Options::default());
        let nothing = Any::default();
        assert_eq!(Options::parse(Some(&nothing)).unwrap(), Options::default());
        let runc = runc::Options::default().to_any().unwrap();
        assert_eq!(Options::parse(Some(&runc)).unwrap(), Options::default());
        let mut any = generic("/etc/x.toml", b"ignored = true");
        let expected = Options {
            config: Some("/etc/x.toml".into()),
        };
        assert_eq!(Options::parse(Some(&any)).unwrap(), expected);
        any.type_url = format!("type.googleapis.com/{}", any.type_url);
        assert_eq!(Options::parse(Some(&any)).unwrap(), expected);
    }

    #[test]
    fn others_are_refused() {
        let mut any = generic("", b"vcpus = 2");
        assert!(matches!(
            Options::parse(Some(&any)),
            Err(OptionsError::Inline)
        ));
        any.value = vec![0xff; 3];
        assert!(matches!(
            Options::parse(Some(&any)),
            Err(OptionsError::Malformed(..))
        ));
        any.type_url = "some.Options".into();
        assert!(matches!(
            Options::parse(Some(&any)),
            Err(OptionsError::Unknown(name)) if name == "some.Options"
        ));
    }
}
