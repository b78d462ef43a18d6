// SPDX-License-Identifier: Apache-2.0
//! How POSIX a shared directory is: pjdfstest in a container, on a directory of
//! the host, beside the same on the host's own file system. What does not pass
//! is what `vmm/POSIX.md` lists, no more and no less. The program is what
//! `tests/posix/build` makes (`make test-posix`); without it this is skipped.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::containerd::remove_tree;
use bulkhead_tests::install::which;
use bulkhead_tests::proc::{self, Done};
use bulkhead_tests::start::Start;
use serde_json::json;

use crate::context::{same, Context, Skip, LIMIT};
use crate::programs::{specification, Given};
use crate::runner::{tests, Test};
use crate::vsock::{guest_with_perl, open_spec, perl};

pub const TESTS: &[Test] = tests![
    posix_behaviour_is_as_listed;
    twice posix_truncation_spares_a_program_that_runs
];

/// Environment variable with the directory that has `pjdfstest`.
const SUITE: &str = "BULKHEAD_POSIX";
/// What is known not to pass, and why.
const LIST: &str = include_str!("../../../vmm/POSIX.md");
/// How long it may take in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Fewer cases than this are not the suite.
const CASES: usize = 200;

/// All that Linux has. The pauses are longer than a tick, which is how exact
/// times of files are.
const SETTINGS: &str = "\
[features]\nposix_fallocate = {}\nrename_ctime = {}\nutime_now = {}\nutimensat = {}\n\
[dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"tests\", \"tests\"]]\n\
[settings]\nnaptime = 0.05\n";
const PASSWD: &str = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n\
    tests:x:1234:1234::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\ntests:x:1234:\n";
/// The directory under test is /t, and another file system /tmp. The cases that
/// make it read-only come by themselves: other cases leave files open that they
/// have written to, and then the kernel refuses.
const SCRIPT: &str = "/pjdfstest -c /settings -p /t -s /tmp; \
    exec /pjdfstest -c /remount -p /t erofs";
/// What the suite runs.
const PROGRAMS: [&str; 5] = ["mount", "sh", "sleep", "umount", "which"];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passes,
    Fails,
    Skipped,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passes => "passes",
            Self::Fails => "fails",
            Self::Skipped => "skipped",
        })
    }
}

/// A case's outcome, and what the suite says of it.
struct Case {
    outcome: Outcome,
    why: String,
}

type Cases = BTreeMap<String, Case>;

/// What the suite has printed: a line for each case, and indented ones for why.
fn cases(output: &str) -> Cases {
    let mut cases = Cases::new();
    let mut last = None;
    for line in output.lines() {
        if let (Some(why), Some(name)) = (line.strip_prefix('\t'), &last) {
            let case: Option<&mut Case> = cases.get_mut(name);
            case.into_iter()
                .for_each(|case| case.why += &format!("{} ", why.trim()));
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, outcome] = words[..] else { continue };
        let outcome = match outcome {
            "ok" => Outcome::Passes,
            "FAILED" => Outcome::Fails,
            "skipped" => Outcome::Skipped,
            _ => continue,
        };
        last = Some(name.to_owned());
        let why = String::new();
        cases.insert(name.to_owned(), Case { outcome, why });
    }
    cases
}

/// How many cases a run says it has had.
fn total(line: &str) -> Option<usize> {
    let (_, counts) = line.split_once("Summary: ")?;
    let total = counts.split(", ").last()?.strip_suffix(" total")?;
    total.parse().ok()
}

/// All cases of the runs, of which none is lost: what is only in the second run
/// was skipped in the first.
fn run_of(done: &Done) -> Result<Cases> {
    let output = done.out();
    let found = cases(&output);
    let totals: Vec<usize> = output.lines().filter_map(total).collect();
    let [total, again] = totals[..] else {
        bail!("no two runs: {} {output} {}", done.code, done.err());
    };
    ensure!(total == found.len(), "{} of {total} cases", found.len());
    ensure!(again > 0, "no case makes a file system read-only");
    ensure!(total >= CASES, "only {total} cases");
    Ok(found)
}

/// The list's rows: a case, its outcome on the host and over virtio-fs, and why.
fn listed() -> Result<BTreeMap<String, (String, String)>> {
    let mut list = BTreeMap::new();
    for row in LIST.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let [_, case, host, guest, why, _] = cells[..] else {
            bail!("not a row of four cells: {row}");
        };
        ensure!(!why.is_empty(), "{case} is not explained");
        let name = case.trim_matches('`').to_owned();
        let twice = list.insert(name, (host.to_owned(), guest.to_owned()));
        ensure!(twice.is_none(), "{case} is listed twice");
    }
    Ok(list)
}

