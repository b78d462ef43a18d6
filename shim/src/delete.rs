// SPDX-License-Identifier: Apache-2.0
//! `delete`: gives back what a shim that has died had taken, and prints the
//! `DeleteResponse` that it can give no more. containerd runs it for every
//! bundle whose shim does not answer.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use bulkhead_runtime::{
    config::{Config, ConfigError},
    resource::mount,
    sandbox,
};
use bulkhead_shim_protocol::shim::DeleteResponse;
use protobuf::{Message, MessageField};

use crate::{convert::timestamp, flags::Flags, group, lock, socket};

/// In a bundle: where its pod keeps its state.
pub const STATE_DIR_FILE: &str = "bulkhead-state-dir";

/// Status of a process whose end nobody saw: as by SIGKILL.
const KILLED: u32 = 137;

/// Why not everything could be given back.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Bulkhead's configuration cannot be used.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// Something could not be given back.
    #[error("clean up")]
    Runtime(#[from] bulkhead_runtime::Error),
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn step(step: impl Into<String>) -> impl FnOnce(io::Error) -> DeleteError {
    let step = step.into();
    |source| DeleteError::System { step, source }
}

/// Runs the action.
///
/// # Errors
/// What could not be given back; another try may succeed.
pub fn run(flags: &Flags) -> Result<(), DeleteError> {
    let bundle = match flags.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(step("find the working directory"))?,
        false => flags.bundle.clone(),
    };
    let group = group::of_bundle(&bundle, &flags.id);
    let path = socket_path(flags, &bundle, &group);
    {
        let _lock =
            lock::PodLock::acquire(&path).map_err(step(format!("lock {}", path.display())))?;
        // Another container of a pod whose shim is alive: nothing of its is
        // left to take care of.
        let served = socket::probe(&path)
            .map_err(step(format!("connect to {}", path.display())))?
            .is_some();
        if !served {
            sandbox::recover(&state_dir(&bundle)?, &flags.namespace, &group)?;
            socket::remove(&path).map_err(step(format!("remove {}", path.display())))?;
        }
    }
    // Older shims and other runtimes mount it here.
    mount::unmount(&bundle.join("rootfs")).map_err(step("unmount the bundle's rootfs"))?;
    let reply = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(timestamp(SystemTime::now())),
        ..Default::default()
    };
    let reply = reply
        .write_to_bytes()
        .map_err(io::Error::other)
        .map_err(step("encode the reply"))?;
    io::stdout()
        .write_all(&reply)
        .map_err(step("write the reply"))
}

/// As the bundle tells, else as `start` would have chosen it.
fn socket_path(flags: &Flags, bundle: &Path, group: &str) -> PathBuf {
    match fs::read_to_string(bundle.join("address")) {
        Ok(address) if !address.trim().is_empty() => socket::path_of(address.trim()).into(),
        _ => socket::path(
            Path::new(socket::ROOT),
            &flags.address,
            &flags.namespace,
            group,
        ),
    }
}

/// As the shim has written it down, else as configured.
fn state_dir(bundle: &Path) -> Result<PathBuf, DeleteError> {
    match fs::read_to_string(bundle.join(STATE_DIR_FILE)) {
        Ok(path) if !path.is_empty() => Ok(path.into()),
        _ => Ok(Config::load(None)?.runtime.state_dir),
    }
}
