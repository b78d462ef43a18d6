// SPDX-License-Identifier: Apache-2.0
//! The command line. containerd writes it as Go's flag package reads it:
//! `-name value`, `-name=value`, one dash or two, a boolean without a value.

use std::{ffi::OsString, path::PathBuf};

/// What the shim is asked to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// Start a shim, or find the one that serves the pod; print its address.
    Start,
    /// Clean up after a dead shim.
    Delete,
    /// Print what this runtime is (`-info`).
    Info,
    /// Print the version (`-v`).
    Version,
    /// Be the shim: what `start` runs in the background.
    #[default]
    Serve,
}

/// The command line, read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// containerd's binary; not used, events go by ttrpc.
    pub publish_binary: String,
    /// The bundle; empty: the working directory.
    pub bundle: PathBuf,
    /// Log more.
    pub debug: bool,
    /// `serve` only: the pod's id.
    pub group: String,
    /// `serve` only: CLOCK_MONOTONIC in microseconds when `start` began.
    pub started_us: u64,
}

/// Why a command line cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    /// No flag has this name.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// The last argument is a flag that wants a value.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// The value does not fit the flag.
    #[error("invalid value {value:?} for flag -{flag}")]
    BadValue {
        /// The flag.
        flag: String,
        /// What was given.
        value: String,
    },
    /// An argument is not UTF-8.
    #[error("argument is not UTF-8: {0:?}")]
    NotUtf8(OsString),
    /// Neither an action nor a flag that is one.
    #[error("no action: start, delete, -info or -v")]
    NoAction,
    /// There is no such action.
    #[error("unknown action {0:?}: start, delete, -info or -v")]
    BadAction(String),
    /// The action needs this flag.
    #[error("flag -{0} is missing")]
    Missing(&'static str),
}

impl Flags {
    /// Reads the arguments that follow the program's name.
    ///
    /// # Errors
    /// Each names the flag.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, FlagError> {
        let mut flags = Self::default();
        let mut positional = Vec::new();
        let (mut info, mut version) = (false, false);
        let mut arguments = arguments
            .into_iter()
            .map(|argument| argument.into_string().map_err(FlagError::NotUtf8));
        while let Some(argument) = arguments.next().transpose()? {
            if argument == "--" {
                for rest in arguments.by_ref() {
                    positional.push(rest?);
                }
                break;
            }
            // A lone dash is not a flag.
            let Some(text) = argument.strip_prefix('-').filter(|text| !text.is_empty()) else {
                positional.push(argument);
                continue;
            };
            let text = text.strip_prefix('-').unwrap_or(text);
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (text, None),
            };
            match name {
                "debug" => flags.debug = boolean(name, value)?,
                "info" => info = boolean(name, value)?,
                "v" | "version" => version = boolean(name, value)?,
                _ => {
                    let target = flags.text(name)?;
                    let value = match value {
                        Some(value) => value,
                        None => arguments
                            .next()
                            .transpose()?
                            .ok_or_else(|| FlagError::NoValue(name.into()))?,
                    };
                    target.set(name, value)?;
                }
            }
        }
        flags.action = match positional.first().map(String::as_str) {
            _ if version => Action::Version,
            _ if info => Action::Info,
            None => return Err(FlagError::NoAction),
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some("serve") => Action::Serve,
            Some(other) => return Err(FlagError::BadAction(other.into())),
        };
        flags.check()?;
        Ok(flags)
    }

    fn text(&mut self, name: &str) -> Result<Target<'_>, FlagError> {
        Ok(match name {
            "namespace" => Target::Text(&mut self.namespace),
            "id" => Target::Text(&mut self.id),
            "address" => Target::Text(&mut self.address),
            "publish-binary" => Target::Text(&mut self.publish_binary),
            "bundle" => Target::Path(&mut self.bundle),
            "bulkhead-group" => Target::Text(&mut self.group),
            "bulkhead-started-us" => Target::Number(&mut self.started_us),
            _ => return Err(FlagError::Unknown(name.into())),
        })
    }

    fn check(&self) -> Result<(), FlagError> {
        if matches!(self.action, Action::Info | Action::Version) {
            return Ok(());
        }
        if self.namespace.is_empty() {
            return Err(FlagError::Missing("namespace"));
        }
        if self.id.is_empty() {
            return Err(FlagError::Missing("id"));
        }
        Ok(())
    }

    /// The arguments with which `start` runs the shim.
    pub fn serve_arguments(&self, group: &str, started_us: u64) -> Vec<String> {
        let mut arguments = vec![
            "-namespace".into(),
            self.namespace.clone(),
            "-id".into(),
            self.id.clone(),
            "-address".into(),
            self.address.clone(),
            "-bulkhead-group".into(),
            group.into(),
            "-bulkhead-started-us".into(),
            started_us.to_string(),
        ];
        if self.debug {
            arguments.push("-debug".into());
        }
        arguments.push("serve".into());
        arguments
    }
}

