// SPDX-License-Identifier: Apache-2.0
//! Volumes that change while containers run.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{bail, Context as _, Result};

use bulkhead_tests::image::sha256;

use crate::cli::with_config;
use crate::context::{same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    a_config_map_that_changes_wakes_its_watchers,
    a_config_map_that_cannot_be_watched_is_shared,
    changes_of_the_host_wake_watchers_in_any_volume,
    shared_files_are_the_hosts_pages,
];

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

/// How many inotify instances a user may have.
const INSTANCES: &str = "/proc/sys/fs/inotify/max_user_instances";

/// Puts the number of instances back when dropped.
struct Instances(String);

impl Drop for Instances {
    fn drop(&mut self) {
        // A wrong number later says so itself.
        let _ = fs::write(INSTANCES, &self.0);
    }
}

fn a_config_map_that_cannot_be_watched_is_shared(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let volume = context.dir.join("volumes/kubernetes.io~secret/secret");
    fs::create_dir_all(&volume)?;
    publish(&volume, "..1", None, "old\n")?;
    let mount = format!(
        "type=bind,src={},dst=/secret,options=bind:ro",
        volume.display()
    );
    let before = Instances(fs::read_to_string(INSTANCES)?);
    fs::write(INSTANCES, "0")?;
    let script = "cat /secret/key; until grep -q new /secret/key; do sleep 0.2; done; echo seen";
    let mut reader = context.attached(&["--mount", &mount], &["sh", "-c", script])?;
    reader.wait_for("old")?;
    drop(before);
    publish(&volume, "..2", Some("..1"), "new\n")?;
    let code = reader.wait(LIMIT).context("the update")?;
    same((code, reader.out().as_str()), (0, "old\nseen\n")).context(reader.err())?;
    fs::remove_dir_all(context.dir.join("volumes"))?;
    Ok(())
}

/// Prints what is modified (2), changed in its attributes (4), made (100) and
/// removed (200) in two directories, until there is a `done`.
const WATCH_TWO: &str = r#"
    $| = 1;
    $fd = syscall(294, 0);
    for $path ("/one", "/two") {
        $copy = $path;
        syscall(254, $fd, $copy, 0x306) > 0 or die "watch: $!";
    }
    open(F, "<&=", $fd);
    print "watching\n";
    while (sysread(F, $b, 4096)) {
        while (length $b) {
            ($wd, $mask, $cookie, $length) = unpack("iIII", $b);
            ($name) = unpack("Z*", substr($b, 16, $length));
            printf("%d: %x %s;\n", $wd, $mask & 0xfff, $name);
            $b = substr($b, 16 + $length);
            exit 0 if $name eq "done";
        }
    }
"#;

fn changes_of_the_host_wake_watchers_in_any_volume(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let (one, two) = (context.dir.join("one"), context.dir.join("two"));
    for directory in [&one, &two] {
        fs::create_dir_all(directory)?;
    }
    let mount = |source: &Path, place: &str, options: &str| {
        let source = source.display();
        format!("type=bind,src={source},dst={place},options={options}")
    };
    let mounts = [
        mount(&one, "/one", "bind"),
        mount(&two, "/two", "bind:ro"),
        mount(Path::new("/usr"), "/host/usr", "bind:ro"),
    ];
    // A file of its own, when it is asked to: it is told of that once.
    let script = "(while ! [ -e /one/go ]; do sleep 1; done; echo x >/one/own; sleep 3; echo x >/one/rest) & \
        lib=/host/usr/lib/x86_64-linux-gnu; \
        exec $lib/ld-linux-x86-64.so.2 --library-path $lib /host/usr/bin/perl -e \"$1\"";
    let flags: Vec<&str> = mounts.iter().flat_map(|m| ["--mount", m]).collect();
    let mut watcher = context.attached(&flags, &["sh", "-c", script, "sh", WATCH_TWO])?;
    watcher.wait_for("watching")?;
    // Directories are marked beside the start.
    let first = one.join("first");
    let marked = || -> Result<bool> {
        fs::write(&first, "1")?;
        std::thread::sleep(std::time::Duration::from_secs(2));
        Ok(watcher.out().contains("1: 2 first;"))
    };
    crate::context::until(LIMIT, "a change to be told", marked)?;
    // The file is as the host has left it.
    let written = fs::metadata(&first)?;
    fs::write(two.join("second"), "1")?;
    watcher.wait_for("2: 2 second;")?;
    fs::set_permissions(two.join("second"), fs::Permissions::from_mode(0o600))?;
    watcher.wait_for("2: 4 second;")?;
    let now = fs::metadata(&first)?;
    let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    same(times(&now), times(&written))?;
    fs::create_dir(one.join("below"))?;
    watcher.wait_for("1: 2 below;")?;
    fs::remove_file(&first)?;
    watcher.wait_for("1: 2 ;")?;
    fs::write(one.join("go"), "")?;
    watcher.wait_for("1: 2 rest;")?;
    fs::write(two.join("done"), "")?;
    let code = watcher.wait(LIMIT).context("the end")?;
    let out = watcher.out();
    same(code, 0).context(watcher.err())?;
    let count = |event: &str| out.matches(event).count();
    for event in ["1: 100 own;", "1: 2 own;", "2: 2 second;", "2: 4 second;"] {
        same(count(event), 1).with_context(|| format!("{event}: {out}"))?;
    }
    for directory in [one, two] {
        fs::remove_dir_all(directory)?;
    }
    Ok(())
}

