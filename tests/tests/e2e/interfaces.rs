// SPDX-License-Identifier: Apache-2.0
//! Interfaces of a guest on a tap of the host: their limits, several queues,
//! and packets that the host's kernel moves.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::{agent, SHARED_TAG};
use bulkhead_tests::listing::by_program;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::{Size, Vmm};
use bulkhead_tests::{proc, sys};
use bulkhead_vmm_api::{Call, DeviceMetrics, NetConfig, Outcome, PlugConfig, Rate, RateLimits};

use crate::cli::with_config;
use crate::context::{mentions, same, until, Context, LIMIT};
use crate::network::{echo_server, Net, HOST4};
use crate::plugged::Guest;
use crate::resize;
use crate::runner::{tests, Test};
use crate::vmm::Host;

pub const TESTS: &[Test] = tests![
    an_interface_keeps_to_its_limits,
    a_guest_uses_several_queues,
    the_kernel_moves_a_guests_packets,
    interfaces_are_saved_and_restored,
    a_pods_packets_are_moved_by_the_kernel_where_that_is_set,
];

const TAP: &str = "bh-if0";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 8];
/// The host's end, and the guest's.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 2);
/// A port where nobody listens: who asks is told so.
const NOBODY: u16 = 9;

/// What a test is about.
#[derive(Clone, Copy, Default)]
struct Kind {
    queues: usize,
    vhost: bool,
    transmit: Option<RateLimits>,
    receive: Option<RateLimits>,
}

impl Kind {
    /// The interface, and its descriptors, the first of which has that index.
    fn make(self, first: u32) -> Result<(NetConfig, Vec<OwnedFd>)> {
        let mut fds = match self.queues {
            0 | 1 => vec![sys::open_tap(TAP).context("open a tap")?],
            queues => sys::open_tap_queues(TAP, queues).context("open a tap")?,
        };
        proc::set_up_interface(TAP, &format!("{HOST}/24"), LIMIT)?;
        let end = first + fds.len() as u32;
        if self.vhost {
            let vhost = File::options()
                .read(true)
                .write(true)
                .open("/dev/vhost-net");
            fds.push(vhost.context("open /dev/vhost-net")?.into());
        }
        let config = NetConfig {
            id: TAP.into(),
            tap: first,
            more_queues: (first + 1..end).collect(),
            mac: MAC,
            transmit_rate: self.transmit,
            receive_rate: self.receive,
            vhost: self.vhost.then_some(end),
            ..NetConfig::default()
        };
        Ok((config, fds))
    }

    /// Plugs it, and gives it its address; its slot.
    fn plug(self, guest: &mut Guest) -> Result<u8> {
        let (config, fds) = self.make(0)?;
        let plugged = guest
            .vmm
            .call(Call::Plug(Box::new(PlugConfig::Net(config))), &fds)?;
        let Outcome::Plugged(device) = plugged else {
            bail!("no slot: {plugged:?}");
        };
        let network = agent::Network {
            interfaces: vec![agent::Interface {
                mac: MAC.to_vec(),
                name: "eth0".into(),
                mtu: 1500,
                addresses: vec![agent::IpAddress {
                    address: GUEST.octets().to_vec(),
                    prefix_len: 24,
                    ..Default::default()
                }],
                ..Default::default()
            }],
            ..Default::default()
        };
        let added = guest.agent.add_network(network);
        guest
            .runtime
            .block_on(added)
            .with_context(|| guest.host.console())?;
        Ok(device.slot)
    }
}

/// A guest that may get more processors and memory.
fn grows(context: &Context, name: &str, extra_vcpus: u8, extra_mib: u32) -> Result<Guest> {
    let size = Size {
        extra_vcpus,
        extra_mib,
        ..Size::default()
    };
    Guest::up_sized(context, Start::Cold, name, SHARED_TAG, size)
}

fn metrics(vmm: &mut Vmm, slot: u8) -> Result<DeviceMetrics> {
    let devices = vmm.status()?.devices;
    let device = devices.iter().find(|device| device.slot == slot);
    Ok(device.context("it is gone")?.metrics)
}

/// The guest's kernel tells that nobody listens there: a packet each way.
fn answers() -> Result<()> {
    let address = SocketAddr::new(GUEST.into(), NOBODY);
    until(
        LIMIT,
        "the guest's answer",
        || match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
            Err(_) => Ok(false),
            Ok(_) => bail!("somebody listens"),
        },
    )
}

/// Content that tells its place.
fn pattern(size: usize) -> Vec<u8> {
    let words = (0..size / 4).map(|word| (word as u32).wrapping_mul(0x85eb_ca6b));
    words.flat_map(u32::to_le_bytes).collect()
}

/// What moving something took.
struct Took {
    to_guest: Duration,
    from_guest: Duration,
}

