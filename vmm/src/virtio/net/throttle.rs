// SPDX-License-Identifier: Apache-2.0
//! The limit of one direction: what is beyond it waits, packets of the guest in
//! its queue and others in the tap.

use std::{
    io,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::RateLimits;
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::device::HEADER;
use crate::{
    event::LoopHandle,
    virtio::{
        chain::{Broken, Queues},
        counters::Counters,
        device::DeviceError,
        rate::Limiter,
    },
};

/// A direction's limit, which outlasts resets.
pub(super) struct Throttle {
    limiter: Limiter,
    /// Fires when what waits has waited; there from DRIVER_OK to reset.
    timer: Option<TimerFd>,
    /// A packet waits, and has been counted.
    waits: bool,
}

impl Throttle {
    pub fn new(limits: RateLimits) -> Self {
        Self {
            limiter: Limiter::new(limits, Instant::now()),
            timer: None,
            waits: false,
        }
    }

    /// The driver starts.
    pub fn start(&mut self, queues: &Queues, token: u32) -> Result<(), DeviceError> {
        let failed = |action| move |source| DeviceError::System { action, source };
        let timer = TimerFd::new()
            .map_err(io::Error::from)
            .map_err(failed("make a timer"))?;
        let handler = queues.handler.clone();
        queues
            .event_loop
            .register(&timer, EventSet::IN, handler, token)
            .map_err(failed("watch a timer"))?;
        self.timer = Some(timer);
        self.waits = false;
        Ok(())
    }

    /// The driver has let go.
    pub fn stop(&mut self, event_loop: &LoopHandle) {
        if let Some(timer) = self.timer.take() {
            event_loop.unregister(&timer);
        }
        self.waits = false;
    }

    /// The wait is over.
    pub fn fired(&mut self) {
        if let Some(timer) = &mut self.timer {
            // It is not ready any more. What it is ready for follows.
            let _ = timer.clear();
        }
        self.waits = false;
    }

    /// Whether a packet waits for the timer.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// How long the next packet must wait; zero: not at all.
    pub fn wait(&mut self) -> Duration {
        self.limiter.wait(Instant::now())
    }

    /// A packet is there that must wait so long.
    pub fn set(&mut self, wait: Duration, counters: &Counters) -> Result<(), Broken> {
        counters.throttled();
        self.waits = true;
        let Some(timer) = &mut self.timer else {
            return Err(Broken);
        };
        timer.reset(wait, None).map_err(|error| {
            limited!(error, %error, "an interface's timer cannot be set");
            Broken
        })
    }

    /// A packet of so many bytes, with its header, was let through.
    pub fn take(&mut self, bytes: usize) {
        self.limiter.take(bytes.saturating_sub(HEADER) as u64);
    }
}
