// SPDX-License-Identifier: Apache-2.0
//! `bulkhead run`.

use std::{
    fs,
    io::{stderr, stdin, stdout},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_runtime::{
    config::Config,
    error::{chain, Error},
    io::Stdio,
    sandbox::{CreateRequest, Sandbox, SandboxRequest},
};
use clap::Args;
use rustix::process::{getrlimit, Resource};

use super::{bundle, signals::Signals, terminal};

/// Namespace of the containers of this command.
const NAMESPACE: &str = "bulkhead-run";

/// Open files without which not even the event loop can be made, which panics
/// then.
const FILES: u64 = 16;

/// How long output may take to be delivered after the command has ended.
const DELIVERY: Duration = Duration::from_secs(10);

/// Arguments of `bulkhead run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(48..=1_048_576))]
    pub memory: Option<u32>,
    /// Virtual processors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub cpus: Option<u8>,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub cwd: String,
    /// Host name in the container
    #[arg(long, value_name = "NAME", default_value = "bulkhead")]
    pub hostname: String,
    /// Network namespace to attach to, as in /run/netns; no network without
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// Make the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Log what happens to standard error
    #[arg(short, long)]
    pub verbose: bool,
    /// Directory of the root file system
    #[arg(value_name = "ROOTFS-DIR")]
    pub rootfs: PathBuf,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

impl Run {
    /// Runs it; returns the command's exit status.
    pub fn execute(&self, mut config: Config, start_us: u64) -> Result<u32, String> {
        // Nothing in the bundle says how large the machine is to be.
        if let Some(memory) = self.memory {
            config.hypervisor.memory_mib = memory;
        }
        if let Some(cpus) = self.cpus {
            config.hypervisor.vcpus = cpus;
        }
        let rootfs = fs::canonicalize(&self.rootfs)
            .map_err(|error| format!("ROOTFS-DIR {}: {error}", self.rootfs.display()))?;
        if let Some(bad) = self.env.iter().find(|entry| !entry.contains('=')) {
            return Err(format!("--env {bad}: write NAME=VALUE"));
        }
        let files = getrlimit(Resource::Nofile).current;
        if let Some(few) = files.filter(|files| *files < FILES) {
            return Err(format!(
                "at most {few} files may be open (ulimit -n): a start needs {FILES} at least"
            ));
        }
        let id = format!("run-{}-{start_us}", std::process::id());
        let bundle = Bundle::create(&config.runtime.state_dir, &id)?;
        let size = terminal::size().filter(|_| self.tty);
        let text = bundle::config(self, &rootfs, size).to_string();
        fs::write(bundle.0.join("config.json"), text)
            .map_err(|error| format!("write {}: {error}", bundle.0.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("start the event loop: {error}"))?;
        let result = runtime.block_on(self.run(config, start_us, id, &bundle.0));
        // Reading standard input may still block a thread.
        runtime.shutdown_background();
        result
    }

    async fn run(
        &self,
        config: Config,
        start_us: u64,
        id: String,
        bundle: &Path,
    ) -> Result<u32, String> {
        let signals = Signals::take().map_err(|error| format!("watch signals: {error}"))?;
        let request = SandboxRequest {
            namespace: NAMESPACE.into(),
            id: id.clone(),
            bundle: bundle.into(),
            pod: None,
            shim_start_us: start_us,
            task_socket: None,
        };
        let state_dir = config.runtime.state_dir.clone();
        let (sandbox, _events) = Sandbox::start(config, request).await.map_err(told)?;
        let status = self.container(&sandbox, &id, bundle, signals).await;
        if let Err(error) = sandbox.shutdown().await {
            eprintln!(
                "bulkhead: not everything below {} could be given back: {}",
                state_dir.display(),
                chain(&error)
            );
        }
        status.map_err(told)
    }

    async fn container(
        &self,
        sandbox: &Sandbox,
        id: &str,
        bundle: &Path,
        signals: Signals,
    ) -> Result<u32, Error> {
        let raw = if self.tty {
            terminal::Raw::enter().map_err(io_error("set the terminal up"))?
        } else {
            None
        };
        let stdio = self.stdio().map_err(io_error("open standard streams"))?;
        sandbox
            .create(CreateRequest {
                id: id.into(),
                bundle: bundle.into(),
                rootfs: Vec::new(),
                stdio,
            })
            .await?;
        sandbox.start_process(id, None).await?;
        let forward = tokio::spawn(forward(signals, sandbox.clone(), id.to_owned(), self.tty));
        let exit = sandbox.wait(id, None).await;
        forward.abort();
        // Delivers what the command has written.
        let deleted = tokio::time::timeout(DELIVERY * 2, sandbox.delete(id, None)).await;
        drop(raw);
        if let Ok(Err(error)) = deleted {
            tracing::warn!(error = chain(&error), "container not deleted");
        }
        Ok(exit?.status)
    }

    fn stdio(&self) -> std::io::Result<Stdio> {
        let input = terminal::stream(stdin().as_fd(), false)?;
        let output = terminal::stream(stdout().as_fd(), true)?;
        let error = match self.tty {
            true => None,
            false => Some(terminal::stream(stderr().as_fd(), true)?),
        };
        Ok(Stdio {
            terminal: self.tty,
            stdin: Some(input),
            stdout: Some(output),
            stderr: error,
            ..Default::default()
        })
    }
}

fn told(error: Error) -> String {
    chain(&error)
}

fn io_error(step: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::System {
        step: step.into(),
        source,
    }
}

/// A bundle in a directory of its own, removed when dropped.
struct Bundle(PathBuf);

impl Bundle {
    fn create(state_dir: &Path, id: &str) -> Result<Self, String> {
        let path = state_dir.join("run").join(id);
        fs::create_dir_all(&path)
            .map_err(|error| format!("create {} (runtime.state_dir): {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // Names what there is: going through the directory takes a descriptor,
        // and having none left may be why the start failed.
        let _ = fs::remove_file(self.0.join("config.json"));
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("bulkhead: remove {}: {error}", self.0.display());
        }
        // The last one of all.
        if let Some(parent) = self.0.parent() {
            let _ = fs::remove_dir(parent);
        }
    }
}

async fn forward(mut signals: Signals, sandbox: Sandbox, id: String, tty: bool) {
    loop {
        // The command may just have ended, in either case.
        match signals.next().await {
            Some(number) => {
                let _ = sandbox.kill(&id, None, number, false).await;
            }
            None if tty => {
                if let Some((width, height)) = terminal::size() {
                    let _ = sandbox.resize_pty(&id, None, width, height).await;
                }
            }
            None => {}
        }
    }
}
