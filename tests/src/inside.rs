// SPDX-License-Identifier: Apache-2.0
//! Runs a program of this crate again where microVMs run: here, or in a box.

use std::env;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::boxed::{Command, Event, KvmBox, Options};
use crate::host::{self, Host};
use crate::install::Products;

/// Set for a program that this module has started in a box, to the release of
/// the kernel outside.
const MARK: &str = "BULKHEAD_INSIDE_BOX";

/// The kernel release of the machine outside, for a program in a box.
pub fn release_outside() -> Option<String> {
    env::var(MARK).ok().filter(|v| !v.is_empty())
}

/// Whether this program is to do its work in this process. If not,
/// [`in_a_box`] starts it again where it can.
pub fn is_here() -> bool {
    release_outside().is_some() || host::choose() == Host::Direct
}

/// Boots a box, runs this program in it with the same arguments and
/// `BULKHEAD_` and `RUST_` variables, passes its output on, and gives its exit
/// status. `booted` is called between.
///
/// # Errors
/// When the box does not come up or dies.
pub fn in_a_box(limit: Duration, booted: impl FnOnce(&KvmBox)) -> Result<i32> {
    let machine = start_box()?;
    booted(&machine);
    in_this_box(&machine, limit)
}

/// As [`in_a_box`], in a box that is up.
///
/// # Errors
/// When the box dies.
pub fn in_this_box(machine: &KvmBox, limit: Duration) -> Result<i32> {
    let command = again(env::args().skip(1), limit)?;
    let attend = || {
        let mut session = command.spawn(machine.mux())?;
        loop {
            match session.next_event()? {
                Event::Stdout(data) => pass_on(&mut std::io::stdout().lock(), &data),
                Event::Stderr(data) => pass_on(&mut std::io::stderr().lock(), &data),
                Event::Exit(exit) => return Ok(exit),
            }
        }
    };
    let exit = attend().map_err(|error| machine.explain(error))?;
    if exit.timed_out {
        eprintln!("stopped: it took longer than {limit:?}");
    }
    Ok(exit.status())
}

/// A box that has everything hot that containers need.
///
/// # Errors
/// When it does not come up.
pub fn start_box() -> Result<KvmBox> {
    start_box_with(Options::default())
}

/// As [`start_box`], with other options.
///
/// # Errors
/// When it does not come up.
pub fn start_box_with(options: Options) -> Result<KvmBox> {
    let mut hot = Products::find()?.hot()?;
    hot.extend(options.hot);
    Ok(KvmBox::start(Options { hot, ..options })?)
}

/// This program with these arguments, as a command in a box.
///
/// # Errors
/// When this program cannot be found.
pub fn again(arguments: impl Iterator<Item = String>, limit: Duration) -> Result<Command> {
    let exe = env::current_exe().context("find this program")?;
    let argv = std::iter::once(exe.to_string_lossy().into_owned()).chain(arguments);
    let mut command = Command::new(argv).timeout(limit);
    for (name, value) in env::vars() {
        // HOME, because the cache is there.
        if name.starts_with("BULKHEAD_") || name.starts_with("RUST_") || name == "HOME" {
            command = command.env(name, value);
        }
    }
    Ok(command.env(MARK, release()?))
}

/// Writes what came from a box.
pub fn pass_on(stream: &mut impl Write, data: &[u8]) {
    // Who reads this may have gone; the work goes on to its exit status.
    let _ = stream.write_all(data).and_then(|()| stream.flush());
}

/// Release of the kernel that this program runs on.
///
/// # Errors
/// When /proc is not there.
pub fn release() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    Ok(text.context("read the kernel's release")?.trim().to_owned())
}

/// A directory for this process to work in, in memory where there is a tmpfs,
/// with a name short enough for Unix sockets below it.
pub fn work_dir(name: &str) -> PathBuf {
    PathBuf::from(format!("/run/{name}-{}", std::process::id()))
}
