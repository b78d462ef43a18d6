// SPDX-License-Identifier: Apache-2.0
//! The kernel's merging thread and the processor time it has used.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::KsmError;

/// Its name.
const COMM: &str = "ksmd";

/// The kernel tells times to programs in hundredths of a second, whatever its
/// own tick is (USER_HZ of x86_64).
const TICK: Duration = Duration::from_millis(10);

/// ksmd. It lives as long as the kernel, so it is looked for once.
#[derive(Debug, Clone)]
pub struct Ksmd {
    dir: PathBuf,
}

impl Ksmd {
    /// Finds it by its name.
    ///
    /// # Errors
    /// [`KsmError::NoKsmd`], or `proc` cannot be read.
    pub fn find(proc: &Path) -> Result<Self, KsmError> {
        let read = |source| KsmError::Read {
            path: proc.into(),
            source,
        };
        for entry in fs::read_dir(proc).map_err(read)? {
            let dir = entry.map_err(read)?.path();
            let is_process = dir
                .file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
            if !is_process {
                continue;
            }
            // Processes end while they are looked at.
            let comm = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            // Any program can take the name; kernel threads alone have no
            // command line.
            if comm.trim_end() == COMM
                && fs::read(dir.join("cmdline")).is_ok_and(|line| line.is_empty())
            {
                return Ok(Self { dir });
            }
        }
        Err(KsmError::NoKsmd { proc: proc.into() })
    }

    /// The file that tells its processor time to the nanosecond.
    pub fn schedstat(&self) -> PathBuf {
        self.dir.join("schedstat")
    }

    /// The processor time it has used, where the kernel keeps it to the
    /// nanosecond.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn exact(&self) -> Result<Option<Duration>, KsmError> {
        let path = self.schedstat();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(KsmError::Read { path, source }),
        };
        // Zero is what a kernel says that does not count; ksmd has run at least
        // once, when it was made.
        let exact = text.split_ascii_whitespace().next();
        Ok(exact
            .and_then(|word| word.parse().ok())
            .filter(|nanoseconds| *nanoseconds > 0)
            .map(Duration::from_nanos))
    }

    /// The processor time it has used, user and system.
    ///
    /// # Errors
    /// [`KsmError::Read`], [`KsmError::Unexpected`].
    pub fn cpu_time(&self) -> Result<Duration, KsmError> {
        if let Some(exact) = self.exact()? {
            return Ok(exact);
        }
        let path = self.dir.join("stat");
        let text = fs::read_to_string(&path).map_err(|source| KsmError::Read {
            path: path.clone(),
            source,
        })?;
        let ticks = ticks(&text).ok_or(KsmError::Unexpected { path, text })?;
        Ok(TICK.saturating_mul(ticks.try_into().unwrap_or(u32::MAX)))
    }
}

/// utime + stime of a process's `stat`.
fn ticks(stat: &str) -> Option<u64> {
    // The name, which is in parentheses, may itself contain anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_ascii_whitespace().skip(11);
    let user: u64 = words.next()?.parse().ok()?;
    let system: u64 = words.next()?.parse().ok()?;
    Some(user.saturating_add(system))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "41 (ksmd) S 2 0 0 0 -1 2097216 0 0 0 0 3 129 0 0 25 5 1 0 31 0 0 18446744073709551615";

    #[test]
    fn times_are_words_14_and_15() {
        assert_eq!(ticks(STAT), Some(132));
        assert_eq!(ticks(&STAT.replace("(ksmd)", "(a) b (c)")), Some(132));
        assert_eq!(ticks("41 (ksmd) S"), None);
    }

    #[test]
    fn it_is_found_by_name_and_is_no_program() {
        let proc = tempfile::tempdir().unwrap();
        let put = |pid: &str, comm: &str, cmdline: &str| {
            let dir = proc.path().join(pid);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("comm"), comm).unwrap();
            fs::write(dir.join("cmdline"), cmdline).unwrap();
            fs::write(dir.join("stat"), STAT).unwrap();
        };
        put("7", "ksmd\n", "/tmp/ksmd\0");
        put("self", "ksmd\n", "");
        assert!(matches!(
            Ksmd::find(proc.path()),
            Err(KsmError::NoKsmd { .. })
        ));
        put("41", "ksmd\n", "");
        let ksmd = Ksmd::find(proc.path()).unwrap();
        assert_eq!(ksmd.cpu_time().unwrap(), Duration::from_millis(1320));
        fs::write(proc.path().join("41/schedstat"), "1234567890 5 6\n").unwrap();
        assert_eq!(
            ksmd.cpu_time().unwrap(),
            Duration::from_nanos(1_234_567_890)
        );
    }
}
