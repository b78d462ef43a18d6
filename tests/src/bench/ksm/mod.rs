// SPDX-License-Identifier: Apache-2.0
//! How soon a burst of identical pods is merged, and what that takes of the
//! processor: steered by the daemon, by nobody, and as Kata Containers does it.

mod course;
pub mod policy;

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_ksm_throttler::ksmd::Ksmd;
use bulkhead_ksm_throttler::meter::Figure as KernelFigure;

use self::course::{Course, Recorder};
use self::policy::{reset, Daemon, Policy};
use super::{progress, Bench, Figure, LIMIT};
use crate::vmm::{agent_socket, Vmm};

/// Pods in a burst.
const PODS: usize = 16;
/// How long the daemon and the kernel's defaults are watched, from the kick on,
/// in seconds.
const LONG: f64 = 1200.0;
/// How long Kata's table is watched: with it ksmd takes a whole processor for
/// the first half minute and nearly half of it for two more minutes.
const SHORT: f64 = 30.0;
/// How long the daemon is watched idle.
const IDLE: Duration = Duration::from_secs(30);

/// `ksm-page-seconds`, `ksm-cpu`, each beside both peers, and `ksm-idle-cpu`.
///
/// # Errors
/// When a guest does not come up, or this kernel has no KSM.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    reset()?;
    let daemon = Daemon::start(&bench.products, &bench.dir.join("ksm"))?;
    let mut idle = None;
    let ours = burst(bench, "ours", Policy::Ours(daemon), LONG, &mut |policy| {
        idle = Some(idle_share(policy)?);
        Ok(())
    })?;
    let kernel = burst(bench, "kernel", Policy::Kernel, LONG, &mut |_| Ok(()))?;
    let kata = burst(bench, "kata", Policy::Kata(None), SHORT, &mut |_| Ok(()))?;
    reset()?;

    // What there is to be saved is what was saved at best.
    let most = ours.most().max(kernel.most()).max(kata.most());
    let mut figures = Vec::new();
    for (peer, course, until) in [("kernel", &kernel, LONG), ("kata", &kata, SHORT)] {
        let suffix = if peer == "kernel" { "" } else { "-kata" };
        let named = match peer {
            "kernel" => "the kernel's defaults, 100 pages and 20 ms of sleep",
            _ => "Kata's table replayed: a tenth of anonymous memory per 1 ms for 30 s, then a hundredth per 10 ms",
        };
        figures.push(
            Figure::new(
                &format!("ksm-page-seconds{suffix}"),
                ours.page_seconds(most, until),
                "page-s",
                &format!(
                    "pages that could have been merged and were not, over {until} s from a kick on, with {PODS} \
                     machines that have just booted; {most} could be in the end; the peer is {named}; {}",
                    ours.told(until, most)
                ),
            )
            .beside(peer, course.page_seconds(most, until)),
        );
        figures.push(
            Figure::new(
                &format!("ksm-cpu{suffix}"),
                ours.cpu(until),
                "s",
                &format!(
                    "processor time of ksmd and the daemon in the same {until} s; the peer: {}",
                    course.told(until, most)
                ),
            )
            .beside(peer, course.cpu(until)),
        );
    }
    figures.push(Figure::new(
        "ksm-idle-cpu",
        100.0 * idle.context("not measured")?,
        "%",
        &format!(
            "of one processor, ksmd and the daemon, over {} s when all is merged and {PODS} machines idle; target: at most 0.3",
            IDLE.as_secs()
        ),
    ));
    Ok(figures)
}

/// Boots the machines and watches; `after` comes before they end.
fn burst(
    bench: &Bench,
    name: &str,
    mut policy: Policy,
    until: f64,
    after: &mut dyn FnMut(&Policy) -> Result<()>,
) -> Result<Course> {
    let dir = bench.dir.join(format!("ksm-{name}"));
    let mut machines = Vec::new();
    for number in 0..PODS {
        let dir = dir.join(number.to_string());
        fs::create_dir_all(&dir)?;
        let agent = UnixListener::bind(agent_socket(&dir))?;
        let mut vmm = Vmm::start(&bench.products, LIMIT)?;
        let held = File::open("/dev/null")?.into();
        vmm.boot_as(&bench.products, &dir, Some(held))?;
        vmm.wait_ready()?;
        // Kept: an agent without its connection does not rest.
        machines.push((vmm, agent.accept()?));
    }
    progress(&format!("{PODS} machines for {name}"));
    policy.begin()?;
    let recorder = Recorder::new(policy.pid())?;
    let mut course = Course::default();
    // One for each, as the shim does it.
    for _ in 0..PODS {
        policy.kick()?;
    }
    while recorder.now() < until {
        recorder.step(&mut course, &mut policy)?;
    }
    progress(&format!("watched for {until} s"));
    after(&policy)?;
    drop(machines);
    drop(policy);
    reset()?;
    crate::containerd::remove_tree(&dir)?;
    Ok(course)
}

/// The part of a processor that an idle daemon takes, with ksmd.
fn idle_share(policy: &Policy) -> Result<f64> {
    let Policy::Ours(daemon) = policy else {
        anyhow::bail!("not our daemon");
    };
    daemon.wait_idle(LIMIT)?;
    let meter = Processor::new(policy.pid())?;
    let (begin, before) = (Instant::now(), meter.read()?);
    thread::sleep(IDLE);
    Ok((meter.read()? - before).max(0.0) / begin.elapsed().as_secs_f64())
}

/// Processor time of ksmd and of one more process, in seconds.
struct Processor {
    ksmd: Ksmd,
    daemon: Option<KernelFigure>,
}

impl Processor {
    fn new(daemon: Option<u32>) -> Result<Self> {
        let ksmd = Ksmd::find("/proc".as_ref())?;
        let daemon = daemon
            .map(|pid| KernelFigure::open(format!("/proc/{pid}/schedstat").as_ref()))
            .transpose()?;
        Ok(Self { ksmd, daemon })
    }

    fn read(&self) -> Result<f64> {
        let daemon = match &self.daemon {
            Some(figure) => figure.read()? as f64 / 1e9,
            None => 0.0,
        };
        Ok(self.ksmd.cpu_time()?.as_secs_f64() + daemon)
    }
}
