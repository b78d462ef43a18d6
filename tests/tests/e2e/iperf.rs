// SPDX-License-Identifier: Apache-2.0
//! iperf3 over a pod's network and over vsock, both ways. The program is in the root file
//! system that `tests/io/build` makes (`make test-io`); without it this is
//! skipped.

use std::fs::{self, File};
use std::future::{poll_fn, Future};
use std::net::TcpStream;
use std::path::Path;
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::task::Poll;
use std::thread;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::guest::Guest;
use bulkhead_tests::proc::{self, Done};
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Size;
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};
use serde_json::{json, Value};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, UnixStream};

use crate::context::{same, until, Context, LIMIT};
use crate::disks::{begin, plug_programs, programs};
use crate::guest::{end, kill};
use crate::network::{Net, HOST4};
use crate::programs::{specification, Given};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    iperf_moves_bytes_to_and_from_a_pod;
    twice iperf_moves_bytes_over_vsock
];

const PORT: &str = "5301";
/// What is sent each way.
const BYTES: u64 = 8 << 20;

/// iperf3 on this side of the guest.
fn iperf3(root: &Path) -> Command {
    let libraries = ["usr/lib", "lib"].map(|place| {
        let place = root.join(place).join("x86_64-linux-gnu");
        place.to_string_lossy().into_owned()
    });
    let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
    command
        .args(["--library-path", &libraries.join(":")])
        .arg(root.join("usr/bin/iperf3"));
    command
}

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
        let server = iperf3(root)
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
        moved(way, &end)?;
    }
    drop((server, net));
    Ok(())
}

/// What a client tells of its end is what was to be done.
fn moved(way: &str, end: &Value) -> Result<()> {
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
    end_of(&done)
}

/// What a client has told of all of it, when its end was good.
fn end_of(done: &Done) -> Result<Value> {
    let told: Value = serde_json::from_str(&done.out())
        .with_context(|| format!("{} {} {}", done.code, done.out(), done.err()))?;
    same(done.code, 0).with_context(|| told.to_string())?;
    same(&told["error"], &Value::Null).with_context(|| told.to_string())?;
    Ok(told["end"].clone())
}

/// A TCP port of the guest's loopback interface, which its agent reaches.
const GUEST_PORT: u16 = 5302;

/// The server is in the guest; what connects to a port of this side goes through
/// a stream over vsock.
fn iperf_moves_bytes_over_vsock(context: &Context, start: Start) -> Result<()> {
    let root = programs()?.join("root");
    let mut guest = context.guest(start, "iperf-vsock", Size::default())?;
    let programs = plug_programs(&mut guest)?;
    fs::create_dir_all(guest.shared().join("data"))?;
    let serve = format!("exec iperf3 -s -B 127.0.0.1 -p {GUEST_PORT}");
    begin(&guest, "server", &programs, None, &serve)?;
    until(LIMIT, "iperf3 to listen", || {
        Ok(guest.block_on(guest.dial(GUEST_PORT)).is_ok())
    })?;
    let ways = [
        ("from the guest", Some("--reverse")),
        ("to the guest", None),
    ];
    for (way, flag) in ways {
        let done = guest.block_on(forwarded(&guest, |port| {
            let mut command = iperf3(&root);
            let (port, bytes) = (port.to_string(), BYTES.to_string());
            command.args(["-c", "127.0.0.1", "-p", &port, "-n", &bytes, "--json"]);
            // Most of it is not to be on its way when the sender ends.
            command.args(["-w", "64K"]).args(flag);
            command
        }));
        let way = format!("{way} over vsock");
        moved(
            &way,
            &end_of(&done.context("forward")?).context(way.clone())?,
        )?;
    }
    kill(&guest, "server")?;
    same(guest.block_on(end(&guest, "server"))?.exit_status, 137)?;
    guest.delete("server")
}

/// Runs a command that connects to a port of this side, each of whose
/// connections is one to [`GUEST_PORT`] of the guest.
async fn forwarded(guest: &Guest, command: impl FnOnce(u16) -> Command) -> Result<Done> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    // What is connected has the same: not all that is sent is to wait here.
    setsockopt(&listener, RcvBuf, &(64 << 10))?;
    let mut command = command(listener.local_addr()?.port());
    let (said, mut hears) = UnixStream::pair()?;
    let said = said.into_std()?;
    let runs = thread::spawn(move || {
        let done = proc::run(&mut command, LIMIT);
        drop(said);
        done
    });
    let forward = async {
        loop {
            let (mut ours, _) = listener.accept().await?;
            let mut theirs = guest.dial(GUEST_PORT).await?;
            tokio::spawn(async move {
                // One that breaks shows at the client.
                let _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
            });
        }
    };
    let mut byte = [0];
    let mut ended = pin!(hears.read(&mut byte));
    let mut forward = pin!(forward);
    poll_fn(|cx| {
        if ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let failed: Poll<Result<()>> = forward.as_mut().poll(cx);
        failed
    })
    .await?;
    match runs.join() {
        Ok(done) => done,
        Err(_) => bail!("the thread that waits for iperf3 has panicked"),
    }
}
