// SPDX-License-Identifier: Apache-2.0
//! A private containerd: own directory, own socket, own configuration, and
//! nothing left behind.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::{listing, proc, sys};

/// The runtime under test.
pub const BULKHEAD: &str = "io.containerd.bulkhead.v2";
/// The peer, and what the tests themselves are checked with.
pub const RUNC: &str = "io.containerd.runc.v2";
/// How long a short command of ctr may take; emulation is slow.
const LIMIT: Duration = Duration::from_secs(60);

/// A running containerd.
pub struct Containerd {
    dir: PathBuf,
    search: OsString,
    bulkhead_config: PathBuf,
    child: Mutex<Option<Child>>,
    snapshotter: &'static str,
    namespace: &'static str,
}

/// Environment variable with a directory that has another containerd and ctr
/// than the host's.
const OTHER: &str = "BULKHEAD_CONTAINERD";

fn other() -> Option<PathBuf> {
    env::var_os(OTHER)
        .filter(|dir| !dir.is_empty())
        .map(Into::into)
}

impl Containerd {
    /// Starts one below `dir`, which is made and belongs to it. Its shims find
    /// Bulkhead's programs in `bin_dir` and the configuration at
    /// `bulkhead_config`. It dies with the calling thread.
    ///
    /// # Errors
    /// When containerd is not installed or does not serve, with its log's end.
    pub fn start(dir: &Path, bin_dir: &Path, bulkhead_config: &Path) -> Result<Self> {
        Self::start_with(dir, bin_dir, bulkhead_config, None)
    }

