// SPDX-License-Identifier: Apache-2.0
//! iperf3 over a pod's network, both ways. The program is in the root file
//! system that `tests/io/build` makes (`make test-io`); without it this is
//! skipped.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{ensure, Context as _, Result};
use bulkhead_tests::proc;
use serde_json::{json, Value};

use crate::context::{same, until, Context, LIMIT};
use crate::disks::programs;
use crate::network::{Net, HOST4};
use crate::programs::{specification, Given};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![iperf_moves_bytes_to_and_from_a_pod];

const PORT: &str = "5301";
/// What is sent each way.
const BYTES: u64 = 8 << 20;

/// iperf3 on the host's side of the network; killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    fn start(root: &Path, log: File) -> Result<Self> {
        let libraries = ["usr/lib", "lib"].map(|place| {
            let place = root.join(place).join("x86_64-linux-gnu");
            place.to_string_lossy().into_owned()
        });
        let server = Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
            .args(["--library-path", &libraries.join(":")])
            .arg(root.join("usr/bin/iperf3"))
            .args(["-s", "-B", HOST4, "-p", PORT])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("run iperf3")?;
        let mut server = Self(server);
        until(LIMIT, "iperf3 to listen", || {
            let ended = server.0.try_wait()?;
            ensure!(ended.is_none(), "iperf3 has ended: {ended:?}");
            Ok(TcpStream::connect(format!("{HOST4}:{PORT}")).is_ok())
        })?;
        Ok(server)
    }
}

fn iperf_moves_bytes_to_and_from_a_pod(context: &Context) -> Result<()> {
    let root = programs()?.join("root");
    let net = Net::make()?;
    let log = context.dir.join("iperf.log");
    let server = Server::start(&root, File::create(&log)?)?;
    for (way, flag) in [("from the pod", None), ("to the pod", Some("--reverse"))] {
        let end = client(context, &root, flag);
        let end = end.with_context(|| fs::read_to_string(&log).unwrap_or_default());
        let end = end.context(way)?;
        let bytes = |side: &str| end[side]["bytes"].as_u64().context("no number");
        let (sent, received) = (bytes("sum_sent")?, bytes("sum_received")?);
        let rate = end["sum_received"]["bits_per_second"].as_f64();
        println!(
            "    {way}: {received} of {sent} bytes, {:.1} Mbit/s",
            rate.unwrap_or_default() / 1e6
        );
        ensure!(sent >= BYTES, "{way}: {sent} bytes sent");
        // What is on its way when the sender ends is not counted.
        ensure!(
            received > BYTES / 2 && received <= sent,
            "{way}: {received} bytes of {sent} received"
        );
    }
    drop((server, net));
    Ok(())
}

/// Runs a client in a container to its good end; what it tells of all of it.
fn client(context: &Context, root: &Path, flag: Option<&str>) -> Result<Value> {
    let mut spec = specification(context, root, &Given::Plain)?;
    let bytes = BYTES.to_string();
    let mut args = vec![
        "/usr/bin/iperf3",
        "-c",
        HOST4,
        "-p",
        PORT,
        "-n",
        &bytes,
        "--json",
    ];
    args.extend(flag);
    spec["process"]["args"] = json!(args);
    spec["root"]["readonly"] = json!(true);
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let mut namespaces = namespaces.context("no namespaces")?.iter_mut();
    let network = namespaces.find(|namespace| namespace["type"] == "network");
    network.context("no network namespace")?["path"] = json!(Net::path(2));
    let file = context.dir.join("iperf.json");
    fs::write(&file, spec.to_string())?;
    let mut command = context
        .containerd
        .run(&context.runtime, &["--rm", "--config"]);
    let done = proc::run(command.arg(&file).arg(context.id("iperf")), LIMIT)?;
    let told: Value = serde_json::from_str(&done.out())
        .with_context(|| format!("{} {} {}", done.code, done.out(), done.err()))?;
    same(done.code, 0).with_context(|| told.to_string())?;
    same(&told["error"], &Value::Null).with_context(|| told.to_string())?;
    Ok(told["end"].clone())
}
