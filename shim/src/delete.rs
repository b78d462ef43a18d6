// SPDX-License-Identifier: Apache-2.0
//! `delete`: cleans up after a shim that has died, and tells how its container
//! ended. containerd runs it for every container of the pod, some of them at
//! the same time, and gives it five seconds.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bulkhead_runtime::{config::Config, error::chain, resource::mount, sandbox};
use bulkhead_shim_protocol::shim::DeleteResponse;
use protobuf::{Message, MessageField};
use rustix::process::{kill_process, Pid, Signal};

use crate::{convert, evict, flags::Flags, group, lock::PodLock, record::Record, socket};

/// Status of what ends with its shim: as by SIGKILL.
const KILLED: u32 = 128 + 9;

/// How long a shim may take to be gone that was killed.
const DEATH: Duration = Duration::from_secs(1);

/// Why not everything could be cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something of the pod's could not be given back.
    #[error("clean up")]
    Runtime(#[from] bulkhead_runtime::Error),
    /// The reply cannot be written as protobuf.
    #[error("encode the reply")]
    Reply(#[source] protobuf::Error),
}

fn step<S: Into<String>>(step: impl FnOnce() -> S) -> impl FnOnce(io::Error) -> DeleteError {
    |source| DeleteError::System {
        step: step().into(),
        source,
    }
}

/// Runs the action.
///
/// # Errors
/// When something is left; containerd then tries again when it is started.
pub fn run(flags: &Flags) -> Result<(), DeleteError> {
    let bundle = match flags.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(step(|| "find the working directory"))?,
        false => flags.bundle.clone(),
    };
    let pid = clean(flags, &bundle)?;
    // Nothing of ours is there; containerd wants to remove the bundle.
    mount::unmount(&bundle.join("rootfs")).map_err(step(|| "unmount the bundle's rootfs"))?;
    let reply = DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: MessageField::some(convert::timestamp(SystemTime::now())),
        ..Default::default()
    };
    let bytes = reply.write_to_bytes().map_err(DeleteError::Reply)?;
    let mut stdout = io::stdout();
    stdout
        .write_all(&bytes)
        .and_then(|()| stdout.flush())
        .map_err(step(|| "write the reply"))
}

/// Cleans up; returns the process that stood for the container, 0 when that is
/// not known.
fn clean(flags: &Flags, bundle: &Path) -> Result<u32, DeleteError> {
    // What the shim has written down counts; a bundle may be broken, or may
    // have been from the start.
    let record = Record::read(bundle);
    let group = match &record {
        Some(record) => record.group.clone(),
        None => group::of_bundle(bundle, &flags.id),
    };
    let socket = match fs::read_to_string(bundle.join("address")) {
        Ok(address) if !address.trim().is_empty() => socket::path_of(address.trim()).to_owned(),
        _ => socket::path(
            Path::new(socket::ROOT),
            &flags.address,
            &flags.namespace,
            &group,
        ),
    };
    if let Ok(Some(stream)) = socket::probe(&socket) {
        // It lives, and containerd does not think so.
        match evict::evict(stream.into(), &flags.id) {
            Ok(()) => return Ok(record.map_or(0, |record| record.pid)),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, "the shim does not answer, and is killed");
            }
        }
        kill_shim(bundle, &flags.namespace, &group);
    }
    let _lock = PodLock::acquire(&socket).map_err(step(|| format!("lock {}", socket.display())))?;
    // Somebody serves the pod again: nothing there is ours.
    if matches!(socket::probe(&socket), Ok(Some(_))) {
        return Ok(0);
    }
    socket::remove(&socket).map_err(step(|| format!("remove {}", socket.display())))?;
    let state_dir = match &record {
        Some(record) => record.state_dir.clone(),
        None => configured_state_dir(),
    };
    sandbox::recover(&state_dir, &flags.namespace, &group)?;
    Ok(record.map_or(0, |record| record.pid))
}

/// Where sandboxes are when the shim has not got as far as writing it down.
fn configured_state_dir() -> PathBuf {
    let config = Config::load(None).unwrap_or_else(|error| {
        // Then the shim has not started anything either.
        tracing::warn!(error = chain(&error), "configuration");
        Config::default()
    });
    config.runtime.state_dir
}

/// Kills the shim that `start` has run in this bundle, if it is still that.
fn kill_shim(bundle: &Path, namespace: &str, group: &str) {
    let Some(pid) = fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
        .and_then(Pid::from_raw)
    else {
        return;
    };
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let serves = || {
        let line = fs::read(&path).unwrap_or_default();
        let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let has = |flag: &str, value: &str| {
            arguments
                .windows(2)
                .any(|pair| pair[0] == flag.as_bytes() && pair[1] == value.as_bytes())
        };
        has("-bulkhead-group", group) && has("-namespace", namespace)
    };
    if !serves() {
        return;
    }
    if kill_process(pid, Signal::KILL).is_ok() {
        let begin = std::time::Instant::now();
        while serves() && begin.elapsed() < DEATH {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests;
