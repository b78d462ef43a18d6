// SPDX-License-Identifier: Apache-2.0
//! An interface whose packets the host's kernel moves, or this process where the
//! kernel cannot.

use super::{
    vhost::{MemoryProblem, StartError, Told, Vhost, RINGS},
    Net,
};
use crate::virtio::{chain::Broken, device::DeviceError};

impl Net {
    /// Has the kernel move packets; whether it does.
    pub(super) fn start_kernel(&mut self) -> Result<bool, DeviceError> {
        let token = self.kernel_token();
        let (Some(vhost), Some(queues), Some(tap)) =
            (&mut self.vhost, &mut self.active, self.taps.first())
        else {
            return Ok(false);
        };
        match vhost.start(queues, &tap.file, token) {
            Ok(()) => Ok(true),
            Err(StartError::Refused(error)) => {
                limited!(warn, %error, "the kernel does not take an interface's queues: the VMM moves packets");
                Ok(false)
            }
            Err(StartError::Failed(error)) => Err(error),
        }
    }

    /// First token of what the kernel tells.
    pub(super) fn kernel_token(&self) -> u32 {
        let [_, last] = self.timer_tokens();
        last + 1
    }

    /// Whether the kernel has that queue of the driver's.
    pub(super) fn is_kernels(&self, index: usize) -> bool {
        index < RINGS && self.vhost.as_ref().is_some_and(Vhost::has_rings)
    }

    /// The kernel has told something.
    pub(super) fn hear(&mut self, told: Told) -> Result<(), Broken> {
        let (Some(vhost), Some(queues), Some(tap)) =
            (&mut self.vhost, &self.active, self.taps.first())
        else {
            return Ok(());
        };
        match told {
            Told::Call(index) => {
                if vhost.called(index) {
                    queues.interrupt.signal_queue(index);
                }
                Ok(())
            }
            Told::Error => {
                limited!(warn, "the kernel found a queue of an interface wrong");
                Err(Broken)
            }
            Told::Again => vhost.go_on(&tap.file),
        }
    }

    /// Takes the queues from the kernel when the device stops for good.
    pub(super) fn stop_if_broken(&mut self) {
        if let (Some(vhost), Some(queues)) = (&mut self.vhost, &self.active) {
            if queues.is_broken() {
                vhost.stop(queues);
            }
        }
    }

    /// Tells the kernel what guest memory is now. Where it does not take that, it
    /// has nothing to do with it any more when this returns.
    pub(super) fn tell_memory(&mut self) {
        let (Some(vhost), Some(queues)) = (&mut self.vhost, &mut self.active) else {
            return;
        };
        let told = match vhost.set_memory(queues) {
            Ok(()) => return,
            Err(MemoryProblem::RingGone) => {
                limited!(warn, "the driver has let go of an interface's queue");
                vhost.stop(queues);
                Err(Broken)
            }
            Err(MemoryProblem::Refused(error)) => {
                limited!(warn, %error, "the kernel does not take guest memory: the VMM moves packets");
                self.take_over()
            }
        };
        if let (Err(Broken), Some(queues)) = (told, &mut self.active) {
            queues.break_device();
        }
    }

    /// Moves packets from where the kernel is.
    fn take_over(&mut self) -> Result<(), Broken> {
        let (Some(vhost), Some(queues)) = (&mut self.vhost, &mut self.active) else {
            return Ok(());
        };
        let rested = vhost.rest(queues);
        vhost.stop(queues);
        rested.map_err(|_| Broken)?;
        for index in 0..RINGS {
            queues.take_back(index).map_err(|_| Broken)?;
        }
        self.watch_taps().map_err(|_| Broken)
    }
}
