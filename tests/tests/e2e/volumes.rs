// SPDX-License-Identifier: Apache-2.0
//! Volumes that change while containers run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::context::{same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![a_config_map_that_changes_wakes_its_watchers];

/// Prints the events in a directory (inotify(7)): mask and name. perl of this
/// machine: busybox has no such program everywhere.
const WATCH: &str = r#"
    $| = 1;
    $path = "/config";
    $fd = syscall(294, 0);
    syscall(254, $fd, $path, 0x3c0) > 0 or die "watch: $!";
    open(F, "<&=", $fd);
    print "watching\n";
    while (sysread(F, $b, 4096)) {
        while (length $b) {
            ($wd, $mask, $cookie, $length) = unpack("iIII", $b);
            ($name) = unpack("Z*", substr($b, 16, $length));
            printf("%x %s\n", $mask & 0xfff, $name);
            $b = substr($b, 16 + $length);
            if ($mask & 0x200) {
                open(K, "/config/key");
                print <K>;
                exit 0;
            }
        }
    }
"#;

/// What kubelet does when a ConfigMap is new or has changed.
fn publish(volume: &Path, version: &str, old: Option<&str>, value: &str) -> Result<()> {
    fs::create_dir(volume.join(version))?;
    fs::write(volume.join(version).join("key"), value)?;
    symlink(version, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    match old {
        Some(old) => fs::remove_dir_all(volume.join(old))?,
        None => symlink("..data/key", volume.join("key"))?,
    }
    Ok(())
}

fn a_config_map_that_changes_wakes_its_watchers(context: &Context) -> Result<()> {
    let volume = context.dir.join("volumes/kubernetes.io~configmap/config");
    fs::create_dir_all(&volume)?;
    publish(&volume, "..1", None, "old\n")?;
    let mount = |source: &Path, place: &str| {
        let source = source.display();
        format!("type=bind,src={source},dst={place},options=bind:ro")
    };
    let (config, usr) = (
        mount(&volume, "/config"),
        mount(Path::new("/usr"), "/host/usr"),
    );
    let script = "cat /config/key; lib=/host/usr/lib/x86_64-linux-gnu; \
        exec $lib/ld-linux-x86-64.so.2 --library-path $lib /host/usr/bin/perl -e \"$1\"";
    let mut watcher = context.attached(
        &["--mount", &config, "--mount", &usr],
        &["sh", "-c", script, "sh", WATCH],
    )?;
    watcher.wait_for("watching")?;
    publish(&volume, "..2", Some("..1"), "new\n")?;
    let code = watcher.wait(LIMIT).context("the update")?;
    let wanted = "old\nwatching\n100 ..2\n100 ..data_tmp\n40 ..data_tmp\n80 ..data\n200 ..1\nnew\n";
    same((code, watcher.out().as_str()), (0, wanted)).context(watcher.err())?;
    fs::remove_dir_all(context.dir.join("volumes"))?;
    Ok(())
}
