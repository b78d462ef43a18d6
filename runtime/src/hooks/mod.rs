// SPDX-License-Identifier: Apache-2.0
//! Hooks that run on the host (config.md, "POSIX-platform Hooks"; runtime.md,
//! "Lifecycle"): `prestart` and `createRuntime` before the container is made in
//! the guest, `poststart` when its program runs, `poststop` when it is deleted.
//!
//! A hook gets the container's state on its standard input. Its process id is
//! the VMM's, which stands for every process of the pod.

mod run;
mod state;

use std::{path::PathBuf, process::ExitStatus, time::Duration};

use oci_spec::runtime::{Hook as SpecHook, Spec};

pub use self::{run::children, state::Lifecycle};
use crate::oci::{check_hook, SpecError};

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run.
    #[error("{hook} cannot be run")]
    Run {
        /// The field, and the program.
        hook: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It ended with an error.
    #[error("{hook}: {status}{}", said(stderr))]
    Failed {
        /// The field, and the program.
        hook: String,
        /// How it ended.
        status: ExitStatus,
        /// The beginning of what it said.
        stderr: String,
    },
    /// It took longer than its timeout, and was killed.
    #[error("{hook}: killed after its timeout of {} s{}", timeout.as_secs(), said(stderr))]
    TimedOut {
        /// The field, and the program.
        hook: String,
        /// How long it may take.
        timeout: Duration,
        /// The beginning of what it said.
        stderr: String,
    },
}

fn said(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        text => format!("; it said: {text}"),
    }
}

/// One program to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    /// Where it is in the specification, and the program.
    name: String,
    path: PathBuf,
    args: Vec<String>,
    /// None: the runtime's own.
    env: Option<Vec<String>>,
    timeout: Option<Duration>,
}

/// All hooks of a container that run on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// `prestart`, then `createRuntime`.
    before_start: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

impl HostHooks {
    /// Those of a specification, checked.
    ///
    /// # Errors
    /// A path that is not absolute, a timeout that is no time; naming the field.
    pub fn of(spec: &Spec) -> Result<Self, SpecError> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        #[allow(deprecated)] // and in use all the same
        let mut before_start = checked("prestart", hooks.prestart())?;
        before_start.extend(checked("createRuntime", hooks.create_runtime())?);
        Ok(Self {
            before_start,
            poststart: checked("poststart", hooks.poststart())?,
            poststop: checked("poststop", hooks.poststop())?,
        })
    }

    /// Whether any of them may set the container's network up.
    pub fn any_before_start(&self) -> bool {
        !self.before_start.is_empty()
    }
}

fn checked(kind: &str, list: &Option<Vec<SpecHook>>) -> Result<Vec<Hook>, SpecError> {
    let hooks = list.iter().flatten().enumerate();
    hooks
        .map(|(number, hook)| {
            let (field, timeout) = check_hook(kind, number, hook)?;
            Ok(Hook {
                name: format!("{field} {}", hook.path().display()),
                path: hook.path().clone(),
                args: hook.args().clone().unwrap_or_default(),
                env: hook.env().clone(),
                timeout,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
