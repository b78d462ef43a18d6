// SPDX-License-Identifier: Apache-2.0
//! Connections between guest and host: their bytes, and very many of them.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{symlink, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::oci;
use bulkhead_tests::boxed::hot::with_libraries;
use bulkhead_tests::guest::{specification, Guest};
use bulkhead_tests::install::which;
use bulkhead_tests::start::Start;
use nix::sys::socket::{setsockopt, shutdown, sockopt::ReceiveTimeout, Shutdown};
use nix::sys::time::TimeVal;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::context::{same, until, Context, LIMIT};
use crate::guest::{guest, process, ROOT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice     vsock_carries_bytes_both_ways_at_once,
    a_thousand_vsock_connections_leave_nothing
];

/// A port of the host.
const PORT: u32 = 6000;
/// A TCP port of the guest's.
const TCP_PORT: u16 = 7000;
const CONNECTIONS: u32 = 1000;

/// Blocks of numbers that tell their places, 64 KiB each.
const BLOCK: usize = 64 << 10;
const BLOCKS: usize = 96;
/// What the host sends begins with another number.
const HOST_FIRST: u64 = 1 << 40;

/// How perl reaches a port of the host (vsock(7)).
const CONNECT: &str = "sub dial { socket(S, 40, 1, 0) or die qq(socket: $!); \
    connect(S, pack('SSLLx4', 40, 0, $_[0], 2)) or die qq(connect: $!) } ";

/// Sends its numbers, and meanwhile compares what comes.
const EXCHANGE: &str = "($port, $blocks, $first) = @ARGV; dial($port); \
    sub block { my $at = $_[0] * 8192 + $_[1]; pack('Q<*', $at .. $at + 8191) } \
    if (!fork) { \
        for $n (0 .. $blocks - 1) { \
            my $b = block($n, 0); my $o = 0; \
            while ($o < 65536) { $w = syswrite(S, $b, 65536 - $o, $o) or die qq(write: $!); $o += $w } \
        } \
        shutdown(S, 1) or die; exit 0; \
    } \
    for $n (0 .. $blocks - 1) { \
        my $b = ''; \
        while (length $b < 65536) { \
            sysread(S, $b, 65536 - length $b, length $b) or die qq(block $n ends early: $!); \
        } \
        $b eq block($n, $first) or die qq(block $n is another); \
    } \
    sysread(S, $b, 1) == 0 or die 'more than was sent'; \
    wait; exit($? >> 8);";

/// One connection after the other: a number, and the next one back.
const KNOCK: &str = "($port, $count) = @ARGV; \
    for $n (1 .. $count) { \
        dial($port); \
        syswrite(S, pack('N', $n)) == 4 or die qq(write $n: $!); \
        sysread(S, $b, 4) == 4 && unpack('N', $b) == $n + 1 or die qq(no answer to $n: $!); \
        close(S) or die; \
    } \
    print qq($count answered);";

/// The same, answered at a TCP port.
const ANSWER: &str = "socket(L, 2, 1, 0) && setsockopt(L, 1, 2, 1) or die; \
    bind(L, pack('SnCCCCx8', 2, $ARGV[0], 127, 0, 0, 1)) && listen(L, 16) or die qq(listen: $!); \
    while (accept(S, L)) { \
        sysread(S, $b, 4) == 4 and syswrite(S, pack('N', unpack('N', $b) + 1)); \
        close(S); \
    }";

/// A guest whose containers have perl of this machine.
pub fn guest_with_perl(context: &Context, start: Start, name: &str) -> Result<Guest> {
    let guest = guest(context, start, name, 256)?;
    add_perl(&guest)?;
    Ok(guest)
}

/// Adds it to a root file system.
pub fn add_perl(guest: &Guest) -> Result<()> {
    let root = guest.shared().join(ROOT);
    fs::create_dir_all(root.join("perl"))?;
    let perl = which("perl").context("perl is missing (package perl-base)")?;
    for file in with_libraries(&perl)? {
        let name = file.file_name().context("a library without a name")?;
        fs::copy(&file, root.join("perl").join(name))?;
    }
    for name in ["ls", "wc"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    Ok(())
}

/// A script in perl, and what it is given.
pub fn perl<'a>(script: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    let loader = ["/perl/ld-linux-x86-64.so.2", "--library-path", "/perl"];
    [&loader[..], &["/perl/perl", "-e", script], arguments].concat()
}

/// A container that sees all processes of the guest.
pub fn open_spec(id: &str, args: &[&str]) -> Result<oci::Spec> {
    let config = json!({
        "ociVersion": "1.1.0",
        "process": { "args": args, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "rootfs" },
        "mounts": [{ "type": "proc", "source": "proc", "destination": "/proc" }],
        "linux": { "namespaces": [{ "type": "mount" }] },
    });
    specification(&config, id, ROOT)
}

/// Listens where the guest's connections to a port go.
fn listen(guest: &Guest, port: u32) -> Result<UnixListener> {
    let path = guest.port(port);
    let listener = UnixListener::bind(&path).context("listen for the guest")?;
    // The VMM is a user of its own.
    fs::set_permissions(&path, Permissions::from_mode(0o666))?;
    Ok(listener)
}