enum Target<'a> {
    Text(&'a mut String),
    Path(&'a mut PathBuf),
    Number(&'a mut u64),
}

impl Target<'_> {
    fn set(self, flag: &str, value: String) -> Result<(), FlagError> {
        match self {
            Self::Text(target) => *target = value,
            Self::Path(target) => *target = value.into(),
            Self::Number(target) => {
                *target = value.parse().map_err(|_| FlagError::BadValue {
                    flag: flag.into(),
                    value,
                })?;
            }
        }
        Ok(())
    }
}

/// As strconv.ParseBool.
fn boolean(flag: &str, value: Option<String>) -> Result<bool, FlagError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(FlagError::BadValue {
            flag: flag.into(),
            value: value.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagError> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_line_that_containerd_writes() {
        let flags =
            parse("-namespace default -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id demo start")
                .unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!(flags.namespace, "default");
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert_eq!(flags.id, "demo");
        assert!(!flags.debug);
    }

    #[test]
    fn every_form_of_a_flag() {
        let expected = parse("-namespace n -id i -debug start").unwrap();
        assert!(expected.debug);
        for line in [
            "--namespace=n -id=i -debug=true start",
            "-id i start -namespace n -debug",
            "-debug=1 --id i -namespace n -- start",
        ] {
            assert_eq!(parse(line).unwrap(), expected, "{line}");
        }
        let flags = parse("-namespace n -id i -debug=f -bundle /b delete").unwrap();
        assert_eq!(flags.action, Action::Delete);
        assert_eq!(flags.bundle, PathBuf::from("/b"));
        assert!(!flags.debug);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--version start").unwrap().action, Action::Version);
        // An empty value is a value.
        let flags = parse("-address= -namespace n -id i start").unwrap();
        assert_eq!(flags.address, "");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(
            parse("-nope x start"),
            Err(FlagError::Unknown("nope".into()))
        );
        assert_eq!(parse("start -id"), Err(FlagError::NoValue("id".into())));
        assert_eq!(
            parse("-debug=maybe start"),
            Err(FlagError::BadValue {
                flag: "debug".into(),
                value: "maybe".into()
            })
        );
        assert_eq!(parse(""), Err(FlagError::NoAction));
        assert_eq!(
            parse("-id i -namespace n stop"),
            Err(FlagError::BadAction("stop".into()))
        );
        assert_eq!(parse("-id i start"), Err(FlagError::Missing("namespace")));
        assert_eq!(parse("-namespace n start"), Err(FlagError::Missing("id")));
    }

    #[test]
    fn the_daemon_reads_what_start_writes() {
        let mut flags =
            parse("-namespace n -id i -address /a -debug -publish-binary c start").unwrap();
        let served = Flags::parse(
            flags
                .serve_arguments("pod", 12)
                .into_iter()
                .map(OsString::from),
        )
        .unwrap();
        flags.action = Action::Serve;
        flags.group = "pod".into();
        flags.started_us = 12;
        flags.publish_binary = String::new();
        assert_eq!(served, flags);
    }
}
