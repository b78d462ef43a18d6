// SPDX-License-Identifier: Apache-2.0
//! Options that a client gives for a container's runtime.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_runtime::config::{Config, ConfigError};
use bulkhead_shim_protocol::{runc, runtimeoptions, Named};
use protobuf::{
    well_known_types::{any::Any, empty::Empty},
    Message,
};
use toml::Table;

/// What containerd adds to a table of options for itself.
const CONTAINERD: [&str; 3] = ["TypeUrl", "ConfigPath", "ConfigBody"];

/// runc's options as they were called first: clients of containerd 1 send them
/// to any other runtime for a container with a user namespace, to tell whose its
/// pipes are (`ctr run --uidmap`). The guest's pipes are its own.
const RUNC_OF_CONTAINERD_1: &str = "containerd.linux.runc.CreateOptions";

/// What errors call a configuration in the options.
const BODY: &str = "runtime options (config_body)";

/// In the bundle of a pod's first container, or of a sandbox: what `start` was
/// given for the shim that it runs, as it was encoded. With the sandbox API
/// nobody gives it again.
const KEPT: &str = "runtime-options";

/// What was asked for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// Bulkhead's configuration, instead of the host's.
    pub config: Option<PathBuf>,
    /// What overrides it.
    pub body: Table,
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
    /// What `start` kept of them cannot be read.
    #[error("{} cannot be read", .0.display())]
    Kept(PathBuf, #[source] io::Error),
    /// The configuration in them is not TOML.
    #[error("{BODY}")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The configuration in them cannot be used.
    #[error("runtime options")]
    Config(#[from] ConfigError),
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
                let options = Self {
                    config: Some(options.config_path)
                        .filter(|path| !path.is_empty())
                        .map(PathBuf::from),
                    body: body(&options.config_body)?,
                };
                // Told before there is anything to clean up.
                Config::default().apply(BODY, &options.body)?;
                Ok(options)
            }
            RUNC_OF_CONTAINERD_1 => Empty::parse_from_bytes(&any.value)
                .map(|_| Self::default())
                .map_err(|source| OptionsError::Malformed(RUNC_OF_CONTAINERD_1, source)),
            runc::Options::TYPE_URL => runc::Options::parse_from_bytes(&any.value)
                .map(|_| Self::default())
                .map_err(|source| OptionsError::Malformed(runc::Options::TYPE_URL, source)),
            other => Err(OptionsError::Unknown(other.into())),
        }
    }

    /// Keeps options in a bundle, for [`Options::kept`]; none need not be kept.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn keep(options: Option<&Any>, bundle: &Path) -> io::Result<()> {
        let Some(any) = options.filter(|any| !any.value.is_empty()) else {
            return Ok(());
        };
        let bytes = any.write_to_bytes().map_err(io::Error::other)?;
        fs::write(bundle.join(KEPT), bytes)
    }

    /// What was kept in a bundle.
    ///
    /// # Errors
    /// It cannot be read, or is not what was kept.
    pub fn kept(bundle: &Path) -> Result<Self, OptionsError> {
        let path = bundle.join(KEPT);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(OptionsError::Kept(path, source)),
        };
        let any = Any::parse_from_bytes(&bytes)
            .map_err(|source| OptionsError::Malformed(KEPT, source))?;
        Self::parse(Some(&any))
    }

    /// The configuration: the one they name, or the host's, and what they
    /// override of it.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn configuration(&self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.config.as_deref())?;
        config.apply(BODY, &self.body)?;
        Ok(config)
    }
}

/// The options as containerd has them in its own configuration.
fn body(bytes: &[u8]) -> Result<Table, OptionsError> {
    let text = std::str::from_utf8(bytes).map_err(|error| OptionsError::Body(error.into()))?;
    let mut table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| OptionsError::Body(error.into()))?;
    for key in CONTAINERD {
        table.remove(key);
    }
    Ok(table)
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
        // An owner of pipes: user 100000.
        let older = Any {
            type_url: RUNC_OF_CONTAINERD_1.into(),
            value: vec![0x50, 0xa0, 0x8d, 0x06],
            ..Default::default()
        };
        assert_eq!(Options::parse(Some(&older)).unwrap(), Options::default());
        let mut any = generic("/etc/x.toml", b"");
        let expected = Options {
            config: Some("/etc/x.toml".into()),
            ..Options::default()
        };
        assert_eq!(Options::parse(Some(&any)).unwrap(), expected);
        any.type_url = format!("type.googleapis.com/{}", any.type_url);
        assert_eq!(Options::parse(Some(&any)).unwrap(), expected);
    }

    #[test]
    fn a_configuration_in_the_options_overrides_the_hosts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        std::fs::write(&path, "[hypervisor]\nvcpus = 2\nmemory_mib = 512\n").unwrap();
        let any = generic(
            path.to_str().unwrap(),
            b"TypeUrl = \"runtimeoptions.v1.Options\"\n[hypervisor]\nvcpus = 3\n",
        );
        let config = Options::parse(Some(&any)).unwrap().configuration().unwrap();
        assert_eq!(config.hypervisor.vcpus, 3);
        assert_eq!(config.hypervisor.memory_mib, 512);
    }

    #[test]
    fn what_is_kept_in_a_bundle_is_what_was_given() {
        let bundle = tempfile::tempdir().unwrap();
        Options::keep(None, bundle.path()).unwrap();
        let none = Options::kept(bundle.path()).unwrap();
        assert_eq!(none, Options::default());
        let any = generic("/etc/x.toml", b"[hypervisor]\nvcpus = 3\n");
        Options::keep(Some(&any), bundle.path()).unwrap();
        let kept = Options::kept(bundle.path()).unwrap();
        assert_eq!(kept, Options::parse(Some(&any)).unwrap());
        assert_eq!(kept.config, Some("/etc/x.toml".into()));
        std::fs::write(bundle.path().join(KEPT), [0xff]).unwrap();
        let error = Options::kept(bundle.path()).unwrap_err();
        assert!(matches!(error, OptionsError::Malformed(..)), "{error}");
    }

    #[test]
    fn a_configuration_that_is_wrong_is_refused_at_once() {
        let refused = |body: &[u8]| {
            let error = Options::parse(Some(&generic("", body))).unwrap_err();
            bulkhead_runtime::error::chain(&error)
        };
        let text = refused(b"[hypervisor]\nvcpu = 2\n");
        assert!(
            text.contains("runtime options (config_body): unknown key \"hypervisor.vcpu\" (did you mean \"hypervisor.vcpus\"?)"),
            "{text}"
        );
        let text = refused(b"[hypervisor]\nvcpus = 0\n");
        assert!(
            text.contains("hypervisor.vcpus: 0 is not within 1 to 64"),
            "{text}"
        );
        for bad in [&b"["[..], b"\xff"] {
            assert!(refused(bad).starts_with("runtime options (config_body): "));
        }
    }

    #[test]
    fn others_are_refused() {
        let mut any = generic("", b"");
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
