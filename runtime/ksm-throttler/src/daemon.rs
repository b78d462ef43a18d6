// SPDX-License-Identifier: Apache-2.0
//! The loop: sleeps until a kick, then steps until there is nothing to gain.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    poll::{poll, PollFd, PollFlags, PollTimeout},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

use crate::{
    controller::{Controller, Decision, Limits, Sample},
    knobs::Knobs,
    ksmd::Ksmd,
    meter::Meter,
    metrics::{self, Board, Pods, Told},
    socket::Kicks,
    sysfs::Ksm,
    KsmError,
};

/// Where everything is, and what may be used.
#[derive(Debug, Clone)]
pub struct Options {
    /// KSM's directory.
    pub sysfs: PathBuf,
    /// Where processes are.
    pub proc: PathBuf,
    /// For kicks.
    pub socket: PathBuf,
    /// For metrics.
    pub metrics_socket: PathBuf,
    /// For the values found.
    pub state_file: PathBuf,
    /// Which merge group has mergeable memory.
    pub group: PathBuf,
    /// For ksmd.
    pub limits: Limits,
}

/// Runs until it is told to end, and puts the settings found back.
///
/// # Errors
/// KSM cannot be steered here, or not any more.
pub fn run(options: &Options) -> Result<(), KsmError> {
    let ksm = Ksm::find(&options.sysfs)?;
    ksm.check_writable()?;
    let meter = Meter::open(&ksm, Ksmd::find(&options.proc)?)?;
    // Before anything is changed, and before there are threads.
    let signals = signals()?;
    let kicks = Kicks::listen(&options.socket)?;
    let listener = metrics::listen(&options.metrics_socket)?;
    crate::socket::make_parent(&options.state_file).map_err(|source| KsmError::State {
        path: options.state_file.clone(),
        source,
    })?;
    let percent = (options.limits.cpu_share * 100.0).round();
    // Within 1 to 100 by the option's range.
    let knobs = Knobs::take(ksm.clone(), &options.state_file, percent as u32)?;
    let board = Arc::new(Mutex::new(Told {
        totals: Default::default(),
        decision: Decision::Idle,
        cpu_share: options.limits.cpu_share,
        pods: Pods::default(),
    }));
    metrics::serve(listener, ksm, options.group.clone(), board.clone())?;
    let mut daemon = Daemon {
        start: Instant::now(),
        controller: Controller::new(options.limits),
        tick: options.limits.tick,
        meter,
        knobs,
        kicks,
        signals,
        board,
        decision: Decision::Idle,
        pods: Pods::default(),
    };
    let ended = daemon.live();
    let restored = daemon.knobs.restore();
    // Also what restoring a part of it took.
    let removed = std::fs::remove_file(&options.metrics_socket);
    if let Err(error) = removed {
        tracing::debug!(%error, "metrics socket left");
    }
    ended.and(restored)
}

/// SIGTERM, SIGINT and SIGHUP as a descriptor.
fn signals() -> Result<SignalFd, KsmError> {
    let watch = || {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
    };
    watch().map_err(|error: nix::errno::Errno| KsmError::System {
        step: "watch signals",
        source: error.into(),
    })
}

struct Daemon {
    start: Instant,
    controller: Controller,
    tick: Duration,
    meter: Meter,
    knobs: Knobs,
    kicks: Kicks,
    signals: SignalFd,
    board: Board,
    decision: Decision,
    pods: Pods,
}

impl Daemon {
    fn live(&mut self) -> Result<(), KsmError> {
        // Pods may have started before this did.
        self.controller.wake();
        loop {
            self.step()?;
            if self.told_to_end()? {
                return Ok(());
            }
            let heard = self.kicks.take()?;
            self.controller.kick(heard.worthy);
            self.controller.unworthy(heard.all - heard.worthy);
            self.pods.merged += heard.merged;
            self.pods.refused += heard.refused;
        }
    }

    fn step(&mut self) -> Result<(), KsmError> {
        let (cpu, counters) = self.meter.read()?;
        let sample = Sample {
            at: self.start.elapsed(),
            cpu,
            counters,
        };
        let decision = self.controller.step(&sample);
        self.knobs.apply(decision)?;
        let before = std::mem::replace(&mut self.decision, decision);
        let totals = self.controller.totals();
        {
            let mut told = self.board.lock().unwrap_or_else(PoisonError::into_inner);
            told.totals = totals;
            told.decision = decision;
            told.pods = self.pods;
        }
        match (before, decision) {
            (Decision::Idle, Decision::Idle) => {}
            (Decision::Idle, _) => tracing::info!(
                run = totals.runs,
                kicks = totals.kicks,
                mergeable = sample.counters.mergeable(),
                saved = sample.counters.saved(),
                "run begins"
            ),
            (_, Decision::Idle) => tracing::info!(
                run = totals.runs,
                kicks = totals.kicks,
                scans = totals.scans,
                merged = totals.merged,
                cpu_ms = totals.cpu.as_millis(),
                mergeable = sample.counters.mergeable(),
                saved = sample.counters.saved(),
                "run ends"
            ),
            _ if before != decision => tracing::debug!(
                ?decision,
                mergeable = sample.counters.mergeable(),
                saved = sample.counters.saved(),
                profit = totals.profit,
                "effort"
            ),
            _ => {}
        }
        Ok(())
    }

    /// Waits for the next step: when idle for a kick, else for the tick, for
    /// kicks in a run are heard soon enough with it.
    fn told_to_end(&mut self) -> Result<bool, KsmError> {
        let failed = |error: nix::errno::Errno| KsmError::System {
            step: "wait",
            source: error.into(),
        };
        let end = Instant::now() + self.tick;
        let idle = self.decision == Decision::Idle;
        loop {
            let mut watched = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.kicks.as_fd(), PollFlags::POLLIN),
            ];
            let ready = if idle {
                poll(&mut watched, PollTimeout::NONE)
            } else {
                let left = end.saturating_duration_since(Instant::now());
                // Up, or the last millisecond is spent in a loop.
                let left = left.as_micros().div_ceil(1000);
                let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                poll(&mut watched[..1], left)
            };
            match ready {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(error) => return Err(failed(error)),
                Ok(0) => return Ok(false),
                Ok(_) => {}
            }
            return match self.signals.read_signal().map_err(failed)? {
                Some(signal) => {
                    tracing::info!(signal = signal.ssi_signo, "told to end");
                    Ok(true)
                }
                None => Ok(false),
            };
        }
    }
}
