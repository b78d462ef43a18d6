// SPDX-License-Identifier: Apache-2.0
//! `start`: finds the pod's shim or starts one, and prints its address.
//!
//! Everything that is printed, on standard error too, becomes part of the
//! reply, and containerd waits until nobody holds either of them open. The
//! socket is bound here and handed to the shim, so that containerd cannot dial
//! before somebody listens.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixListener, process::parent_id},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    bootstrap::{Input, InputError},
    flags::Flags,
    group, lock, log,
    options::{Options, OptionsError},
    socket::{self, Bound},
};

/// Why no shim could be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Standard input is not understood.
    #[error("start")]
    Input(#[from] InputError),
    /// The runtime options cannot be used.
    #[error("runtime options")]
    Options(#[from] OptionsError),
    /// The reply cannot be written as protobuf.
    #[error("encode the reply")]
    Reply(#[source] protobuf::Error),
}

fn step<S: Into<String>>(step: impl FnOnce() -> S) -> impl FnOnce(io::Error) -> StartError {
    |source| StartError::System {
        step: step().into(),
        source,
    }
}

/// Runs the action. `started_us` is CLOCK_MONOTONIC in microseconds when the
/// process began.
///
/// # Errors
/// When there is no shim afterwards.
pub fn run(flags: &Flags, started_us: u64) -> Result<(), StartError> {
    let mut input = Vec::new();
    io::stdin()
        .read_to_end(&mut input)
        .map_err(step(|| "read standard input"))?;
    let input = Input::parse(&input, &flags.id, &flags.namespace)?;
    // Refused here, before there is anything to clean up.
    Options::parse(input.options.as_ref())?;

    let mut flags = flags.clone();
    flags.debug |= input.debug;
    if let Some(address) = &input.grpc_address {
        flags.address.clone_from(address);
    }
    let bundle = match flags.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(step(|| "find the working directory"))?,
        false => flags.bundle.clone(),
    };
    let group = group::of_bundle(&bundle, &flags.id);
    let root = input
        .socket_dir
        .clone()
        .unwrap_or_else(|| PathBuf::from(socket::ROOT));
    let path = socket::path(&root, &flags.address, &flags.namespace, &group);
    let address = socket::address(&path);

    {
        let _lock =
            lock::PodLock::acquire(&path).map_err(step(|| format!("lock {}", path.display())))?;
        let bound =
            socket::bind(&path).map_err(step(|| format!("listen at {}", path.display())))?;
        if let Bound::New(listener) = bound {
            Options::keep(input.options.as_ref(), &bundle)
                .map_err(step(|| format!("keep the options in {}", bundle.display())))?;
            let serve = Serve {
                flags: &flags,
                bundle: &bundle,
                arguments: flags.serve_arguments(&group, started_us),
                ttrpc_address: input.ttrpc_address.as_deref(),
            };
            if let Err(error) = serve.spawn(listener) {
                // The error above all; a stale socket is replaced next time.
                let _ = socket::remove(&path);
                return Err(error);
            }
        }
    }
    write(&bundle.join("address"), &address)?;

    let reply = input.reply.encode(&address).map_err(StartError::Reply)?;
    let mut stdout = io::stdout();
    stdout
        .write_all(&reply)
        .and_then(|()| stdout.flush())
        .map_err(step(|| "write the address"))
}

/// The shim that is to be run.
struct Serve<'a> {
    flags: &'a Flags,
    bundle: &'a Path,
    arguments: Vec<String>,
    ttrpc_address: Option<&'a str>,
}

impl Serve<'_> {
    fn spawn(&self, listener: UnixListener) -> Result<(), StartError> {
        // The path is what the process is called by; a replaced binary can
        // still be run by its link.
        let binary = std::env::current_exe()
            .ok()
            .filter(|path| path.exists())
            .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
        let mut command = Command::new(&binary);
        command
            .args(&self.arguments)
            .current_dir(self.bundle)
            // The one descriptor that a child can be given without any trick.
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            // Where a crash can be seen.
            .stderr(log::open(self.bundle).map_or_else(|_| Stdio::null(), Stdio::from));
        if let Some(address) = self.ttrpc_address {
            command.env("TTRPC_ADDRESS", address);
        }
        let child = command
            .spawn()
            .map_err(step(|| format!("run {}", binary.display())))?;
        let pid = child.id();
        adjust_oom_score(pid);
        write(&self.bundle.join("shim.pid"), &pid.to_string())
            .inspect_err(|_| {
                // It cannot be left running: nobody would know of it.
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
            })
            .map(|()| tracing::debug!(pid, id = self.flags.id, "shim started"))
    }
}

/// One more than containerd's, so that the shim goes before containerd does
/// when memory runs out. Where that is not allowed it stays as it is.
fn adjust_oom_score(pid: u32) {
    let path = |pid: u32| format!("/proc/{pid}/oom_score_adj");
    let score = fs::read_to_string(path(parent_id()))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        let _ = fs::write(path(pid), (score + 1).min(1000).to_string());
    }
}

/// Replaces a file at once: readers see the old one or the new one.
fn write(path: &Path, text: &str) -> Result<(), StartError> {
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, path))
        .map_err(step(|| format!("write {}", path.display())))
}
