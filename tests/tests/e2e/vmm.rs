// SPDX-License-Identifier: Apache-2.0
//! The VMM by itself, with a booted guest: snapshots, clones, the balloon.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};
use bulkhead_agent_protocol::{
    agent::{SetupSandboxReply, SetupSandboxRequest},
    SHARED_TAG,
};
use bulkhead_runtime::agent::Agent;
use bulkhead_runtime::config;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::{agent_socket, Size, Vmm};
use bulkhead_vmm_api::{BalloonStatus, BalloonTarget, Call, Event, ExitReason};

use crate::context::{mentions, same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice clones_of_a_guest_serve,
    a_balloon_takes_what_it_is_asked_for,
    a_mounted_share_is_refused
];

/// A guest's end on the host: where its agent calls.
pub struct Host {
    pub dir: std::path::PathBuf,
    listener: UnixListener,
}

impl Host {
    pub fn new(context: &Context, name: &str) -> Result<Self> {
        let dir = context.dir.join(context.id(name));
        fs::create_dir_all(&dir)?;
        let listener = UnixListener::bind(agent_socket(&dir))?;
        Ok(Self { dir, listener })
    }

    pub fn console(&self) -> String {
        fs::read_to_string(self.dir.join("console")).unwrap_or_default()
    }

    /// Calls the agent that calls here. Its answer says which it is.
    pub fn set_up(&self, runtime: &tokio::runtime::Runtime) -> Result<(Agent, String)> {
        self.set_up_with(runtime, SHARED_TAG)
    }

    /// As [`Self::set_up`]; no tag: the shared directory is not mounted.
    pub fn set_up_with(
        &self,
        runtime: &tokio::runtime::Runtime,
        tag: &str,
    ) -> Result<(Agent, String)> {
        let (agent, reply) = self.answer(runtime, tag)?;
        Ok((agent, reply.kernel_release))
    }

    /// As [`Self::set_up_with`], with all of the answer.
    fn answer(
        &self,
        runtime: &tokio::runtime::Runtime,
        tag: &str,
    ) -> Result<(Agent, SetupSandboxReply)> {
        self.listener.set_nonblocking(true)?;
        let request = SetupSandboxRequest {
            sandbox_id: "clone".into(),
            hostname: "clone".into(),
            entropy: vec![7; 32],
            shared_tag: tag.into(),
            ..Default::default()
        };
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(self.listener.try_clone()?)?;
            let (stream, _) = tokio::time::timeout(LIMIT, listener.accept())
                .await
                .with_context(|| format!("the agent does not call: {}", self.console()))??;
            let patient = config::Agent {
                rpc_timeout_ms: u64::try_from(LIMIT.as_millis())?,
                ..config::Agent::default()
            };
            let agent = Agent::new(stream, &patient);
            let reply = agent.setup_sandbox(request).await;
            let reply = reply.with_context(|| self.console())?;
            Ok((agent, reply))
        })
    }
}

pub fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Brings a guest up to its agent's call and writes it to files below `dir`; when
/// it was let run.
fn template(context: &Context, start: Start, dir: &Path) -> Result<Duration> {
    let host = Host::new(context, "template")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    context.bring_up(start, &mut vmm, &host.dir, Size::default())?;
    // At rest: the connection stands and nothing is on its way.
    std::thread::sleep(Duration::from_secs(2));
    let entered = vmm.status()?.timeline.kernel_entry;
    vmm.snapshot(&dir.join("state"), &dir.join("memory"))?;
    Ok(Duration::from_micros(entered.context("no kernel entry")?))
}

/// The clock of the stamps.
fn now() -> Result<Duration> {
    Ok(nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?.into())
}

/// How long the template is a file before the clones, and how much the guest's
/// idea of the time may be off: it begins to count some time after its kernel was
/// entered.
const AS_A_FILE: Duration = Duration::from_secs(6);
const OFF_BY: Duration = Duration::from_secs(3);

