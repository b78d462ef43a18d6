// SPDX-License-Identifier: Apache-2.0
//! Who steers ksmd.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use bulkhead_ksm_throttler::socket::Kick;
use bulkhead_ksm_throttler::sysfs::DIRECTORY;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::install::Products;

/// How long the daemon may take for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads one of KSM's figures.
///
/// # Errors
/// This kernel has none.
pub fn number(name: &str) -> Result<u64> {
    let path = Path::new(DIRECTORY).join(name);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.trim().parse().with_context(|| name.to_owned())
}

/// Changes one of KSM's settings.
///
/// # Errors
/// The kernel's.
pub fn set(name: &str, value: u64) -> Result<()> {
    let path = Path::new(DIRECTORY).join(name);
    fs::write(&path, value.to_string()).with_context(|| format!("{}: {value}", path.display()))
}

/// Takes everything merged apart, forgets what ksmd knows, and sets the
/// kernel's defaults with ksmd off.
///
/// # Errors
/// The kernel's.
pub fn reset() -> Result<()> {
    set("run", 2)?;
    set("run", 0)?;
    set("pages_to_scan", 100)?;
    set("sleep_millisecs", 20)
}

/// Who steers ksmd while pods start.
pub enum Policy {
    /// The daemon, as it is by default.
    Ours(Daemon),
    /// Nobody: on, with the kernel's defaults.
    Kernel,
    /// Kata Containers' daemon: its table and its times, from its
    /// documentation.
    Kata(Option<Mode>),
}

/// A mode of Kata's daemon. At each change ksmd is stopped, set and started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Aggressive,
    Standard,
    Slow,
    Initial,
}

impl Mode {
    /// The mode so long after a kick.
    fn after(kick: Duration) -> Self {
        match kick.as_secs() {
            0..30 => Self::Aggressive,
            30..150 => Self::Standard,
            150..270 => Self::Slow,
            _ => Self::Initial,
        }
    }

    fn apply(self) -> Result<()> {
        // A part of all anonymous memory, and the sleep in milliseconds.
        let (part, sleep) = match self {
            Self::Aggressive => (10, 1),
            Self::Standard => (100, 10),
            Self::Slow => (500, 100),
            Self::Initial => return reset_settings(),
        };
        set("run", 0)?;
        set("pages_to_scan", (anonymous()? / part).max(1))?;
        set("sleep_millisecs", sleep)?;
        set("run", 1)
    }
}

/// The values that were there before it.
fn reset_settings() -> Result<()> {
    set("run", 0)?;
    set("pages_to_scan", 100)?;
    set("sleep_millisecs", 20)
}

/// Anonymous memory in pages.
fn anonymous() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("AnonPages:"));
    let kib = line.and_then(|value| value.trim().strip_suffix(" kB"));
    let kib: u64 = kib.context("no AnonPages")?.trim().parse()?;
    Ok(kib / 4)
}

impl Policy {
    /// Begins.
    ///
    /// # Errors
    /// The kernel's.
    pub fn begin(&mut self) -> Result<()> {
        match self {
            Self::Ours(_) | Self::Kata(_) => Ok(()),
            Self::Kernel => set("run", 1),
        }
    }

    /// Pods have started.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn kick(&self) -> Result<()> {
        match self {
            Self::Ours(daemon) => daemon.kick(),
            Self::Kernel | Self::Kata(_) => Ok(()),
        }
    }

    /// Called all the time, so long after the kick.
    ///
    /// # Errors
    /// The kernel's.
    pub fn step(&mut self, kick: Duration) -> Result<()> {
        if let Self::Kata(mode) = self {
            let wanted = Mode::after(kick);
            if *mode != Some(wanted) {
                wanted.apply()?;
                *mode = Some(wanted);
            }
        }
        Ok(())
    }

    /// Its own process.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Ours(daemon) => Some(daemon.child.id()),
            Self::Kernel | Self::Kata(_) => None,
        }
    }
}

/// `bulkhead-ksm-throttler`.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    /// Starts it with its sockets in `dir`, and waits until it has nothing to do.
    ///
    /// # Errors
    /// It does not run.
    pub fn start(products: &Products, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let child = Command::new(products.program("bulkhead-ksm-throttler"))
            .arg("--socket")
            .arg(dir.join("ksm.sock"))
            .arg("--metrics-socket")
            .arg(dir.join("metrics.sock"))
            .arg("--state-file")
            .arg(dir.join("state.json"))
            .stderr(File::create(dir.join("log"))?)
            .spawn()
            .context("run bulkhead-ksm-throttler")?;
        let daemon = Self {
            child,
            dir: dir.into(),
        };
        daemon.wait_idle(PATIENCE)?;
        Ok(daemon)
    }

    /// Waits until it does nothing.
    ///
    /// # Errors
    /// It goes on.
    pub fn wait_idle(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.metric("active").is_ok_and(|active| active == 0.0) {
            if Instant::now() > end {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                bail!("the daemon is busy after {limit:?}: {log}");
            }
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Tells it of a pod.
    ///
    /// # Errors
    /// It does not listen.
    pub fn kick(&self) -> Result<()> {
        let text = Kick::Merged("bench").text();
        let socket = UnixDatagram::unbound()?;
        socket
            .send_to(text.as_bytes(), self.dir.join("ksm.sock"))
            .context("kick")?;
        Ok(())
    }

    /// One of its metrics.
    ///
    /// # Errors
    /// It does not answer.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let mut stream = UnixStream::connect(self.dir.join("metrics.sock"))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let prefix = format!("bulkhead_ksm_{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
        value.context("no such metric")?.parse().context("a number")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It puts the settings back; it is not reaped, so the number is its.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kata_s_modes_follow_its_times() {
        let after = |seconds| Mode::after(Duration::from_secs(seconds));
        assert_eq!(after(0), Mode::Aggressive);
        assert_eq!(after(30), Mode::Standard);
        assert_eq!(after(150), Mode::Slow);
        assert_eq!(after(270), Mode::Initial);
    }
}
