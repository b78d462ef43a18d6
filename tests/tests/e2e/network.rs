// SPDX-License-Identifier: Apache-2.0
//! Pods on a bridge: to each other and to the host's side.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::{listing, proc};

use crate::context::{mentions, same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![no_network_without_a_namespace, two_pods_and_the_host_talk,];

const BRIDGE: &str = "bh-e2e0";
/// The host's address on the bridge.
pub const HOST4: &str = "10.199.7.1";
const HOST6: &str = "fd00:bead::1";

fn no_network_without_a_namespace(context: &Context) -> Result<()> {
    let out = context
        .sh("ls /sys/class/net; ip -4 route; ip addr show lo | head -n1")?
        .ok()?
        .out();
    same(out.lines().next().unwrap_or_default(), "lo")?;
    same(out.lines().count(), 2).with_context(|| out.clone())?;
    mentions(&out, &["LOOPBACK"])
}

/// Runs ip with these words; what it tells.
pub fn ip(args: &str) -> Result<String> {
    let done = proc::run(
        Command::new("ip").args(args.split(' ')),
        Duration::from_secs(30),
    )?;
    Ok(done.ok().with_context(|| format!("ip {args}"))?.out())
}

/// A bridge and two network namespaces on it, as a network plugin makes them.
pub struct Net;

impl Net {
    /// Makes them; they go when this is dropped.
    pub fn make() -> Result<Self> {
        Self::remove();
        ip(&format!("link add {BRIDGE} type bridge"))?;
        let net = Self;
        ip(&format!("addr add {HOST4}/24 dev {BRIDGE}"))?;
        ip(&format!("addr add {HOST6}/64 dev {BRIDGE} nodad"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        for n in [2, 3] {
            let (ns, host, pod) = (Self::ns(n), format!("bhv{n}"), format!("bhp{n}"));
            ip(&format!("netns add {ns}"))?;
            ip(&format!("link add {host} type veth peer name {pod}"))?;
            ip(&format!("link set {pod} netns {ns} name eth0"))?;
            ip(&format!("link set {host} master {BRIDGE} up"))?;
            ip(&format!("-n {ns} link set lo up"))?;
            ip(&format!("-n {ns} link set eth0 up"))?;
            ip(&format!("-n {ns} addr add 10.199.7.{n}/24 dev eth0"))?;
            ip(&format!(
                "-n {ns} addr add fd00:bead::{n}/64 dev eth0 nodad"
            ))?;
            ip(&format!("-n {ns} route add default via {HOST4}"))?;
            ip(&format!("-n {ns} -6 route add default via {HOST6}"))?;
        }
        Ok(net)
    }

    fn ns(n: u32) -> String {
        format!("bh-e2e-{n}")
    }

    fn flag(n: u32) -> String {
        format!("network:{}", Self::path(n))
    }

    /// Where one of the namespaces is, 2 or 3.
    pub fn path(n: u32) -> String {
        format!("/var/run/netns/{}", Self::ns(n))
    }

    fn remove() {
        // What is not there need not be removed.
        for n in [2, 3] {
            let _ = ip(&format!("netns del {}", Self::ns(n)));
            let _ = ip(&format!("link del bhv{n}"));
        }
        let _ = ip(&format!("link del {BRIDGE}"));
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        Self::remove();
    }
}

/// Answers one line per connection with the peer's address and the line.
pub fn echo_server(address: SocketAddr) -> Result<u16> {
    let listener = TcpListener::bind(address).context("listen on the bridge")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = || -> std::io::Result<()> {
                let mut stream = stream?;
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes)?;
                let peer = stream.peer_addr()?.ip();
                write!(stream, "{peer} sent {} bytes", bytes.len())
            };
            // A connection that breaks shows at its other end.
            let _ = answer();
        }
    });
    Ok(port)
}

