// SPDX-License-Identifier: Apache-2.0
//! Locks of files that a guest and its host share.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{ensure, Context as _, Result};
use bulkhead_agent_protocol::SHARED_TAG;
use bulkhead_tests::boxed::hot::with_libraries;
use bulkhead_tests::install::which;
use nix::fcntl::{fcntl, FcntlArg, Flock, FlockArg};

use crate::context::{same, until, Context, LIMIT};
use crate::plugged::Guest;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    locks_hold_between_a_guest_and_its_host,
    locks_stay_in_the_guest_unless_configured,
    locks_hold_between_pods_where_configured
];

/// A program that opens the file and does this.
fn perl(what: &str) -> String {
    // fcntl's structure: the whole file, for oneself.
    let lock = "$lock = pack(\"ssx4qqlx4\", 1, 0, 0, 0, 0);";
    format!("perl -e 'open(F, \"+<\", \"/lock\") or exit 2; {lock} {what}'")
}

/// A guest whose containers called `locks` have Perl, and a file that is their
/// /lock.
fn guest(context: &Context, name: &str, host_locks: bool) -> Result<(Guest, File)> {
    let guest = Guest::boot_changed(context, name, SHARED_TAG, |config, _| {
        for share in &mut config.devices.fs {
            share.host_locks = host_locks;
        }
    })?;
    let file = fill(&guest.host.dir.join("shared/locks"))?;
    Ok((guest, file))
}

/// Makes a directory with Perl and its libraries in it, and a file to lock.
fn fill(root: &Path) -> Result<File> {
    fs::create_dir_all(root.join("bin"))?;
    let program = which("perl").context("perl is missing (package perl-base)")?;
    for file in with_libraries(&program)? {
        let to = match file == program {
            true => root.join("bin/perl"),
            false => root.join(file.strip_prefix("/")?),
        };
        fs::create_dir_all(to.parent().context("a directory")?)?;
        fs::copy(&file, &to).with_context(|| file.display().to_string())?;
    }
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    Ok(file.open(root.join("lock"))?)
}

/// Both kinds of locks of the whole file, while it is there.
struct Locked(#[allow(dead_code)] Flock<File>);

impl Locked {
    /// None: somebody else has one.
    fn new(file: &File) -> Result<Option<Self>> {
        let file = file.try_clone()?;
        let record = |kind: i32| libc::flock {
            l_type: kind as i16,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        if fcntl(&file, FcntlArg::F_OFD_SETLK(&record(libc::F_WRLCK))).is_err() {
            return Ok(None);
        }
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => Ok(Some(Self(locked))),
            Err((file, _)) => {
                fcntl(&file, FcntlArg::F_OFD_SETLK(&record(libc::F_UNLCK)))?;
                Ok(None)
            }
        }
    }

    fn unlock(self, file: &File) -> Result<()> {
        let record = libc::flock {
            l_type: libc::F_UNLCK as i16,
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(file, FcntlArg::F_OFD_SETLK(&record))?;
        Ok(())
    }
}

fn locks_hold_between_a_guest_and_its_host(context: &Context) -> Result<()> {
    let (guest, file) = guest(context, "locks", true)?;
    let locked = Locked::new(&file)?.context("it is locked already")?;
    let script = [
        "exec 2>/errors".to_owned(),
        format!("{} || exit 3", perl("exit(fcntl(F, 6, $lock) ? 7 : 0)")),
        format!("{} || exit 4", perl("exit(flock(F, 6) ? 7 : 0)")),
        "busybox touch /refused".to_owned(),
        format!(
            "{} || exit 5",
            perl("flock(F, 2) or exit 8; fcntl(F, 7, $lock) or exit 9")
        ),
        "busybox touch /waited".to_owned(),
        perl(
            "flock(F, 6) or exit 8; fcntl(F, 6, $lock) or exit 9; open(G, \">\", \"/held\"); \
             select(undef, undef, undef, 0.1) until -e \"/end\"",
        ),
    ];
    guest.start("locks", None, &script.join("; "))?;
    let root = guest.host.dir.join("shared/locks");
    guest.wait_for("locks", "refused")?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(!root.join("waited").exists(), "two had the lock");
    locked.unlock(&file)?;
    guest.wait_for("locks", "waited")?;
    guest.wait_for("locks", "held")?;
    ensure!(Locked::new(&file)?.is_none(), "the host has the lock, too");
    fs::write(root.join("end"), "")?;
    same(guest.end("locks")?, 0).with_context(|| guest.left("locks", "errors"))?;
    let free = Locked::new(&file)?.context("nobody holds the lock any more")?;
    free.unlock(&file)?;
    guest.stop()
}

fn locks_stay_in_the_guest_unless_configured(context: &Context) -> Result<()> {
    let (guest, file) = guest(context, "own-locks", false)?;
    let locked = Locked::new(&file)?.context("it is locked already")?;
    let both = perl("flock(F, 6) or exit 8; fcntl(F, 6, $lock) or exit 9");
    guest.run("locks", None, &both)?;
    locked.unlock(&file)?;
    guest.stop()
}

fn locks_hold_between_pods_where_configured(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let dir = context.dir.join("locks");
    let file = fill(&dir)?;
    let drop_ins = context.dir.join("config.d");
    fs::create_dir_all(&drop_ins)?;
    fs::write(
        drop_ins.join("locks.toml"),
        "[hypervisor]\nhost_locks = true\n",
    )?;
    let volume = format!("type=bind,src={},dst=/data,options=rbind:rw", dir.display());
    // By the libraries beside it: the image has others, or none.
    let try_it = "for loader in /data/lib64/ld-*; do :; done; $loader --library-path \
         $(for dir in /data/lib/*-linux-gnu /data/usr/lib/*-linux-gnu; do echo -n $dir:; done) \
         /data/bin/perl -e 'open(F, \"+<\", \"/data/lock\") or exit 2; \
         $lock = pack(\"ssx4qqlx4\", 1, 0, 0, 0, 0); \
         exit 7 unless fcntl(F, 6, $lock) && flock(F, 6); \
         open(G, \">\", \"/data/held\") or exit 3; sleep(600) if $ARGV[0]' --";
    let done = (|| {
        let held = format!("exec 2>/data/errors; {try_it} 1");
        let first = context.detached(&["--mount", &volume], &["sh", "-c", &held])?;
        let errors = || fs::read_to_string(dir.join("errors")).unwrap_or_default();
        until(LIMIT, "the lock", || Ok(dir.join("held").exists())).with_context(errors)?;
        ensure!(Locked::new(&file)?.is_none(), "the host has the lock, too");
        let again = format!("{try_it}; echo $?");
        let second = context.run(&["--mount", &volume], &["sh", "-c", &again])?;
        same(second.ok()?.out().trim_end(), "7")?;
        first.remove()?;
        until(LIMIT, "nobody has the lock", || {
            let free = Locked::new(&file)?;
            let is_free = free.is_some();
            free.map_or(Ok(()), |free| free.unlock(&file))?;
            Ok(is_free)
        })
    })();
    fs::remove_dir_all(&drop_ins)?;
    done
}