fn posix_behaviour_is_as_listed(context: &Context) -> Result<()> {
    let suite = env::var(SUITE).ok().filter(|dir| !dir.is_empty());
    let suite = suite.ok_or_else(|| Skip(format!("it needs {SUITE} (make test-posix)")))?;
    let base = context.dir.join("posix");
    let root = root(&base, Path::new(&suite))?;
    let host = run_of(&on_the_host(&root)?).context("on the host")?;
    // A file system of its own: some cases make theirs read-only for a while.
    let shared = base.join("shared");
    let mut mount = Command::new("mount");
    proc::run(mount.args(["-t", "tmpfs", "tmpfs"]).arg(&shared), LIMIT)?.ok()?;
    let done = in_a_container(context, &shared, &root);
    proc::run(Command::new("umount").arg("-l").arg(&shared), LIMIT)?.ok()?;
    let guest = run_of(&done?).context("over virtio-fs")?;
    remove_tree(&base)?;

    let listed = listed()?;
    let mut wrong = Vec::new();
    let (mut here, mut there) = (0, 0);
    for (name, case) in &guest {
        let peer = host
            .get(name)
            .with_context(|| format!("{name} on the host"))?;
        here += usize::from(peer.outcome == Outcome::Fails);
        there += usize::from(case.outcome == Outcome::Fails);
        let got = (peer.outcome.to_string(), case.outcome.to_string());
        let passes = peer.outcome == Outcome::Passes && case.outcome == Outcome::Passes;
        match listed.get(name) {
            None if passes => {}
            Some(want) if *want == got => {}
            want => wrong.push(format!(
                "| `{name}` | {} | {} | (listed: {want:?}; {}; {}) |",
                got.0, got.1, peer.why, case.why
            )),
        }
    }
    let gone = listed.keys().filter(|name| !guest.contains_key(*name));
    wrong.extend(gone.map(|name| format!("`{name}` is listed, and no case")));
    println!(
        "    {} cases: {here} fail on the host, {there} over virtio-fs",
        guest.len()
    );
    ensure!(
        wrong.is_empty(),
        "not as vmm/POSIX.md has it:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

/// A root file system with the suite, and what it runs.
fn root(base: &Path, suite: &Path) -> Result<PathBuf> {
    let root = base.join("root");
    for dir in ["bin", "dev", "etc", "proc", "sys", "t", "tmp"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::create_dir_all(base.join("shared"))?;
    let busybox = which("busybox").context("busybox is missing (package busybox-static)")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in PROGRAMS {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::copy(suite.join("pjdfstest"), root.join("pjdfstest"))?;
    fs::write(root.join("settings"), SETTINGS)?;
    let remount = format!("{SETTINGS}allow_remount = true\n");
    fs::write(root.join("remount"), remount)?;
    fs::write(root.join("etc/passwd"), PASSWD)?;
    fs::write(root.join("etc/group"), GROUP)?;
    Ok(root)
}

fn on_the_host(root: &Path) -> Result<Done> {
    // In memory, as the directory that is shared.
    let script = "set -e; cd \"$0\"; mount -t proc proc proc; mount --bind /dev dev; \
        mount -t tmpfs tmpfs t; mount -t tmpfs tmpfs tmp; exec chroot . sh -c \"$1\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(root);
    command.arg(SCRIPT).env("NO_COLOR", "1");
    command.env("RUST_BACKTRACE", "0");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    proc::run(&mut command, PATIENCE)
}

fn in_a_container(context: &Context, shared: &Path, root: &Path) -> Result<Done> {
    let mut spec = specification(context, root, &Given::Privileged)?;
    spec["process"]["args"] = json!(["sh", "-c", SCRIPT]);
    spec["process"]["env"] = json!(["NO_COLOR=1", "PATH=/bin"]);
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    mounts.push(json!({
        "destination": "/t", "type": "bind", "source": shared, "options": ["bind", "rw"],
    }));
    let file = context.dir.join("posix.json");
    fs::write(&file, spec.to_string())?;
    let flags = ["--rm", "--config"];
    let mut command = context.containerd.run(&context.runtime, &flags);
    proc::run(command.arg(&file).arg(context.id("posix")), PATIENCE)
}

/// Opens a running program's file so that it is to be emptied, though not
/// written to: a suite that only looks at the error misses what becomes of it.
const TRUNCATE: &str = "$SIG{ALRM} = sub { die 'too late' }; alarm 250; \
    system('/bin/busybox', 'cp', '/bin/busybox', '/program') == 0 or die; \
    $size = -s '/program'; \
    $pid = fork; \
    if (!$pid) { exec { '/program' } 'sleep', '9999'; die qq(exec: $!) } \
    select(undef, undef, undef, 0.05) until readlink(qq(/proc/$pid/exe)) eq '/program'; \
    sysopen(F, '/program', 01000) and die 'it is opened'; \
    $! == 26 or die qq(another error: $!); \
    (-s '/program') == $size or die 'it is emptied'; \
    select(undef, undef, undef, 1); \
    waitpid($pid, 1) == 0 or die qq(it has ended: $?); \
    kill(9, $pid); \
    waitpid($pid, 0) == $pid && $? == 9 or die qq(it has ended otherwise: $?); \
    sysopen(F, '/program', 01000) or die qq(afterwards: $!); \
    -z '/program' or die 'it is not emptied'; \
    print 'spared'";

fn posix_truncation_spares_a_program_that_runs(context: &Context, start: Start) -> Result<()> {
    let guest = guest_with_perl(context, start, "posix-truncate")?;
    let spec = open_spec("truncate", &perl(TRUNCATE, &[]))?;
    let told = guest.run("truncate", spec)?.1.ok()?;
    same(String::from_utf8(told)?.as_str(), "spared")?;
    drop(guest);
    Ok(())
}