fn two_pods_and_the_host_talk(context: &Context) -> Result<()> {
    if bulkhead_tests::install::which("ip").is_none() {
        bail!("ip is missing (package iproute2)");
    }
    let net = Net::make()?;
    let namespaces = |n| {
        let ns = Net::ns(n);
        let links = ip(&format!("-n {ns} -o link"))?;
        let filters = ip(&format!("netns exec {ns} tc qdisc"))?;
        Ok::<_, anyhow::Error>((links.lines().count(), filters.contains("ingress")))
    };
    let pristine = namespaces(2)?;
    let port4 = echo_server(SocketAddr::new(HOST4.parse()?, 0))?;
    let port6 = echo_server(SocketAddr::new(HOST6.parse::<Ipv6Addr>()?.into(), 0))?;

    let (two, three) = (Net::flag(2), Net::flag(3));
    let server = context.detached(
        &["--with-ns", &two],
        &[
            "sh",
            "-c",
            "mkdir /www; cp /pattern /www; exec httpd -f -p 8080 -h /www",
        ],
    )?;
    until(LIMIT, "the server to listen", || {
        Ok(server
            .exec(&["wget", "-qO", "/dev/null", "http://127.0.0.1:8080/pattern"])?
            .code
            == 0)
    })?;
    let address = server
        .exec(&["ip", "-o", "addr", "show", "eth0"])?
        .ok()?
        .out();
    for want in ["10.199.7.2/24", "fd00:bead::2/64"] {
        mentions(&address, &[want])?;
    }
    let mac = ip(&format!("-n {} -o link show eth0", Net::ns(2)))?;
    let mac = mac
        .split("link/ether ")
        .nth(1)
        .and_then(|r| r.split(' ').next());
    let mac = mac.context("the namespace's eth0 has no address")?;
    mentions(
        &server.exec(&["cat", "/sys/class/net/eth0/address"])?.out(),
        &[mac],
    )?;

    let script = format!(
        "set -e; ping -c 2 -W 5 10.199.7.2 | tail -n 2 | head -n 1; \
         ping -c 2 -W 5 {HOST4} | tail -n 2 | head -n 1; \
         ping -6 -c 2 -W 5 fd00:bead::2 | tail -n 2 | head -n 1; \
         wget -qO- http://10.199.7.2:8080/pattern | cmp - /pattern && echo v4 same; \
         wget -qO- 'http://[fd00:bead::2]:8080/pattern' | cmp - /pattern && echo v6 same; \
         head -c 500000 /pattern | nc {HOST4} {port4}; echo; \
         head -c 500000 /pattern | nc {HOST6} {port6}; echo; \
         ip route; ip -6 route | grep default"
    );
    let done = context.run(&["--with-ns", &three], &["sh", "-c", &script])?;
    let (out, err) = (done.out(), done.err());
    same(done.code, 0).with_context(|| format!("{out} {err}"))?;
    same(
        out.matches("2 packets received").count() + out.matches("2 received").count(),
        3,
    )
    .with_context(|| out.clone())?;
    for want in [
        "v4 same",
        "v6 same",
        "10.199.7.3 sent 500000 bytes",
        "fd00:bead::3 sent 500000 bytes",
        "default via 10.199.7.1",
        "default via fd00:bead::1",
    ] {
        mentions(&out, &[want])?;
    }
    // The host's side reaches the pod.
    let mut stream =
        std::net::TcpStream::connect_timeout(&"10.199.7.2:8080".parse()?, Duration::from_secs(20))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /pattern HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if !answer.ends_with(&bulkhead_tests::image::pattern()) {
        bail!("{} bytes from the pod's server", answer.len());
    }
    server.remove()?;
    // The namespaces are as they were: no tap, no redirection.
    until(LIMIT, "the namespaces to be as before", || {
        Ok(namespaces(2)? == pristine && namespaces(3)? == pristine)
    })?;
    drop(net);
    let left = listing::mounts();
    same(left.iter().filter(|m| m.contains("bh-e2e-")).count(), 0)
}
