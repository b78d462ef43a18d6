// SPDX-License-Identifier: Apache-2.0
//! Port-forward: from the host to what listens on a pod's loopback interface.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::image::{pattern, PATTERN_PATH};
use bulkhead_tests::listing::Listing;
use bulkhead_tests::proc::{self, Done};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::json;

use crate::cli::listed;
use crate::context::{same, until, Context};
use crate::pod::{listing, places, Pod, PATIENCE};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![a_pods_ports_are_forwarded, a_forward_ends_with_its_shim];

/// Where containerd has the pods' network namespaces.
const NAMESPACES: &str = "/run/netns";

/// `crictl port-forward`; ends when dropped.
struct Forward {
    child: Child,
    /// The port on the host.
    port: u16,
}

impl Forward {
    fn start(pod: &Pod, port: u16) -> Result<Self> {
        let mut command = pod.cri.command();
        command.args(["port-forward", &pod.id, &format!(":{port}")]);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("run crictl port-forward")?;
        let mut this = Self { child, port: 0 };
        let stdout = this.child.stdout.take().context("its output")?;
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            // It goes on to write a line for every connection.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let line = told.recv_timeout(PATIENCE).context("what it forwards")?;
        // Forwarding from 127.0.0.1:40123 -> 8080
        let number = line
            .split(" -> ")
            .next()
            .and_then(|from| from.rsplit(':').next())
            .and_then(|number| number.parse().ok());
        this.port = number.with_context(|| line.clone())?;
        Ok(this)
    }

    fn get(&self, path: &str) -> Result<Done> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        proc::run(
            Command::new("busybox").args(["wget", "-q", "-O", "-", &url]),
            PATIENCE,
        )
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn namespaces() -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn a_pods_ports_are_forwarded(context: &Context) -> Result<()> {
    let before = namespaces();
    let pod = Pod::run(context, "ports", json!({}))?;
    let namespace = namespaces().difference(&before).next().cloned();
    let script = format!(
        "echo from the pod >/www/page; ln -s {PATTERN_PATH} /www/pattern; \
         httpd -p 127.0.0.1:8080 -h /www; httpd -p '[::1]:8081' -h /www; echo serving; \
         exec nc -ll -p 7000 -e wc -c"
    );
    let server = pod.start("server", &script, json!({}))?;
    pod.logged(&server, "serving")?;

    let forward = Forward::start(&pod, 8080)?;
    same(forward.get("/page")?.ok()?.out(), "from the pod")?;
    let all = forward.get("/pattern")?.ok()?.stdout;
    ensure!(all == pattern(), "a megabyte arrives as {}", all.len());
    thread::scope(|scope| {
        let gets: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| forward.get("/pattern")?.ok()))
            .collect();
        for get in gets {
            let done = get.join().expect("it does not panic")?;
            ensure!(done.stdout == pattern(), "one of eight at a time");
        }
        Ok(())
    })?;
    drop(forward);

    // What listens at IPv6 alone, and where nothing listens.
    let six = Forward::start(&pod, 8081)?;
    same(six.get("/page")?.ok()?.out(), "from the pod").context("at ::1")?;
    drop(six);
    let nothing = Forward::start(&pod, 9)?;
    ensure!(nothing.get("/page")?.code != 0, "a port without a server");
    drop(nothing);

    // containerd closes a connection as a whole; others may close one way.
    let namespace = namespace.context("the pod has no network namespace")?;
    let enter = format!("--net={}", namespace.display());
    let mut client = Command::new("nsenter");
    client.args([&enter, "busybox", "nc", "127.0.0.1", "7000"]);
    let counted = proc::run_with(&mut client, Some(vec![b'x'; 300_000]), PATIENCE)?.ok()?;
    same(counted.out(), "300000")?;

    pod.remove()?;
    until(PATIENCE, "the end of the pod's network", || {
        Ok(!namespaces().contains(&namespace))
    })
}

fn a_forward_ends_with_its_shim(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let cri = context.cri()?;
    // With what stays: the bridge, and directories of all pods.
    Pod::run(context, "cut", json!({}))?.remove()?;
    let before = listing(context, cri);
    let pod = Pod::run(context, "cut", json!({}))?;
    let echo = "echo serving; exec nc -ll -p 7000 -e cat";
    let server = pod.start("server", echo, json!({}))?;
    pod.logged(&server, "serving")?;
    let forward = Forward::start(&pod, 7000)?;
    let mut stream = TcpStream::connect(("127.0.0.1", forward.port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    stream.write_all(b"x")?;
    stream.read_exact(&mut byte).context("before")?;
    same(byte, *b"x")?;

    let pid = listed(context, &pod.id)?["pid"].as_i64();
    let pid = i32::try_from(pid.context("the shim's process id")?)?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    // Closed or reset, whichever crictl makes of it; not silent.
    match stream.read(&mut byte) {
        Ok(0) => {}
        Ok(_) => bail!("it still answers"),
        Err(error) => same(error.kind(), std::io::ErrorKind::ConnectionReset)?,
    }
    drop(forward);
    pod.remove()?;
    let left = Listing::left_since(&before, &places(context, cri), PATIENCE);
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Pod::run(context, "cut", json!({}))?.remove()
}
