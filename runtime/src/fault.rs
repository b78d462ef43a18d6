// SPDX-License-Identifier: Apache-2.0
//! Faults on purpose, for the test that fails each step of a pod's start in
//! turn and looks for what is left. Set by the configuration's `[debug]`, never
//! by a pod.

use std::{fmt, io, str::FromStr};

use crate::error::{Error, Step as _};

macro_rules! steps {
    ($($name:ident = $text:literal, $doc:literal;)+) => {
        /// A step of a pod's start; it goes wrong after it was done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Step {
            $(#[doc = $doc] $name,)+
        }

        impl Step {
            /// All steps, in their order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
        }

        impl fmt::Display for Step {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$name => $text,)+
                })
            }
        }
    };
}

steps! {
    Directory = "directory", "The sandbox's directory was made.";
    Share = "share", "The journal was begun and the shared directory mounted.";
    Spawn = "spawn", "The VMM's process runs.";
    Adopt = "adopt", "It is in the journal and in the pod's cgroup.";
    Identify = "identify", "The sandbox's name was written down.";
    Listen = "listen", "The sockets for the guest were made.";
    Network = "network", "The pod's network was taken over.";
    Boot = "boot", "The guest's agent has called.";
    SetUp = "set-up", "The guest was set up.";
    Rootfs = "rootfs", "A container's files were mounted.";
    Create = "create", "The guest has made the container.";
    Connect = "connect", "The container's streams are connected.";
}

/// Not a step's name.
#[derive(Debug, thiserror::Error)]
#[error("{name:?} is none of: {}", known())]
pub struct UnknownStep {
    name: String,
}

fn known() -> String {
    let names: Vec<String> = Step::ALL.iter().map(Step::to_string).collect();
    names.join(", ")
}

impl FromStr for Step {
    type Err = UnknownStep;

    fn from_str(text: &str) -> Result<Self, UnknownStep> {
        Self::ALL
            .iter()
            .copied()
            .find(|step| step.to_string() == text)
            .ok_or_else(|| UnknownStep { name: text.into() })
    }
}

/// What is to go wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fault {
    /// The step that fails.
    pub fail: Option<Step>,
    /// The step at which the process dies, as by SIGKILL.
    pub crash: Option<Step>,
}

impl Fault {
    /// The step was done.
    ///
    /// # Errors
    /// It is the one that is to fail.
    pub fn after(self, step: Step) -> Result<(), Error> {
        if self.crash == Some(step) {
            // Nothing of ours runs any more: no destructor, no signal handler.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
        if self.fail == Some(step) {
            let failed: io::Result<()> = Err(io::Error::other("debug.fail_at"));
            return failed.step(|| format!("step {step}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_step_fails() {
        let fault = Fault {
            fail: Some(Step::Network),
            crash: None,
        };
        for step in Step::ALL {
            assert_eq!(fault.after(*step).is_err(), *step == Step::Network);
            assert_eq!(step.to_string().parse::<Step>().unwrap(), *step);
            Fault::default().after(*step).unwrap();
        }
        let text = crate::error::chain(&fault.after(Step::Network).unwrap_err());
        assert_eq!(text, "step network: debug.fail_at");
    }
}
