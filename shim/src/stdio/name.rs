// SPDX-License-Identifier: Apache-2.0
//! What the name of a stream says.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use super::StdioError;

/// A stream's name, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// There is none.
    None,
    /// A FIFO, or a device or file that exists.
    Path(PathBuf),
    /// A file to append to, made where there is none.
    File(PathBuf),
    /// A program that takes the output.
    Program(Program),
}

/// A program that takes the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The binary.
    pub path: PathBuf,
    /// Its arguments: the query's names and values, in order.
    pub arguments: Vec<OsString>,
    /// It writes a byte when it is ready; otherwise closing is enough.
    pub answers: bool,
}

impl Name {
    /// Reads a name as containerd's clients write it.
    ///
    /// # Errors
    /// It is of a scheme that is not known, or malformed.
    pub fn parse(stream: &'static str, name: &str) -> Result<Self, StdioError> {
        if name.is_empty() {
            return Ok(Self::None);
        }
        let Some((scheme, rest)) = name.split_once("://") else {
            return Ok(Self::Path(name.into()));
        };
        if !matches!(scheme, "fifo" | "file" | "binary" | "binary-v2") {
            return Err(StdioError::Scheme {
                stream,
                scheme: scheme.into(),
            });
        }
        let wrong = |problem| StdioError::Uri {
            stream,
            name: name.into(),
            problem,
        };
        let (path, query) = match rest.split_once('?') {
            Some((path, query)) => (path, query),
            None => (rest, ""),
        };
        if !path.starts_with('/') {
            return Err(wrong("the path has to be absolute"));
        }
        let path = decode(path, false).ok_or_else(|| wrong("bad percent encoding"))?;
        let path = PathBuf::from(path);
        Ok(match scheme {
            "fifo" => Self::Path(path),
            "file" => Self::File(path),
            _ => Self::Program(Program {
                path,
                arguments: arguments(query).ok_or_else(|| wrong("bad percent encoding"))?,
                answers: scheme == "binary-v2",
            }),
        })
    }
}

fn arguments(query: &str) -> Option<Vec<OsString>> {
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        arguments.push(decode(name, true)?);
        arguments.push(decode(value, true)?);
    }
    Some(arguments)
}

/// Undoes percent encoding; in a query `+` is a space.
fn decode(text: &str, query: bool) -> Option<OsString> {
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    // Neither a path nor an argument can hold it.
    (!plain.contains(&0)).then(|| OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_understood() {
        let parse = |name| Name::parse("stdout", name).unwrap();
        assert_eq!(parse(""), Name::None);
        assert_eq!(parse("/run/x/stdout"), Name::Path("/run/x/stdout".into()));
        assert_eq!(parse("fifo:///run/x"), Name::Path("/run/x".into()));
        assert_eq!(
            parse("file:///var/log/a%20b.log"),
            Name::File("/var/log/a b.log".into())
        );
        assert_eq!(
            parse("binary:///bin/log?--id=a%3db&v&t=x+y"),
            Name::Program(Program {
                path: "/bin/log".into(),
                arguments: ["--id", "a=b", "v", "", "t", "x y"].map(Into::into).into(),
                answers: false,
            })
        );
        let Name::Program(program) = parse("binary-v2:///bin/log") else {
            panic!("not a program");
        };
        assert!(program.answers && program.arguments.is_empty());
    }

    #[test]
    fn others_are_refused_by_name() {
        let refused = |name: &str| Name::parse("stderr", name).unwrap_err().to_string();
        let text = refused("ttrpc+unix:///run/x?streaming_id=1");
        assert!(text.contains("stderr: scheme \"ttrpc+unix\""), "{text}");
        for (name, problem) in [
            ("file://relative", "absolute"),
            ("binary://", "absolute"),
            ("file:///a%2", "percent"),
            ("file:///a%zz", "percent"),
            ("file:///a%00b", "percent"),
            ("binary:///b?x=%", "percent"),
        ] {
            let text = refused(name);
            assert!(text.contains(problem) && text.contains(name), "{text}");
        }
    }
}
