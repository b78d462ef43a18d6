// SPDX-License-Identifier: Apache-2.0
//! Lines that a guest can cause: each place in the code has a bucket of them,
//! which fills slowly, so that no guest fills the host's log. How many were left
//! out is told with the next line of that place.
//!
//! What the libraries have to say of a guest by the `log` crate goes nowhere:
//! no logger is installed.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// Lines that a place may write at once after a rest.
pub const BURST: u32 = 5;
/// How long until it may write one more.
pub const EVERY: Duration = Duration::from_secs(10);

/// As the macro of that name of [`tracing`], for what a guest can cause: only so
/// many lines of this place in the code are written.
macro_rules! limited {
    ($level:ident, $($line:tt)+) => {{
        static SITE: $crate::log::Site = $crate::log::Site::new();
        limited_at!(SITE, std::time::Instant::now(), $level, $($line)+);
    }};
}

/// The same, with place and time.
macro_rules! limited_at {
    ($site:expr, $now:expr, $level:ident, $($line:tt)+) => {
        if tracing::enabled!(level!($level)) {
            if let Some(dropped) = $site.admit($now) {
                // A field without a value is left out.
                let dropped = (dropped > 0).then_some(dropped);
                tracing::$level!(dropped, $($line)+);
            }
        }
    };
}

/// The level of a macro.
macro_rules! level {
    (error) => {
        tracing::Level::ERROR
    };
    (warn) => {
        tracing::Level::WARN
    };
    (debug) => {
        tracing::Level::DEBUG
    };
    (trace) => {
        tracing::Level::TRACE
    };
}

/// A place in the code that writes lines.
#[derive(Debug)]
pub struct Site(Mutex<Bucket>);

#[derive(Debug)]
struct Bucket {
    lines: u32,
    /// When the last line came in; none: it was never empty.
    filled: Option<Instant>,
    dropped: u64,
}

impl Site {
    /// One that has not written anything.
    #[allow(clippy::new_without_default)] // statics are made by it alone
    pub const fn new() -> Self {
        Self(Mutex::new(Bucket {
            lines: BURST,
            filled: None,
            dropped: 0,
        }))
    }

    /// Whether a line may be written at `now`: then how many were not since the
    /// last one.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut bucket = self.0.lock().expect("no holder of the bucket panics");
        let bucket = &mut *bucket;
        let filled = *bucket.filled.get_or_insert(now);
        let came = now.saturating_duration_since(filled).as_nanos() / EVERY.as_nanos();
        if came > 0 {
            let came = u32::try_from(came).unwrap_or(u32::MAX);
            bucket.lines = bucket.lines.saturating_add(came).min(BURST);
            // What is left of the time counts for the next one.
            let spent = EVERY.checked_mul(came);
            bucket.filled = Some(
                spent
                    .and_then(|spent| filled.checked_add(spent))
                    .unwrap_or(now),
            );
        }
        if bucket.lines == 0 {
            bucket.dropped += 1;
            return None;
        }
        bucket.lines -= 1;
        Some(std::mem::take(&mut bucket.dropped))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        fs, io,
        path::{Path, PathBuf},
        sync::Arc,
    };

    use super::*;

    /// The lines that are written while `work` is done, on this thread.
    pub(crate) fn lines(work: impl FnOnce()) -> Vec<String> {
        #[derive(Clone, Default)]
        struct Lines(Arc<Mutex<Vec<u8>>>);

        impl io::Write for Lines {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        let written = Lines::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = written.0.lock().unwrap().clone();
        let text = String::from_utf8(bytes).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_place_writes_a_few_lines_and_then_one_now_and_again() {
        let site = Site::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(site.admit(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(site.admit(start + EVERY / 2), None);
        }
        assert_eq!(site.admit(start + EVERY), Some(7));
        assert_eq!(site.admit(start + EVERY), None);
        // Half of the time before counts.
        assert_eq!(site.admit(start + EVERY * 5 / 2), Some(1));
        assert_eq!(site.admit(start + EVERY * 3), Some(0));
        // Time that goes back is no time, and a long rest fills it but once.
        assert_eq!(site.admit(start), None);
        let later = start + EVERY * 1_000_000;
        let many = (0..1000).filter(|_| site.admit(later).is_some()).count();
        assert_eq!(many, BURST as usize);
    }

    #[test]
    fn what_was_left_out_is_told() {
        let site = Site::new();
        let start = Instant::now();
        let mut lines = lines(|| {
            for number in 0..10_000 {
                limited_at!(site, start, warn, number, "again");
            }
            limited_at!(site, start + EVERY, warn, "at last");
            limited!(debug, "unheard of");
        });
        let heard = lines.pop().unwrap();
        assert!(heard.ends_with("unheard of"), "{heard}");
        let last = lines.pop().unwrap();
        assert!(last.ends_with("at last dropped=9995"), "{last}");
        assert_eq!(lines.len(), BURST as usize, "{lines:#?}");
        assert!(lines[0].ends_with("again number=0"), "{}", lines[0]);
    }

    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => sources(&path, found),
                false => found.push(path),
            }
        }
    }

    /// What runs when a guest says so logs by [`limited!`], but for what happens
    /// once in a machine's life.
    #[test]
    fn devices_log_within_limits() {
        const ONCE: [&str; 2] = ["blk/device.rs", "vsock/state.rs"];
        let virtio = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/virtio");
        let mut found = Vec::new();
        sources(&virtio, &mut found);
        let plain = found.iter().filter(|path| {
            let text = fs::read_to_string(path).unwrap();
            text.contains("tracing::") && !ONCE.iter().any(|once| path.ends_with(once))
        });
        let plain: Vec<_> = plain.collect();
        assert!(plain.is_empty(), "lines without limit: {plain:?}");
        for once in ONCE {
            let text = fs::read_to_string(virtio.join(once)).unwrap();
            assert!(text.contains("tracing::"), "{once} does not log any more");
        }
    }
}
