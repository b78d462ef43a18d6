// SPDX-License-Identifier: Apache-2.0
//! The log: lines of `key=value`, as containerd writes its own, into the FIFO
//! `log` of the bundle, from which containerd copies them to its log.
//!
//! The last of them are [`kept`] beside the pod's state, too. A full FIFO (containerd is being restarted) loses lines and never holds up
//! the shim.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{self, Write as _},
    path::Path,
    time::SystemTime,
};

use bulkhead_runtime::clock::Utc;
use rustix::fs::{Mode, OFlags};
use tracing::{
    field::{Field, Visit},
    span, Event, Level, Metadata, Subscriber,
};

use crate::kept;

/// The longest line: longer writes to a pipe may be cut in two by others
/// (PIPE_BUF).
const LONGEST: usize = 4096;

/// Writes every event up to a level to a file.
#[derive(Debug)]
pub struct Log {
    to: File,
    level: Level,
    /// Follow every line's own fields, unless it has them itself.
    whose: [(&'static str, String); 2],
}

/// Opens a bundle's log. Also for reading, so that it opens without a reader
/// and writing never raises SIGPIPE.
///
/// # Errors
/// When there is none, or it cannot be opened.
pub fn open(bundle: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::open(bundle.join("log"), flags, Mode::empty())?.into())
}

impl Log {
    /// A log of a pod's shim.
    pub fn new(to: File, level: Level, namespace: &str, group: &str) -> Self {
        Self {
            to,
            level,
            whose: [("namespace", namespace.into()), ("sandbox", group.into())],
        }
    }

    /// Makes it the process's log. Without effect when there is one.
    pub fn install(self) {
        // Fails when there is one already, which then stays.
        let _ = tracing::subscriber::set_global_default(self);
    }

    fn line(&self, level: &Level, now: SystemTime, record: impl FnOnce(&mut dyn Visit)) -> String {
        let mut text = String::new();
        let mut fields = Fields {
            text: &mut text,
            message: String::new(),
        };
        record(&mut fields);
        for (name, value) in &self.whose {
            if !fields.text.contains(&format!(" {name}=")) {
                fields.field(name, format_args!("{value}"));
            }
        }
        let message = std::mem::take(&mut fields.message);
        let mut line = format!(
            "time=\"{}\" level={} msg={}{text}",
            Utc(now),
            name(level),
            Quoted(&message),
        );
        if line.len() >= LONGEST {
            let mut end = LONGEST - 1;
            while !line.is_char_boundary(end) {
                end -= 1;
            }
            line.truncate(end);
        }
        line.push('\n');
        line
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let line = self.line(event.metadata().level(), SystemTime::now(), |visit| {
            event.record(visit);
        });
        kept::line(&line);
        // A line that does not fit is lost.
        let _ = (&self.to).write_all(line.as_bytes());
    }

    // Spans are not logged (`enabled`), so none is ever made.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// As logrus calls them.
fn name(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

struct Fields<'a> {
    text: &'a mut String,
    message: String,
}

impl Fields<'_> {
    fn field(&mut self, name: &str, value: fmt::Arguments<'_>) {
        let value = value.to_string();
        let plain = !value.is_empty()
            && value
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-._/@^+:".contains(c));
        // Writing to a string does not fail.
        let _ = match (name, plain) {
            ("message", _) => {
                self.message = value;
                Ok(())
            }
            (_, true) => write!(self.text, " {name}={value}"),
            (_, false) => write!(self.text, " {name}={}", Quoted(&value)),
        };
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.field(field.name(), format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field.name(), format_args!("{value}"));
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.field(
            field.name(),
            format_args!("{}", bulkhead_runtime::error::chain(value)),
        );
    }
}

/// In quotes, on one line: nobody can forge a second one.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\t' => f.write_str("\\t")?,
                '\r' => f.write_str("\\r")?,
                c if c.is_control() => write!(f, "\\u{:04x}", u32::from(c))?,
                c => f.write_char(c)?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        time::{Duration, Instant},
    };

    use rustix::fs::{mkfifoat, CWD};

    use super::*;

    fn fifo() -> (tempfile::TempDir, Log, File) {
        let bundle = tempfile::tempdir().unwrap();
        mkfifoat(CWD, bundle.path().join("log"), Mode::from_raw_mode(0o600)).unwrap();
        let log = Log::new(open(bundle.path()).unwrap(), Level::INFO, "ns", "a pod");
        let reader = open(bundle.path()).unwrap();
        (bundle, log, reader)
    }

    #[test]
    fn a_line_is_one_line_of_fields() {
        let (_bundle, log, mut reader) = fifo();
        tracing::subscriber::with_default(log, || {
            tracing::debug!("not this");
            tracing::warn!(
                id = "c1",
                shim_start = format_args!("{:.3}", 0.5),
                odd = "a \"b\"\nc",
                n = 3,
                "start timeline"
            );
        });
        let mut text = vec![0; 4096];
        let length = reader.read(&mut text).unwrap();
        let text = std::str::from_utf8(&text[..length]).unwrap();
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.starts_with("time=\"20"), "{time}");
        assert_eq!(
            rest,
            "level=warning msg=\"start timeline\" id=c1 shim_start=0.500 odd=\"a \\\"b\\\"\\nc\" n=3 namespace=ns sandbox=\"a pod\"\n"
        );
    }

    #[test]
    fn a_field_is_not_told_twice() {
        let (_bundle, log, mut reader) = fifo();
        tracing::subscriber::with_default(log, || tracing::info!(sandbox = "x", "y"));
        let mut text = vec![0; 4096];
        let length = reader.read(&mut text).unwrap();
        let text = std::str::from_utf8(&text[..length]).unwrap();
        assert!(
            text.ends_with("msg=\"y\" sandbox=x namespace=ns\n"),
            "{text}"
        );
    }

    #[test]
    fn long_lines_are_cut() {
        let (_bundle, log, mut reader) = fifo();
        tracing::subscriber::with_default(log, || tracing::info!("{}", "ä".repeat(5000)));
        let mut text = vec![0; 3 * LONGEST];
        let length = reader.read(&mut text).unwrap();
        assert!(length <= LONGEST && length > LONGEST - 4, "{length}");
        assert_eq!(text[length - 1], b'\n');
    }

    #[test]
    fn a_full_fifo_loses_lines_and_does_not_block() {
        let (_bundle, log, _reader) = fifo();
        let begin = Instant::now();
        tracing::subscriber::with_default(log, || {
            for _ in 0..100 {
                tracing::info!("{}", "x".repeat(3000));
            }
        });
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}
