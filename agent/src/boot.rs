// SPDX-License-Identifier: Apache-2.0
//! What PID 1 does before anything else. The root file system is read-only;
//! everything that is written goes to file systems in memory.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{mount, MsFlags};
use nix::sys::statfs::{statfs, FsType};
use nix::unistd::{chdir, chroot, setsid};

use crate::cgroup::Hierarchy;
use crate::error::{Context, Result};
use crate::netlink::Netlink;
use crate::sys::fd::dup_onto;

/// Where the cgroup hierarchy is mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// One mount: type, target, flags, options.
type Mount = (&'static str, &'static str, MsFlags, &'static str);

/// In an order in which each target is there.
fn mounts() -> [Mount; 9] {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let memory = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    [
        ("proc", "/proc", quiet, ""),
        ("sysfs", "/sys", quiet, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "newinstance,gid=5,mode=620,ptmxmode=666",
        ),
        ("tmpfs", "/dev/shm", memory, "mode=1777"),
        // The pod's message queues, for who may not mount them.
        ("mqueue", "/dev/mqueue", quiet, ""),
        ("tmpfs", "/run", memory, "mode=755"),
        ("tmpfs", "/tmp", memory, "mode=1777"),
        ("cgroup2", CGROUPS, quiet, "nsdelegate,memory_recursiveprot"),
    ]
}

/// Turns a machine that has just booted into one that can run containers.
///
/// # Errors
/// The step that failed. There is no going on then.
pub fn boot() -> Result<Hierarchy> {
    // Until /dev is mounted even the log has nowhere to go but descriptor 2.
    leave_rootfs()?;
    for (kind, target, flags, options) in mounts() {
        mount_one(kind, target, flags, options)?;
    }
    crate::log::to_kernel();
    show_errors();
    standard_streams()?;
    // By now someone may be a session leader already: the kernel starts init as none.
    match setsid() {
        Ok(_) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(errno).step(|| "start session"),
    }
    fs::write("/proc/self/oom_score_adj", "-1000").step(|| "protect from the OOM killer")?;
    // A file of the guest's is never more than this many descriptors away.
    raise_descriptor_limit();
    Netlink::open()?.loopback_up()?;
    Hierarchy::in_guest(Path::new(CGROUPS))
}

/// Lets errors reach the console, which the kernel was told not to do while it
/// boots (loglevel=3): it takes the absence of old hardware for one. What was
/// asked for otherwise stays.
fn show_errors() {
    const LEVEL: &str = "/proc/sys/kernel/printk";
    match fs::read_to_string(LEVEL) {
        Ok(levels) if levels.starts_with("3\t") => {
            if let Err(error) = fs::write(LEVEL, "4") {
                crate::warn!("msg=\"console level stays\" error={error}");
            }
        }
        _ => {}
    }
}

fn mount_one(kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<()> {
    if let Err(error) = fs::create_dir(target) {
        // The image brings the rest; on a read-only one EROFS may come first.
        let there = error.kind() == ErrorKind::AlreadyExists || Path::new(target).is_dir();
        if !there {
            return Err(error).step(|| format!("create {target}"));
        }
    }
    let options = (!options.is_empty()).then_some(options);
    match mount(Some(kind), target, Some(kind), flags, options) {
        // devtmpfs that the kernel mounted itself.
        Err(Errno::EBUSY) => Ok(()),
        other => other.step(|| format!("mount {kind} on {target}")),
    }
}

/// An initrd is the kernel's own root, which pivot_root(2) refuses to leave.
/// A copy of it mounted over itself serves.
fn leave_rootfs() -> Result<()> {
    const RAMFS: FsType = FsType(0x8584_58f6);
    const TMPFS: FsType = FsType(0x0102_1994);
    let kind = statfs("/").step(|| "inspect /")?.filesystem_type();
    if kind != RAMFS && kind != TMPFS {
        return Ok(());
    }
    let place = "/mnt";
    if let Err(error) = fs::create_dir(place) {
        if error.kind() != ErrorKind::AlreadyExists {
            return Err(error).step(|| "create /mnt");
        }
    }
    let none = None::<&str>;
    mount(Some("/"), place, none, MsFlags::MS_BIND, none).step(|| "bind / to /mnt")?;
    chdir(place).step(|| "change directory to /mnt")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none).step(|| "move /mnt to /")?;
    chroot(".").step(|| "change root")?;
    chdir("/").step(|| "change directory to /")
}

/// The kernel opens /dev/console for init only when the image has it.
fn standard_streams() -> Result<()> {
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    let stream = open("/dev/console")
        .or_else(|_| open("/dev/null"))
        .step(|| "open /dev/null")?;
    for number in 0..3 {
        // A console that nobody reads must not block what writes to it: the
        // log goes elsewhere, and children get streams of their own.
        dup_onto(stream.as_raw_fd(), number).step(|| "set up standard streams")?;
    }
    if stream.as_raw_fd() < 3 {
        // It is one of the three now.
        std::mem::forget(stream);
    }
    Ok(())
}

fn raise_descriptor_limit() {
    // The kernel's ceiling (fs.nr_open); children get what their
    // specification says, or the usual 1024 and 4096.
    let most = 1 << 20;
    if let Err(errno) = crate::sys::process::setrlimit(0, libc::RLIMIT_NOFILE as i32, most, most) {
        crate::warn!("msg=\"descriptor limit stays\" errno={errno}");
    }
}
