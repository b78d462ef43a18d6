// SPDX-License-Identifier: Apache-2.0
//! The runtime specification's rarer parts: hooks on the host and in the guest,
//! user and time namespaces, mount options, settings of a process. What the
//! distribution's containerd does not know, and so drops, cannot be shown here:
//! timeOffsets, scheduler, ioPriority. The agent's own tests have them.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::install::which;
use serde_json::{json, Value};

use crate::context::{mentions, same, Context, Skip, LIMIT};
use crate::failure::{good_spec, run_spec, unpacked};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    hooks_run_where_and_when_they_should,
    a_hook_that_fails_ends_the_create,
    hooks_set_the_network_up,
    user_and_time_namespaces,
    mount_options_and_process_settings,
    a_pod_shares_its_pid_namespace,
    a_pod_shares_its_pid_and_user_namespaces,
];

fn sh(script: &str) -> Value {
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script] })
}

/// A specification of a shell script, and the log of its hooks.
fn scripted(context: &Context, script: &str) -> Result<(Value, std::path::PathBuf)> {
    let root = unpacked(context)?;
    let mut spec = good_spec(context, &root)?;
    spec["process"]["args"] = json!(["busybox", "sh", "-c", script]);
    let log = context.dir.join("hooks.log");
    fs::write(&log, "")?;
    Ok((spec, log))
}

fn hooks_run_where_and_when_they_should(context: &Context) -> Result<()> {
    let (mut spec, log) = scripted(context, "cat /dev/shm/started; echo; uname -r")?;
    let name = log.display();
    let tell = |kind: &str| sh(&format!("echo {kind} $(cat) >> {name}"));
    // A program of the host in the container's namespaces: no shell is there.
    let busybox = which("busybox").context("busybox is missing")?;
    spec["hooks"] = json!({
        "prestart": [tell("prestart")],
        "createRuntime": [tell("createRuntime")],
        "createContainer": [{
            "path": busybox,
            "args": ["mkdir", "/run/bulkhead/by-a-hook"],
        }],
        "startContainer": [sh("cat > /dev/shm/started; busybox uname -r >> /dev/shm/started")],
        "poststart": [tell("poststart"), tell("again")],
        "poststop": [tell("poststop")],
    });
    if context.only_bulkhead().is_err() {
        // Where it leads is a path of the guest.
        spec["hooks"]["createContainer"] = json!([]);
    }
    let out = run_spec(context, &spec)?.ok()?.out();
    let text = fs::read_to_string(&log)?;
    let mut kinds = Vec::new();
    for line in text.lines() {
        let (kind, state) = line.split_once(' ').context("a kind and a state")?;
        let state: Value = serde_json::from_str(state).with_context(|| line.to_owned())?;
        let status = match kind {
            "prestart" | "createRuntime" => "creating",
            "poststop" => "stopped",
            _ => "running",
        };
        same(state["status"].as_str(), Some(status))?;
        let bundle = state["bundle"].as_str().context("a bundle")?;
        if kind != "poststop" && state["pid"].as_u64().is_none_or(|pid| pid <= 1) {
            bail!("no process id in {line}");
        }
        mentions(bundle, &[state["id"].as_str().context("an id")?])?;
        kinds.push(kind);
    }
    same(
        kinds,
        [
            "prestart",
            "createRuntime",
            "poststart",
            "again",
            "poststop",
        ],
    )?;
    // The state, the release that the hook saw, and that of the program.
    let lines: Vec<&str> = out.lines().collect();
    mentions(lines[0], &["\"status\":\"created\""])?;
    let release = lines.last().context("a release")?;
    if !lines[0].ends_with(release) && lines.get(1) != Some(release) {
        bail!("the hook ran on another kernel: {out:?}");
    }
    fs::remove_file(log)?;
    Ok(())
}

