// SPDX-License-Identifier: Apache-2.0
//! Pods as a kubelet makes them: crictl to containerd's CRI plugin to Bulkhead.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::listing::Listing;
use serde_json::{json, Value};

use crate::context::{mentions, same, until, Context};
use crate::pod::{listing, places, Pod, PATIENCE};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    a_pod_of_three_containers,
    a_pods_security_contexts,
    a_pods_containers_end_and_start_again,
    the_hosts_network_is_refused,
];

fn a_pod_of_three_containers(context: &Context) -> Result<()> {
    let cri = context.cri()?;
    let pod_config = json!({
        "hostname": "ship",
        "dns_config": {
            "servers": ["10.96.0.10"],
            "searches": ["default.svc.cluster.local", "svc.cluster.local"],
            "options": ["ndots:5"],
        },
        "linux": {
            "sysctls": { "kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "2000 50000" },
            "security_context": { "namespace_options": { "pid": 0 } },
        },
    });
    // With what stays: the bridge, and directories of all pods.
    three_containers(context, "trio", pod_config.clone())?;
    let before = listing(context, cri);
    // Again with the same name.
    let again = Pod::run(context, "trio", pod_config)?;
    let one = again.start("one", "exec sleep 7777", json!({}))?;
    same(again.sh(&one, "hostname")?, "ship")?;
    again.remove()?;
    let left = Listing::left_since(&before, &places(context, cri), Duration::from_secs(20));
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(())
}

fn three_containers(context: &Context, name: &str, pod_config: Value) -> Result<()> {
    let pod = Pod::run(context, name, pod_config)?;
    let volume = pod.dir.join("volume");
    fs::create_dir_all(&volume)?;
    let shared = json!({
        "mounts": [{ "container_path": "/data", "host_path": volume }],
        "linux": { "security_context": { "namespace_options": { "pid": 0 } } },
    });
    let web = "echo from one >/data/page; echo serving; echo to stderr >&2; exec httpd -f -p 8080 -h /data";
    let one = pod.start("one", web, shared.clone())?;
    pod.logged(&one, "serving")?;
    let two = pod.start(
        "two",
        "echo mine >/tmp/mine; exec sleep 7777",
        shared.clone(),
    )?;
    let three = pod.start("three", "exec sleep 8888", shared)?;

    same(pod.sh(&two, "cat /data/page")?, "from one").context("the volume")?;
    same(
        pod.sh(&three, "wget -q -O - http://127.0.0.1:8080/page")?,
        "from one",
    )
    .context("localhost")?;
    let processes = pod.sh(&three, "ps -o args")?;
    for program in ["httpd", "sleep 7777", "sleep 8888"] {
        mentions(&processes, &[program]).context("the pid namespace")?;
    }
    if pod.exec(&three, &["cat", "/tmp/mine"])?.code == 0 {
        bail!("containers share their root file system");
    }
    let dns = "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\noptions ndots:5";
    for container in [&one, &three] {
        let files = pod.sh(container, "hostname; cat /etc/hostname /etc/resolv.conf")?;
        same(files, format!("ship\nship\n{dns}"))?;
    }
    // Shared memory is the pod's, and as large as containerd's own.
    pod.sh(&two, "echo seen >/dev/shm/there")?;
    same(pod.sh(&three, "cat /dev/shm/there")?, "seen").context("shared memory")?;
    let size = pod.sh(&three, "df -k /dev/shm | tail -n 1")?;
    mentions(&size, &[" 65536 "]).context("the size of /dev/shm")?;
    let sysctls = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range";
    same(pod.sh(&two, sysctls)?, "1\n2000\t50000").context("sysctls")?;

    // The pod's address, from the host and from inside.
    let address = pod.address()?;
    mentions(&pod.sh(&two, "ip -4 addr show eth0")?, &[&address])?;
    let page = bulkhead_tests::proc::run(
        std::process::Command::new("busybox").args([
            "wget",
            "-q",
            "-O",
            "-",
            &format!("http://{address}:8080/page"),
        ]),
        PATIENCE,
    )?;
    same(page.ok().context("from the host")?.out(), "from one")?;

    // Exit codes of exec, its two streams, and what is logged.
    let done = pod.exec(&two, &["sh", "-c", "echo out; echo err >&2; exit 9"])?;
    ensure!(done.code != 0, "exec of a failing script succeeds");
    mentions(&done.err(), &["exited with 9: err"])?;
    let logs = pod.logs(&one)?;
    mentions(&logs, &["serving"])?;

    let stats = pod.cri.json(&["stats", "-o", "json", &one])?;
    let stats = &stats["stats"][0];
    let number = |value: &Value| -> u64 {
        let text = value["value"].as_str().unwrap_or_default();
        text.parse().unwrap_or(0)
    };
    ensure!(number(&stats["cpu"]["usageCoreNanoSeconds"]) > 0, "{stats}");
    ensure!(number(&stats["memory"]["workingSetBytes"]) > 0, "{stats}");
    pod.remove()
}

/// The line of /proc/self/status that begins with `name`.
fn status_line(pod: &Pod, container: &str, name: &str) -> Result<String> {
    let line = pod.sh(container, &format!("grep ^{name}: /proc/self/status"))?;
    Ok(line.split_whitespace().nth(1).unwrap_or_default().into())
}

fn a_pods_security_contexts(context: &Context) -> Result<()> {
    let pod = Pod::run(
        context,
        "secure",
        json!({ "linux": { "security_context": { "privileged": true } } }),
    )?;
    let secured = |security: Value| json!({ "linux": { "security_context": security } });
    let idle = "exec sleep 9999";

    let plain = pod.start(
        "plain",
        idle,
        secured(json!({ "seccomp": { "profile_type": 0 } })),
    )?;
    same(status_line(&pod, &plain, "Seccomp")?, "2").context("RuntimeDefault")?;
    let namespaces = pod.exec(&plain, &["unshare", "-U", "true"])?;
    ensure!(
        namespaces.code != 0,
        "the default profile lets unshare through"
    );
    ensure!(
        pod.exec(&plain, &["mount", "-t", "tmpfs", "x", "/tmp"])?
            .code
            != 0,
        "an ordinary container mounts"
    );
    ensure!(
        pod.exec(
            &plain,
            &["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]
        )?
        .code
            != 0,
        "an ordinary container writes sysctls"
    );

    let user = pod.start(
        "user",
        idle,
        secured(json!({
            "run_as_user": { "value": 1000 },
            "run_as_group": { "value": 2000 },
            "supplemental_groups": [3000],
            "readonly_rootfs": true,
            "no_new_privs": true,
            "capabilities": { "drop_capabilities": ["ALL"] },
        })),
    )?;
    let id = pod.sh(&user, "id -u; id -g; id -G")?;
    let lines: Vec<&str> = id.lines().collect();
    same(&lines[..2], &["1000", "2000"][..])?;
    mentions(lines[2], &["3000"])?;
    ensure!(
        pod.exec(&user, &["touch", "/tmp/x"])?.code != 0,
        "the root file system is not read-only"
    );
    same(status_line(&pod, &user, "NoNewPrivs")?, "1")?;
    same(status_line(&pod, &user, "CapBnd")?, "0000000000000000")?;

    let able = pod.start(
        "able",
        idle,
        secured(json!({
            "capabilities": { "add_capabilities": ["NET_ADMIN"], "drop_capabilities": ["CHOWN"] },
        })),
    )?;
    let effective = u64::from_str_radix(&status_line(&pod, &able, "CapEff")?, 16)?;
    same(effective & 1, 0).context("CHOWN")?;
    same(effective >> 12 & 1, 1).context("NET_ADMIN")?;

    let privileged = pod.start("privileged", idle, secured(json!({ "privileged": true })))?;
    pod.sh(
        &privileged,
        "mkdir /tmp/m && mount -t tmpfs x /tmp/m && umount /tmp/m",
    )?;
    pod.sh(&privileged, "echo 1 >/proc/sys/net/ipv4/ip_forward")?;
    same(status_line(&pod, &privileged, "Seccomp")?, "0")?;
    pod.sh(&privileged, "unshare -U true")?;
    if context.only_bulkhead().is_ok() {
        let kernel = pod.sh(&privileged, "uname -r")?;
        ensure!(
            kernel != bulkhead_tests::inside::release()?,
            "privileged on the host's kernel"
        );
        ensure!(
            pod.exec(&privileged, &["test", "-e", "/dev/kvm"])?.code != 0,
            "the host's devices are there"
        );
    }
    pod.remove()
}

fn a_pods_containers_end_and_start_again(context: &Context) -> Result<()> {
    let pod = Pod::run(context, "restarting", json!({}))?;
    let message = pod.dir.join("message");
    fs::write(&message, "")?;
    let with_message = |attempt: u32| {
        json!({
            "metadata": { "attempt": attempt },
            "log_path": format!("worker-{attempt}.log"),
            "mounts": [{ "container_path": "/dev/termination-log", "host_path": message }],
        })
    };
    // A sidecar lives on through all of it.
    let sidecar = pod.start("sidecar", "exec sleep 5555", json!({}))?;
    for attempt in 0..2 {
        let script = format!(
            "echo round {attempt}; echo last words {attempt} >/dev/termination-log; exit 3"
        );
        let worker = pod.start("worker", &script, with_message(attempt))?;
        let status = pod.ended(&worker)?;
        same(&status["exitCode"], &json!(3))?;
        ensure!(status["finishedAt"] != "0001-01-01T00:00:00Z", "{status}");
        pod.logged(&worker, &format!("round {attempt}"))?;
        until(PATIENCE, "the termination message", || {
            Ok(fs::read_to_string(&message)? == format!("last words {attempt}\n"))
        })?;
        pod.cri.crictl(&["rm", &worker])?.ok()?;
    }
    same(pod.sh(&sidecar, "echo still here")?, "still here")?;

    // Stopping: with the signal, and by force when that is ignored.
    let polite = pod.start(
        "polite",
        "trap 'exit 7' TERM; echo up; while :; do sleep 1; done",
        json!({}),
    )?;
    pod.logged(&polite, "up")?;
    pod.cri
        .crictl(&["stop", "--timeout", "60", &polite])?
        .ok()?;
    same(&pod.status(&polite)?["exitCode"], &json!(7))?;
    let stubborn = pod.start(
        "stubborn",
        "trap '' TERM; echo up; while :; do sleep 1; done",
        json!({}),
    )?;
    pod.logged(&stubborn, "up")?;
    pod.cri
        .crictl(&["stop", "--timeout", "1", &stubborn])?
        .ok()?;
    same(&pod.status(&stubborn)?["exitCode"], &json!(137))?;

    // What does not exist is an error that names it.
    let broken = pod
        .create("broken", "", json!({ "command": ["/no/such/program"] }))
        .and_then(|id| pod.cri.crictl(&["start", &id])?.ok().map(|_| ()));
    match broken {
        Ok(()) => bail!("a program that does not exist starts"),
        Err(error) => mentions(&format!("{error:#}"), &["/no/such/program"])?,
    }
    let done = pod.exec(&sidecar, &["/no/such/program"])?;
    ensure!(done.code != 0, "exec of a program that does not exist");
    mentions(&done.err(), &["/no/such/program"])?;
    pod.remove()
}

fn the_hosts_network_is_refused(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let cri = context.cri()?;
    let options = |options: Value| json!({ "linux": { "security_context": { "namespace_options": options } } });
    let pod = Pod::run(context, "hostpid", options(json!({ "pid": 2, "ipc": 2 })))?;
    hosts_namespaces(&pod, options(json!({ "pid": 2, "ipc": 2 })))?;
    pod.remove()?;

    let before = listing(context, cri);
    let file = Pod::configuration(context, "hostnet", options(json!({ "network": 2 })))?;
    let done = cri.crictl(&["runp", "--runtime", cri.handler(), &file.to_string_lossy()])?;
    ensure!(done.code != 0, "a pod on the host's network runs");
    mentions(&done.err(), &["hostNetwork"])?;
    mentions(&done.err(), &["microVM"])?;
    cri.clean()?;
    let left = Listing::left_since(&before, &places(context, cri), Duration::from_secs(20));
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(())
}

/// The host's processes and shared memory are the guest's: all of the pod's,
/// and none of the host's.
fn hosts_namespaces(pod: &Pod, hosts: Value) -> Result<()> {
    let one = pod.start("one", "exec sleep 6661", hosts.clone())?;
    let two = pod.start("two", "exec sleep 6662", hosts)?;
    let processes = pod.sh(&two, "ps -o args")?;
    mentions(&processes, &["sleep 6661"])?;
    ensure!(!processes.contains("containerd"), "{processes}");
    pod.sh(&one, "echo x >/dev/shm/seen")?;
    same(pod.sh(&two, "cat /dev/shm/seen")?, "x")?;
    ensure!(
        !PathBuf::from("/dev/shm/seen").exists(),
        "the host's shared memory"
    );
    Ok(())
}