fn block(number: usize, first: u64) -> Vec<u8> {
    let words = (BLOCK / 8) as u64;
    let begin = number as u64 * words + first;
    let mut bytes = Vec::with_capacity(BLOCK);
    for word in begin..begin + words {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The host's side of [`EXCHANGE`], at a stream's end.
fn exchange(stream: OwnedFd) -> Result<()> {
    let patience = TimeVal::new(LIMIT.as_secs().try_into()?, 0);
    setsockopt(&stream, ReceiveTimeout, &patience)?;
    let mut writer = File::from(stream.try_clone()?);
    let sends: JoinHandle<Result<()>> = thread::spawn(move || {
        for number in 0..BLOCKS {
            writer.write_all(&block(number, HOST_FIRST))?;
        }
        Ok(shutdown(writer.as_raw_fd(), Shutdown::Write)?)
    });
    let mut reader = File::from(stream);
    let mut got = vec![0; BLOCK];
    for number in 0..BLOCKS {
        reader
            .read_exact(&mut got)
            .with_context(|| format!("block {number}"))?;
        ensure!(got == block(number, 0), "block {number} is another");
    }
    same(reader.read(&mut got)?, 0).context("more than was sent")?;
    match sends.join() {
        Ok(sent) => sent.context("the way to the guest"),
        Err(_) => bail!("the thread that sends has panicked"),
    }
}

fn vsock_carries_bytes_both_ways_at_once(context: &Context, start: Start) -> Result<()> {
    let guest = guest_with_perl(context, start, "vsock-bulk")?;
    let listener = listen(&guest, PORT)?;
    both_ways(&guest, CONNECT, PORT, move || {
        Ok(listener.accept()?.0.into())
    })
}

/// Exchanges bytes with a guest that has perl: it connects as `connect` says to
/// a port, and `accept` gives the host's end.
pub fn both_ways(
    guest: &Guest,
    connect: &str,
    port: u32,
    accept: impl FnOnce() -> io::Result<OwnedFd> + Send + 'static,
) -> Result<()> {
    let host = thread::spawn(move || exchange(accept()?));
    let script = format!("{connect}{EXCHANGE}");
    let numbers = [port.to_string(), BLOCKS.to_string(), HOST_FIRST.to_string()];
    let arguments = numbers.each_ref().map(String::as_str);
    let spec = open_spec("exchange", &perl(&script, &arguments))?;
    let (_, done) = guest.run("exchange", spec)?;
    done.ok().context("in the guest")?;
    match host.join() {
        Ok(outcome) => outcome.context("on the host"),
        Err(_) => bail!("the host's side has panicked"),
    }
}

/// Answers each of so many connections, to its end.
fn answer(listener: &UnixListener, count: u32) -> Result<()> {
    for number in 1..=count {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes)?;
        same(u32::from_be_bytes(bytes), number)?;
        stream.write_all(&(number + 1).to_be_bytes())?;
        same(stream.read(&mut bytes)?, 0)?;
    }
    Ok(())
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// How many the agent has, which is the guest's first process.
fn of_the_agent(guest: &Guest, exec_id: &str) -> Result<usize> {
    let count = process(&["sh", "-c", "ls /proc/1/fd | wc -l"])?;
    let out = guest.exec("open", exec_id, count)?.1.ok()?;
    // The agent has a descriptor of it until then.
    guest.forget("open", exec_id)?;
    let text = String::from_utf8(out)?;
    text.trim().parse().with_context(|| text.clone())
}

/// One stream by way of the agent.
async fn knock(guest: &Guest, number: u32) -> Result<()> {
    let mut stream = guest.dial(TCP_PORT).await?;
    stream.write_all(&number.to_be_bytes()).await?;
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).await?;
    same(u32::from_be_bytes(bytes), number + 1)?;
    same(stream.read(&mut bytes).await?, 0)
}

fn a_thousand_vsock_connections_leave_nothing(context: &Context, start: Start) -> Result<()> {
    let guest = guest_with_perl(context, start, "vsock-many")?;
    let port = TCP_PORT.to_string();
    guest.create("open", open_spec("open", &perl(ANSWER, &[&port]))?)?;
    guest.start("open")?;
    // What is opened with the first.
    until(LIMIT, "the first answer", || {
        Ok(guest.block_on(knock(&guest, 0)).is_ok())
    })?;
    of_the_agent(&guest, "first")?;
    let agent = of_the_agent(&guest, "before")?;
    let vmm = descriptors(guest.vmm_pid())?;

    let listener = listen(&guest, PORT)?;
    let host = thread::spawn(move || answer(&listener, CONNECTIONS));
    let script = format!("{CONNECT}{KNOCK}");
    let numbers = [PORT.to_string(), CONNECTIONS.to_string()];
    let arguments = numbers.each_ref().map(String::as_str);
    let spec = open_spec("knock", &perl(&script, &arguments))?;
    let told = guest.run("knock", spec)?.1.ok().context("in the guest")?;
    same(String::from_utf8(told)?, format!("{CONNECTIONS} answered"))?;
    match host.join() {
        Ok(outcome) => outcome.context("on the host")?,
        Err(_) => bail!("the host's side has panicked"),
    }
    guest.delete("knock")?;

    for number in 1..=CONNECTIONS {
        let outcome = guest.block_on(knock(&guest, number));
        outcome.with_context(|| format!("stream {number}"))?;
    }
    let mut now = (0, 0);
    let mut round = 0;
    let back = until(LIMIT, "the descriptors to be as many as before", || {
        round += 1;
        now = (
            descriptors(guest.vmm_pid())?,
            of_the_agent(&guest, &format!("after-{round}"))?,
        );
        Ok(now == (vmm, agent))
    });
    back.with_context(|| format!("VMM and agent had {:?}, and have {now:?}", (vmm, agent)))
}