fn a_hook_that_fails_ends_the_create(context: &Context) -> Result<()> {
    let (mut spec, log) = scripted(context, "echo ran")?;
    let before = context.listing()?;
    for (hooks, why) in [
        (
            json!({ "prestart": [sh("echo oh no >&2; exit 3")] }),
            "oh no",
        ),
        (
            json!({ "createRuntime": [{ "path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1 }] }),
            "timeout",
        ),
        (json!({ "startContainer": [sh("exit 7")] }), "7"),
        (
            json!({ "createContainer": [{ "path": "/bin/false" }] }),
            "createContainer",
        ),
    ] {
        fs::write(&log, "")?;
        spec["hooks"] = hooks;
        spec["hooks"]["poststop"] = json!([sh(&format!("echo stopped >> {}", log.display()))]);
        let done = run_spec(context, &spec)?;
        if done.code == 0 || done.out().contains("ran") {
            bail!("{}: it ran", spec["hooks"]);
        }
        mentions(&done.err(), &[why])?;
        same(fs::read_to_string(&log)?.as_str(), "stopped\n")
            .with_context(|| spec["hooks"].to_string())?;
    }
    // One of poststart fails the start of a program that runs already, and ends
    // it; the ones behind it do not run.
    fs::write(&log, "")?;
    let note =
        |word: &str, status: u8| sh(&format!("echo {word} >> {}; exit {status}", log.display()));
    spec["hooks"] = json!({ "poststart": [note("first", 0), note("second", 9), note("third", 0)],
        "poststop": [note("stopped", 0)] });
    spec["process"]["args"] = json!(["busybox", "sleep", "9999"]);
    let done = run_spec(context, &spec)?;
    if done.code == 0 {
        bail!("a start whose poststart hook failed");
    }
    mentions(&done.err(), &["poststart", "9"])?;
    same(
        fs::read_to_string(&log)?.as_str(),
        "first\nsecond\nstopped\n",
    )?;
    context.containerd.clean()?;
    fs::remove_file(log)?;
    context.nothing_left(&before, LIMIT)
}

/// As Docker does: the network namespace is new, and hooks fill it by the
/// process id that they are told.
fn hooks_set_the_network_up(context: &Context) -> Result<()> {
    for program in ["ip", "nsenter"] {
        if which(program).is_none() {
            return Err(Skip(format!("{program} is missing")).into());
        }
    }
    let host = || -> Result<String> {
        let done = Command::new("ip").args(["-o", "addr"]).output()?;
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    };
    let before = host()?;
    let (mut spec, log) = scripted(context, "busybox ip -o addr show eth0")?;
    let script = "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); exec nsenter -t $pid -n sh -ec '\
        ip link add eth0 type veth peer name peer0; ip link set peer0 up; \
        ip addr add 10.99.7.2/24 dev eth0; ip link set eth0 up'";
    spec["hooks"] = json!({ "prestart": [sh(script)] });
    let out = run_spec(context, &spec)?.ok()?.out();
    mentions(&out, &["10.99.7.2/24"])?;
    same(host()?, before).context("the host's network")?;
    fs::remove_file(log)?;
    Ok(())
}

/// Makes everything below `root` the user's that a container's root is.
fn give(root: &Path, owner: &str) -> Result<()> {
    let mut chown = Command::new("chown");
    let status = chown.args(["-R", "-h", owner]).arg(root).status()?;
    if !status.success() {
        bail!("chown: {status}");
    }
    Ok(())
}

/// The kernel's own, by the number that it always has.
const FIRST_TIME_NAMESPACE: &str = "time:[4026531834]";

fn user_and_time_namespaces(context: &Context) -> Result<()> {
    let script =
        "busybox id -u; cat /proc/self/uid_map; echo x > /made; busybox stat -c %u /made; \
        ls -d /dev/mqueue; echo x > /dev/null; busybox readlink /proc/self/ns/time; \
        busybox grep ' /data ' /proc/self/mountinfo | busybox cut -d' ' -f6; ls /sys/class";
    let (mut spec, log) = scripted(context, script)?;
    // How times of access are kept is not for a user namespace to change.
    let data = context.dir.join("data");
    fs::create_dir_all(&data)?;
    let mounts = spec["mounts"].as_array_mut().context("a list of mounts")?;
    mounts.push(
        json!({ "destination": "/data", "type": "bind", "source": data,
        "options": ["rbind", "noatime"] }),
    );
    let root = context.dir.join("rootfs");
    give(&root, "100000:100000")?;
    let range = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    spec["linux"]["uidMappings"] = range.clone();
    spec["linux"]["gidMappings"] = range;
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.context("a list of namespaces")?;
    namespaces.push(json!({ "type": "user" }));
    if context.only_bulkhead().is_ok() {
        namespaces.push(json!({ "type": "time" }));
    }
    let out = run_spec(context, &spec);
    let made = root.join("made");
    let owner = fs::metadata(&made).map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    let _ = fs::remove_file(&made);
    give(&root, "0:0")?;
    fs::remove_file(log)?;
    fs::remove_dir_all(data)?;
    let out = out?.ok()?.out();
    let lines: Vec<&str> = out.lines().collect();
    same(lines[0], "0")?;
    let map: Vec<&str> = lines[1].split_whitespace().collect();
    same(map, ["0", "100000", "65536"])?;
    same(lines[2], "0")?;
    same(owner?, 100_000_u32)?;
    same(lines[3], "/dev/mqueue")?;
    same(lines[5], "rw,noatime")?;
    if context.only_bulkhead().is_ok() && lines[4] == FIRST_TIME_NAMESPACE {
        bail!("the time namespace is the guest's");
    }
    Ok(())
}

fn mount_options_and_process_settings(context: &Context) -> Result<()> {
    let script = "busybox grep -E ' /(data|mem) ' /proc/self/mountinfo | busybox cut -d' ' -f5,6; \
        busybox uname -m; umask; \
        cat /proc/self/oom_score_adj; cat /proc/sys/kernel/shmmni; busybox stat -c %a /copied; \
        ls /copied";
    let (mut spec, log) = scripted(context, script)?;
    let data = context.dir.join("data");
    fs::create_dir_all(&data)?;
    let copied = context.dir.join("rootfs/copied");
    fs::create_dir_all(copied.join("inside"))?;
    let mounts = spec["mounts"].as_array_mut().context("a list of mounts")?;
    mounts.extend([
        json!({ "destination": "/data", "type": "bind", "source": data,
            "options": ["rbind", "rro", "rnoexec", "nosymfollow"] }),
        json!({ "destination": "/mem", "type": "tmpfs", "source": "tmpfs",
            "options": ["noatime", "nodev", "size=1m"] }),
        json!({ "destination": "/copied", "type": "tmpfs", "source": "tmpfs",
            "options": ["tmpcopyup"] }),
    ]);
    spec["process"]["oomScoreAdj"] = json!(250);
    spec["process"]["user"]["umask"] = json!(0o027);
    spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
    spec["linux"]["sysctl"] = json!({ "kernel.shmmni": "777" });
    let done = run_spec(context, &spec);
    fs::remove_dir_all(copied)?;
    fs::remove_dir_all(data)?;
    fs::remove_file(log)?;
    same(
        done?.ok()?.out().as_str(),
        "/data ro,noexec,relatime,nosymfollow\n/mem rw,nodev,noatime\ni686\n0027\n250\n777\n755\ninside",
    )
}

/// As Kubernetes does with `shareProcessNamespace`.
fn a_pod_shares_its_pid_namespace(context: &Context) -> Result<()> {
    let (spec, log) = scripted(context, "exec busybox sleep 1000")?;
    fs::remove_file(log)?;
    shares(context, spec, &["pid"])
}

/// The same with `hostUsers: false`.
fn a_pod_shares_its_pid_and_user_namespaces(context: &Context) -> Result<()> {
    let (mut spec, log) = scripted(context, "exec busybox sleep 1000")?;
    fs::remove_file(log)?;
    let range = json!([{ "containerID": 0, "hostID": 100_000, "size": 65536 }]);
    spec["linux"]["uidMappings"] = range.clone();
    spec["linux"]["gidMappings"] = range;
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.context("a list of namespaces")?;
    namespaces.push(json!({ "type": "user" }));
    let root = context.dir.join("rootfs");
    give(&root, "100000:100000")?;
    let shared = shares(context, spec, &["pid", "user"]);
    give(&root, "0:0")?;
    shared
}

/// A container that joins namespaces of the pod's first by their paths.
fn shares(context: &Context, mut spec: Value, kinds: &[&str]) -> Result<()> {
    let pod = context.id("pause");
    let role = |role: &str| json!({ "io.kubernetes.cri.container-type": role, "io.kubernetes.cri.sandbox-id": pod });
    spec["annotations"] = role("sandbox");
    let file = context.dir.join("pause.json");
    fs::write(&file, spec.to_string())?;
    let pause = context.detached_spec(&pod, &file)?;
    fs::remove_file(file)?;
    let tasks = context.ctr(&["task", "ls"])?.ok()?.out();
    let pid = tasks.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(&pod)).then(|| words.next().map(str::to_owned))?
    });
    let pid = pid.with_context(|| format!("no {pod} in {tasks:?}"))?;
    let script = "busybox tr '\\0' ' ' < /proc/1/cmdline; echo $$";
    spec["process"]["args"] = json!(["busybox", "sh", "-c", script]);
    spec["annotations"] = role("container");
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.context("a list of namespaces")? {
        let kind = namespace["type"].as_str().context("a type")?.to_owned();
        if kinds.contains(&kind.as_str()) {
            namespace["path"] = json!(format!("/proc/{pid}/ns/{kind}"));
        }
    }
    let out = run_spec(context, &spec)?.ok()?.out();
    let (first, own) = out.rsplit_once(' ').context("two words")?;
    same(first, "busybox sleep 1000")?;
    if own.parse::<u32>()? < 2 {
        bail!("it is the first process: {out:?}");
    }
    pause.remove()
}