    /// As [`Containerd::start`], with the CRI plugin, whose configuration
    /// `cri` gives for the snapshotter that works here.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn start_with_cri(
        dir: &Path,
        bin_dir: &Path,
        bulkhead_config: &Path,
        cri: &dyn Fn(&str) -> String,
    ) -> Result<Self> {
        Self::start_with(dir, bin_dir, bulkhead_config, Some(cri))
    }

    fn start_with(
        dir: &Path,
        bin_dir: &Path,
        bulkhead_config: &Path,
        cri: Option<&dyn Fn(&str) -> String>,
    ) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
        let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let snapshotter = if overlay_works(dir) {
            "overlayfs"
        } else {
            "native"
        };
        let disabled = match cri {
            Some(_) => "",
            None => "\"io.containerd.grpc.v1.cri\", ",
        };
        let mut config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [{disabled}\"io.containerd.snapshotter.v1.btrfs\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.devmapper\"]\n\
             [grpc]\n  address = {:?}\n[debug]\n  level = \"info\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\n  path = {:?}\n",
            path("root"),
            path("state"),
            path("sock"),
            path("opt")
        );
        if let Some(cri) = cri {
            config.push_str(&cri(snapshotter));
        }
        let file = dir.join("containerd.toml");
        fs::write(&file, config).context("write containerd's configuration")?;
        let system = env::var_os("PATH").unwrap_or_default();
        let search = env::join_paths(
            [bin_dir.to_owned()]
                .into_iter()
                .chain(other())
                .chain(env::split_paths(&system))
                .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from)),
        )
        .context("put PATH together")?;
        let started = Self {
            dir: dir.to_owned(),
            search,
            bulkhead_config: bulkhead_config.to_owned(),
            child: Mutex::new(None),
            snapshotter,
            namespace: if cri.is_some() { "k8s.io" } else { "default" },
        };
        started.spawn()?;
        Ok(started)
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("containerd.log"))
            .context("open containerd's log")?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.dir.join("containerd.toml"))
            .env("PATH", &self.search)
            .env("BULKHEAD_CONFIG", &self.bulkhead_config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log);
        sys::tie_to_this_thread(&mut command, Vec::new());
        let child = command
            .spawn()
            .context("run containerd (package containerd)")?;
        *self.child() = Some(child);
        self.wait_until_serving()
    }

    /// Kills it and starts it again, as after a crash. Its shims live on.
    ///
    /// # Errors
    /// As [`Containerd::start`].
    pub fn restart(&self) -> Result<()> {
        if let Some(mut child) = self.child().take() {
            child.kill().context("kill containerd")?;
            child.wait().context("wait for containerd")?;
        }
        // Left behind by the killed one; a connection to it is refused.
        fs::remove_file(self.dir.join("sock")).context("remove its socket")?;
        self.spawn()
    }

    fn wait_until_serving(&self) -> Result<()> {
        let begin = Instant::now();
        let socket = self.dir.join("sock");
        while UnixStream::connect(&socket).is_err() {
            let ended = match &mut *self.child() {
                Some(child) => child.try_wait().context("look at containerd")?,
                None => None,
            };
            if ended.is_some() || begin.elapsed() > LIMIT {
                bail!("containerd does not serve:\n{}", self.log_tail(20));
            }
            thread::sleep(Duration::from_millis(20));
        }
        let version = proc::run(self.ctr().arg("version"), LIMIT)?;
        if version.code != 0 {
            bail!(
                "containerd does not answer: {}\n{}",
                version.err(),
                self.log_tail(20)
            );
        }
        Ok(())
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its process id.
    pub fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    /// The snapshotter that works here.
    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("sock")
    }

    /// `ctr` on this containerd, in the namespace of its containers.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.env("PATH", &self.search);
        command.arg("-a").arg(self.socket());
        command.args(["-n", self.namespace]);
        command
    }

    /// Its version: the first two numbers.
    ///
    /// # Errors
    /// It says none.
    pub fn version(&self) -> Result<(u32, u32)> {
        let mut command = Command::new("containerd");
        command.env("PATH", &self.search).arg("--version");
        let said = proc::run(&mut command, LIMIT)?.ok()?.out();
        // containerd github.com/containerd/containerd/v2 v2.3.4 ...
        let version = said.split_whitespace().nth(2).unwrap_or_default();
        let mut numbers = version.trim_start_matches('v').split('.');
        let mut number = || numbers.next().and_then(|number| number.parse().ok());
        number().zip(number()).with_context(|| said.clone())
    }

    /// Imports an OCI archive.
    ///
    /// # Errors
    /// What ctr says.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let mut command = self.ctr();
        command.args(["image", "import", "--snapshotter", self.snapshotter]);
        proc::run(command.arg(archive), LIMIT)?
            .ok()
            .context("import the image")?;
        Ok(())
    }

    /// `ctr run` with `flags`, without a command yet: the caller appends image,
    /// id and command.
    pub fn run(&self, runtime: &str, flags: &[&str]) -> Command {
        let mut command = self.ctr();
        command.args([
            "run",
            "--runtime",
            runtime,
            "--snapshotter",
            self.snapshotter,
        ]);
        command.args(flags);
        command
    }

    /// Everything it and its shims have logged.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.dir.join("containerd.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines of the log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Kills and deletes all tasks and containers; says which there were.
    ///
    /// # Errors
    /// When ctr does not answer.
    pub fn clean(&self) -> Result<Vec<String>> {
        let ids = |args: &[&str]| -> Result<Vec<String>> {
            let done = proc::run(self.ctr().args(args), LIMIT)?.ok()?;
            Ok(done.out().lines().map(str::to_owned).collect())
        };
        let mut found = ids(&["task", "ls", "-q"])?;
        for id in &found {
            proc::run(self.ctr().args(["task", "delete", "-f", id]), LIMIT)?;
        }
        for id in ids(&["container", "ls", "-q"])? {
            proc::run(self.ctr().args(["container", "delete", &id]), LIMIT)?;
            if !found.contains(&id) {
                found.push(id);
            }
        }
        Ok(found)
    }

    /// Ends it and everything of it.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn stop(self) -> Result<()> {
        self.end()
    }

    fn end(&self) -> Result<()> {
        let Some(mut child) = self.child().take() else {
            return Ok(());
        };
        if self.dir.join("sock").exists() {
            // One that does not answer is killed below all the same.
            let _ = self.ctr_clean_quietly();
        }
        // It is not reaped yet, so the number is its.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        let begin = Instant::now();
        while child.try_wait().context("wait for containerd")?.is_none() {
            if begin.elapsed() > Duration::from_secs(10) {
                child.kill().context("kill containerd")?;
            }
            thread::sleep(Duration::from_millis(20));
        }
        // Shims of this containerd that its end has not taken with it.
        let mark = self.dir.join("sock").to_string_lossy().into_owned();
        for process in listing::processes() {
            if process.command.contains(&mark) && process.command.contains("shim") {
                let _ = kill(Pid::from_raw(process.pid as i32), Signal::SIGKILL);
            }
        }
        remove_tree(&self.dir)
    }

    fn ctr_clean_quietly(&self) -> Result<()> {
        self.clean().map(drop)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("containerd in {}: {error:#}", self.dir.display());
        }
    }
}

/// Unmounts whatever is mounted below `dir` and removes it.
///
/// # Errors
/// Those of removing.
pub fn remove_tree(dir: &Path) -> Result<()> {
    let mut mounts: Vec<PathBuf> = listing::mounts()
        .into_iter()
        .map(PathBuf::from)
        .filter(|m| m.starts_with(dir))
        .collect();
    mounts.sort();
    for path in mounts.iter().rev() {
        // What stays mounted shows when the directory cannot be removed.
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Whether an overlay can have its upper directory below `dir`.
fn overlay_works(dir: &Path) -> bool {
    let probe = dir.join("overlay-probe");
    let works = || -> Result<()> {
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir_all(probe.join(name))?;
        }
        let at = probe.display();
        let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
        let merged = probe.join("merged");
        mount(
            Some("overlay"),
            &merged,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        // A file system that cannot hold what an overlay needs is read-only.
        let written = fs::write(merged.join("file"), "x");
        umount2(&merged, MntFlags::MNT_DETACH)?;
        Ok(written?)
    };
    let result = works().is_ok();
    // Scratch data below a directory that is removed anyway.
    let _ = fs::remove_dir_all(&probe);
    result
}