/// Sends so many bytes to the guest and has them back.
fn there_and_back(guest: &Guest, id: &str, size: usize) -> Result<Took> {
    let listen = || TcpListener::bind((HOST, 0)).context("listen on the tap");
    let (to, from) = (listen()?, listen()?);
    let port = |listener: &TcpListener| Ok::<_, anyhow::Error>(listener.local_addr()?.port());
    let script = format!(
        "busybox nc {HOST} {} < /dev/null > /dev/data; busybox nc {HOST} {} < /dev/data",
        port(&to)?,
        port(&from)?
    );
    let server = thread::spawn(move || {
        let mut stream = to.accept()?.0;
        let begin = Instant::now();
        stream.write_all(&pattern(size))?;
        stream.shutdown(Shutdown::Write)?;
        // Its other direction has ended long before. The guest goes on once it has
        // all.
        stream.read_to_end(&mut Vec::new())?;
        drop(stream);
        let mut stream = from.accept()?.0;
        let to_guest = begin.elapsed();
        let begin = Instant::now();
        let mut back = Vec::new();
        stream.read_to_end(&mut back)?;
        let took = Took {
            to_guest,
            from_guest: begin.elapsed(),
        };
        anyhow::Ok((took, back))
    });
    guest
        .run(id, None, &script)
        .with_context(|| guest.host.console())?;
    let Ok(served) = server.join() else {
        bail!("the host's end has panicked");
    };
    let (took, back) = served?;
    ensure!(
        back == pattern(size),
        "{} bytes came back, others than were sent",
        back.len()
    );
    Ok(took)
}

fn an_interface_keeps_to_its_limits(context: &Context) -> Result<()> {
    const SIZE: usize = 2 << 20;
    let rate = Rate {
        per_second: 512 << 10,
        burst: 64 << 10,
    };
    let limits = Some(RateLimits {
        bytes: Some(rate),
        operations: None,
    });
    // Of the last packet one byte is enough.
    let least = (SIZE as u64 - rate.burst - (64 << 10)) as f64 / rate.per_second as f64;
    let mut guest = Guest::up(context, Start::Cold, "if-limits")?;
    for (id, transmit, receive) in [("out", limits, None), ("in", None, limits)] {
        let kind = Kind {
            transmit,
            receive,
            ..Kind::default()
        };
        let slot = kind.plug(&mut guest)?;
        let took = there_and_back(&guest, id, SIZE)?;
        let metrics = metrics(&mut guest.vmm, slot)?;
        guest.take_out(slot)?;
        let [limited, free] = match transmit {
            Some(_) => [took.from_guest, took.to_guest],
            None => [took.to_guest, took.from_guest],
        };
        println!(
            "    {id}: {:.1} s with a limit that lets it be done in {least:.1}, {:.1} s the other way without; {} have waited",
            limited.as_secs_f64(),
            free.as_secs_f64(),
            metrics.throttled
        );
        ensure!(limited.as_secs_f64() >= least, "{id}: too soon");
        ensure!(metrics.throttled > 0, "nothing has waited: {metrics:?}");
    }
    guest.stop()
}

fn a_guest_uses_several_queues(context: &Context) -> Result<()> {
    let mut guest = grows(context, "if-queues", 1, 0)?;
    let kind = Kind {
        queues: 2,
        ..Kind::default()
    };
    // With one processor it uses one pair, with two two.
    for count in [1, 2] {
        let request = agent::OnlineCpusRequest {
            count,
            ..Default::default()
        };
        guest.runtime.block_on(guest.agent.online_cpus(request))?;
        let slot = kind.plug(&mut guest)?;
        let id = format!("queues{count}");
        guest.run(&id, None, "busybox ls /sys/class/net/eth0/queues > /queues")?;
        let queues = guest.left(&id, "queues");
        same(queues.matches("rx-").count(), count as usize).context(queues.clone())?;
        // Each comes by a queue that its port says.
        for _ in 0..16 {
            answers().with_context(|| guest.host.console())?;
        }
        let took = there_and_back(&guest, &format!("moves{count}"), 2 << 20)?;
        println!(
            "    {count} pairs: {:.1} s there, {:.1} s back",
            took.to_guest.as_secs_f64(),
            took.from_guest.as_secs_f64()
        );
        guest.take_out(slot)?;
    }
    guest.stop()
}