/// Reads a large file, then more files than the window has room for at once,
/// makes some, and waits for the host. Tells what the guest's page cache grew by
/// with the large one, in KiB.
const READ_ALL: &str = r#"
    cached() { awk '/^Cached/ { print $2 }' /proc/meminfo; }
    awk '$2 == "/data" { print $3, $4 }' /proc/mounts
    before=$(cached)
    sha256sum </data/large
    echo grown $(($(cached) - before))
    for i in $(seq 60); do cat /data/many/$i; done | sha256sum
    cp /bin/busybox /data/busybox && /data/busybox echo ran
    printf guest | dd of=/data/large bs=1 seek=5000000 conv=notrunc 2>/dev/null
    exec 3</data/large
    dd bs=1 skip=5000000 count=5 <&3 2>/dev/null; echo
    echo waiting
    until [ -e /data/go ]; do sleep 0.2; done
    dd bs=1 skip=995 count=4 <&3 2>/dev/null; echo
"#;

fn shared_files_are_the_hosts_pages(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let (options, grown, _) = read_all(context)?;
    if options.contains("dax") || grown < 20 << 10 {
        bail!("without a window: {options}, {grown} KiB");
    }
    let window = "[hypervisor]\ndax_mib = 64\n";
    let config = context.config.toml().replacen("[hypervisor]\n", window, 1);
    let (options, grown, host) = with_config(context, &config, || read_all(context))?;
    if !options.contains("dax=always") || grown > 4 << 10 {
        bail!("with a window: {options}, {grown} KiB");
    }
    // At once, which a copy in the guest need not be.
    same(host.as_str(), "host")
}

/// The mount's options, what the guest's page cache grew by, and what is seen where
/// the host has written `host` into an open file.
fn read_all(context: &Context) -> Result<(String, i64, String)> {
    let data = context.dir.join("data");
    fs::create_dir_all(data.join("many"))?;
    let large: Vec<u8> = (0..6_u32 << 20)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(data.join("large"), &large)?;
    let mut many = Vec::new();
    for number in 1..=60_u8 {
        let bytes = vec![number; 9_000];
        fs::write(data.join("many").join(number.to_string()), &bytes)?;
        many.extend_from_slice(&bytes);
    }
    let mount = format!("type=bind,src={},dst=/data,options=bind", data.display());
    let mut reader = context.attached(&["--mount", &mount], &["sh", "-c", READ_ALL])?;
    reader.wait_for("waiting")?;
    let mut file = fs::File::options().write(true).open(data.join("large"))?;
    file.seek(SeekFrom::Start(5_001_000))?;
    file.write_all(b"host")?;
    fs::write(data.join("go"), "")?;
    same(reader.wait(LIMIT)?, 0).with_context(|| reader.err())?;
    let out = reader.out();
    let lines: Vec<&str> = out.lines().collect();
    let [options, sum, grown, sums, ran, guest, _, host] = lines[..] else {
        bail!("{out}");
    };
    same((ran, guest), ("ran", "guest"))?;
    same(sum, format!("{}  -", sha256(&large)))?;
    same(sums, format!("{}  -", sha256(&many)))?;
    let now = fs::read(data.join("large"))?;
    same(&now[5_000_000..5_000_005], &b"guest"[..])?;
    let grown = grown.strip_prefix("grown ").context("no number")?.parse()?;
    fs::remove_dir_all(data)?;
    Ok((options.to_owned(), grown, host.to_owned()))
}