fn clones_of_a_guest_serve(context: &Context, start: Start) -> Result<()> {
    context.only_bulkhead()?;
    let dir = context.dir.join(context.id("clones"));
    fs::create_dir_all(&dir)?;
    let entered = template(context, start, &dir)?;
    std::thread::sleep(AS_A_FILE);
    let size = fs::metadata(dir.join("state"))?.len();
    if size > 64 << 10 {
        bail!("a state file of {size} bytes");
    }
    let runtime = runtime()?;
    let mut clones = Vec::new();
    for name in ["first", "second"] {
        let host = Host::new(context, name)?;
        let begin = Instant::now();
        let started = now()?;
        let mut vmm = Vmm::start(&context.products, LIMIT)?;
        vmm.clone_of(
            &dir.join("state"),
            &dir.join("memory"),
            &context.products,
            &host.dir,
        )?;
        let restored = begin.elapsed();
        vmm.wait_clone().with_context(|| host.console())?;
        println!(
            "    {name} clone: restored after {restored:.0?}, its agent called after {:.0?}",
            begin.elapsed()
        );
        clones.push((host, vmm, started..now()?));
    }
    // Both live, and each answers for itself.
    for (host, vmm, called) in &mut clones {
        use_balloon(vmm)?;
        let (agent, answer) = host.answer(&runtime, SHARED_TAG)?;
        // When it called, by its own clock: that went on while it was a file.
        let clock = Duration::from_nanos(answer.agent_ready_ns);
        // That of a template which is a clone itself has had a life before.
        let (first, last) = (called.start - entered, called.end - entered);
        let late = start == Start::Cold && clock > last;
        if clock < first.saturating_sub(OFF_BY) || late {
            bail!("the clone's clock was at {clock:?} between {first:?} and {last:?}");
        }
        let release = answer.kernel_release;
        if release == bulkhead_tests::inside::release()? {
            bail!("the host's kernel answered");
        }
        let ended = runtime.block_on(agent.shutdown(LIMIT));
        // The answer may be lost; what counts is the end.
        drop(ended);
        same(vmm.event()?, Event::Ended(ExitReason::PowerOff)).with_context(|| host.console())?;
    }
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// The guest gives memory, tells how much it has left, and takes it again.
fn use_balloon(vmm: &mut Vmm) -> Result<()> {
    let mut reach = |mib: u32| -> Result<BalloonStatus> {
        vmm.call(Call::Balloon(BalloonTarget { mib }), &[])?;
        let mut last = BalloonStatus::default();
        until(LIMIT, "the balloon has its size", || {
            last = vmm.status()?.balloon.context("no balloon")?;
            Ok(last.actual_mib == mib && last.statistics.is_some())
        })?;
        same(last.target_mib, mib)?;
        Ok(last)
    };
    let full = reach(64)?;
    if full.returned < 64 << 20 {
        bail!("{} bytes given back", full.returned);
    }
    reach(0)?;
    let refused = vmm.call(Call::Balloon(BalloonTarget { mib: 256 }), &[]);
    let Err(error) = refused else {
        bail!("a balloon as large as the guest");
    };
    mentions(&error.to_string(), &["mib", "256"])
}

fn a_balloon_takes_what_it_is_asked_for(context: &Context, start: Start) -> Result<()> {
    context.only_bulkhead()?;
    let host = Host::new(context, "balloon")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    context.bring_up(start, &mut vmm, &host.dir, Size::default())?;
    use_balloon(&mut vmm).with_context(|| host.console())?;
    vmm.call(Call::Shutdown, &[])?;
    same(vmm.event()?, Event::Ended(ExitReason::Stopped))
}

fn a_mounted_share_is_refused(context: &Context, start: Start) -> Result<()> {
    context.only_bulkhead()?;
    let host = Host::new(context, "mounted")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    context.bring_up(start, &mut vmm, &host.dir, Size::default())?;
    let runtime = runtime()?;
    let (agent, _) = host.set_up(&runtime)?;
    let refused = vmm.snapshot(&host.dir.join("state"), &host.dir.join("memory"));
    let Err(error) = refused else {
        bail!("a guest with a mounted share was saved");
    };
    mentions(&error.to_string(), &["shared", "mounted"])?;
    // It goes on as if nothing had been.
    vmm.call(Call::Resume, &[])?;
    drop(runtime.block_on(agent.shutdown(LIMIT)));
    same(vmm.event()?, Event::Ended(ExitReason::PowerOff)).with_context(|| host.console())
}