fn the_kernel_moves_a_guests_packets(context: &Context) -> Result<()> {
    const SIZE: usize = 4 << 20;
    let mut guest = grows(context, "if-vhost", 0, 256)?;
    let ours = Kind::default().plug(&mut guest)?;
    let took = there_and_back(&guest, "ours", SIZE)?;
    guest.take_out(ours)?;
    let kind = Kind {
        vhost: true,
        ..Kind::default()
    };
    let slot = kind.plug(&mut guest)?;
    let by_kernel = there_and_back(&guest, "vhost", SIZE)?;
    for (who, took) in [("the VMM", took), ("the kernel", by_kernel)] {
        println!(
            "    {who}: {:.1} s there, {:.1} s back",
            took.to_guest.as_secs_f64(),
            took.from_guest.as_secs_f64()
        );
    }
    let metrics = metrics(&mut guest.vmm, slot)?;
    same(
        (metrics.requests, metrics.bytes_from_guest, metrics.errors),
        (0, 0, 0),
    )?;
    ensure!(metrics.interrupts > 0, "{metrics:?}");
    // Memory that comes and goes, and a rest.
    for mib in [256, 0] {
        let console = guest.host.console();
        resize::ask(&mut guest.vmm, mib, || console.clone())?;
        there_and_back(&guest, &format!("memory{mib}"), SIZE / 4)?;
    }
    guest.vmm.call(Call::Pause, &[])?;
    guest.vmm.call(Call::Resume, &[])?;
    there_and_back(&guest, "paused", SIZE / 4)?;
    guest.take_out(slot)?;
    let slot = kind.plug(&mut guest)?;
    there_and_back(&guest, "again", SIZE / 4)?;
    guest.take_out(slot)?;
    guest.stop()
}

fn interfaces_are_saved_and_restored(context: &Context) -> Result<()> {
    let several = Kind {
        queues: 2,
        ..Kind::default()
    };
    let vhost = Kind {
        vhost: true,
        ..Kind::default()
    };
    // By whom packets are moved before, and after.
    for (name, before, after) in [
        ("several", several, several),
        ("vhost", vhost, vhost),
        ("to-vhost", Kind::default(), vhost),
        ("from-vhost", vhost, Kind::default()),
    ] {
        restored(context, name, before, after).with_context(|| name.to_owned())?;
    }
    Ok(())
}

fn restored(context: &Context, name: &str, before: Kind, after: Kind) -> Result<()> {
    let mut guest = Guest::up_with(context, Start::Cold, &format!("if-saved-{name}"), "")?;
    before.plug(&mut guest)?;
    answers().with_context(|| guest.host.console())?;
    let dir = guest.host.dir.clone();
    let (state, memory) = (dir.join("state"), dir.join("memory"));
    guest.vmm.snapshot(&state, &memory)?;
    // It goes on as if nothing had been.
    guest.vmm.call(Call::Resume, &[])?;
    for _ in 0..4 {
        answers().with_context(|| guest.host.console())?;
    }
    drop(guest);

    let host = Host::new(context, &format!("if-clone-{name}"))?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    let mut made = Ok(());
    vmm.clone_with(
        &state,
        &memory,
        &context.products,
        &host.dir,
        |devices, fds| {
            made = after.make(fds.len() as u32).map(|(config, more)| {
                devices.net.push(config);
                fds.extend(more);
            });
        },
    )?;
    made?;
    vmm.wait_clone().with_context(|| host.console())?;
    for _ in 0..4 {
        answers().with_context(|| host.console())?;
    }
    drop(vmm);
    std::fs::remove_file(memory)?;
    Ok(())
}

fn a_pods_packets_are_moved_by_the_kernel_where_that_is_set(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let toml = context.config.toml();
    let config = toml.replacen("[hypervisor]\n", "[hypervisor]\nvhost_net = true\n", 1);
    with_config(context, &config, || pod_by_kernel(context))
}

/// Processes of that program that have vhost-net open.
fn with_vhost(program: &str) -> Result<usize> {
    let mut count = 0;
    for process in by_program(program) {
        for fd in std::fs::read_dir(format!("/proc/{}/fd", process.pid))? {
            // One that is gone is not it.
            let path = std::fs::read_link(fd?.path()).unwrap_or_default();
            count += usize::from(path == std::path::Path::new("/dev/vhost-net"));
        }
    }
    Ok(count)
}

fn pod_by_kernel(context: &Context) -> Result<()> {
    let net = Net::make()?;
    let port = echo_server(SocketAddr::new(HOST4.parse()?, 0))?;
    let flag = format!("network:{}", Net::path(2));
    let pod = context.detached(&["--with-ns", &flag], &["sleep", "100000"])?;
    // The front end has passed it on.
    same(with_vhost("bulkhead-vmm")?, 1)?;
    same(with_vhost("containerd-shim-bulkhead-v2")?, 0)?;
    let script = format!("ping -c 2 -W 5 {HOST4} && head -c 500000 /pattern | nc {HOST4} {port}");
    let said = pod.exec(&["sh", "-c", &script])?.ok()?.out();
    mentions(&said, &["10.199.7.2 sent 500000 bytes"])?;
    pod.remove()?;
    drop(net);
    Ok(())
}
