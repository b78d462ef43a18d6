// SPDX-License-Identifier: Apache-2.0
//! The box's file system: the host's below, memory above.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{mount, MsFlags};

use crate::boxed::initramfs::Plan;

/// Where the parts lie in the initramfs.
const HOST: &str = "/host";
const HOT: &str = "/hot";
const UPPER: &str = "/upper";
const ROOT: &str = "/root";

fn attach(source: &str, target: &Path, kind: &str, flags: MsFlags, data: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
    mount(Some(source), target, Some(kind), flags, Some(data))
        .with_context(|| format!("mount {kind} on {}", target.display()))
}

/// proc, sys and dev below `root`.
pub fn kernel_views(root: &Path) -> Result<()> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    attach("proc", &root.join("proc"), "proc", safe, "")?;
    attach("sysfs", &root.join("sys"), "sysfs", safe, "")?;
    let dev = root.join("dev");
    attach(
        "devtmpfs",
        &dev,
        "devtmpfs",
        MsFlags::MS_NOSUID,
        "mode=0755",
    )
}

/// Puts the root together on `/root`: what is written, above the hot files,
/// above the host's files.
pub fn root(plan: &Plan, warnings: &mut Vec<String>) -> Result<()> {
    let (none, read_only) = (MsFlags::empty(), MsFlags::MS_RDONLY);
    let options = "trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    attach("host", Path::new(HOST), "9p", read_only, options)?;
    let mut lower = HOST.to_owned();
    if plan.hot {
        attach("/dev/vda", Path::new(HOT), "erofs", read_only, "")?;
        lower = format!("{HOT}:{HOST}");
    }
    attach("tmpfs", Path::new(UPPER), "tmpfs", none, "size=80%")?;
    for dir in ["/upper/data", "/upper/work"] {
        fs::create_dir(dir).with_context(|| format!("make {dir}"))?;
    }
    let layers = format!("lowerdir={lower},upperdir={UPPER}/data,workdir={UPPER}/work");
    attach("overlay", Path::new(ROOT), "overlay", none, &layers)?;

    let root = Path::new(ROOT);
    for (dir, mode) in [
        ("dev/pts", "newinstance,gid=5,mode=620,ptmxmode=666"),
        ("dev/shm", "mode=1777"),
        ("dev/mqueue", ""),
        ("sys/fs/cgroup", "nsdelegate"),
        ("sys/kernel/debug", ""),
        ("sys/fs/bpf", ""),
    ] {
        if dir == "dev/pts" {
            kernel_views(root)?;
        }
        let kind = match dir {
            "dev/pts" => "devpts",
            "dev/shm" => "tmpfs",
            "dev/mqueue" => "mqueue",
            "sys/fs/cgroup" => "cgroup2",
            "sys/fs/bpf" => "bpf",
            _ => "debugfs",
        };
        if let Err(error) = attach(kind, &root.join(dir), kind, none, mode) {
            warnings.push(format!("{error:#}"));
        }
    }
    for dir in &plan.tmpfs {
        let mode = if dir == Path::new("/tmp") {
            "mode=1777"
        } else {
            "mode=0755"
        };
        let target = root.join(dir.strip_prefix("/").unwrap_or(dir));
        attach("tmpfs", &target, "tmpfs", none, mode)?;
    }
    Ok(())
}

/// Makes `/root` the root of everything that follows, and completes what a
/// host has.
pub fn enter(plan: &Plan, warnings: &mut Vec<String>) -> Result<()> {
    // The modules in memory have been inserted.
    let _ = fs::remove_dir_all("/modules");
    std::env::set_current_dir(ROOT).context("enter the new root")?;
    // As switch_root does: the initramfs cannot be pivoted away from, so the
    // new root is moved over it; pivot_root works for containers then.
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .context("move the new root to /")?;
    nix::unistd::chroot(".").context("change the root")?;
    std::env::set_current_dir("/").context("enter /")?;
    let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
    mount(None::<&str>, "/", None::<&str>, shared, None::<&str>)
        .context("make mounts propagate")?;

    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if let Err(error) = symlink(target, link) {
            warnings.push(format!("link {link}: {error}"));
        }
    }
    enable_controllers(warnings);
    if let Some(release) = plan.modules_dir.file_name() {
        let link = Path::new("/lib/modules").join(release);
        let linked = fs::create_dir_all("/lib/modules").and_then(|()| {
            if link.exists() {
                Ok(())
            } else {
                symlink(&plan.modules_dir, &link)
            }
        });
        if let Err(error) = linked {
            warnings.push(format!("link {}: {error}", link.display()));
        }
    }
    Ok(())
}

/// What systemd does on a host: containers' cgroups get all controllers.
fn enable_controllers(warnings: &mut Vec<String>) {
    let names = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    for name in names.split_whitespace() {
        let word = format!("+{name}");
        if let Err(error) = fs::write("/sys/fs/cgroup/cgroup.subtree_control", word) {
            warnings.push(format!("cgroup controller {name}: {error}"));
        }
    }
}
