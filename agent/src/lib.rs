// SPDX-License-Identifier: Apache-2.0
//! PID 1 of a Bulkhead guest: mounts what a guest needs, calls the host, and
//! runs containers as the host asks (OCI runtime specification).
//!
//! The agent has one thread and never starts another: a child made by clone3
//! is then a process in order, and may set a container up in plain Rust.
//!
//! For tests it also runs outside a guest, where it changes nothing but what
//! is a container's own:
//!
//! ```text
//! bulkhead-agent --test-socket RPC-SOCKET --test-streams STREAM-SOCKET --test-cgroup DIRECTORY
//! ```

mod allowed;
mod boot;
mod cgroup;
mod child;
mod container;
mod devices;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guest;
mod log;
mod mirror;
mod netlink;
mod processors;
mod reaper;
mod sandbox;
mod seccomp;
mod service;
mod stdio;
mod steps;
mod sys;
mod test_mode;
mod transport;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use bulkhead_agent_protocol::{agent_ttrpc, MIRRORS};
use nix::sys::reboot::{reboot, RebootMode};
use tokio::sync::mpsc;

use cgroup::Hierarchy;
use container::process::Shared;
use container::Containers;
use error::{AgentError, Context, Result};
use reaper::Reaper;
use sandbox::Times;
use service::Service;
use stdio::dial::Dialer;
use sys::host;

/// Runs the agent: as PID 1 the guest's, else that of a test.
pub fn main() -> ExitCode {
    let times = Arc::new(Times {
        start_ns: host::monotonic_ns(),
        ready_ns: AtomicU64::new(0),
    });
    sys::process::ignore_no_signals();
    let result = if std::process::id() == 1 {
        guest(times)
    } else {
        test_mode::run(times)
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For PID 1 the end is a kernel panic, which the host sees.
            error!("msg=\"the agent ends\" error=\"{error}\"");
            ExitCode::FAILURE
        }
    }
}

fn guest(times: Arc<Times>) -> Result<()> {
    let hierarchy = boot::boot()?;
    info!("msg=\"booted\" version={}", env!("CARGO_PKG_VERSION"));
    runtime()?.block_on(async {
        let (shutdown, mut requests) = mpsc::unbounded_channel();
        let around = Around {
            dialer: Dialer::Vsock,
            hierarchy,
            mirrors: MIRRORS.into(),
            in_guest: true,
        };
        let service = service(around, times.clone(), shutdown)?;
        let hierarchy = service.1;
        let cmdline = std::fs::read_to_string("/proc/cmdline").step(|| "read /proc/cmdline")?;
        let services = agent_ttrpc::create_agent(Arc::new(service.0));
        let services = allowed::only(services, allowed::in_cmdline(&cmdline))?;
        tokio::select! {
            result = transport::serve_host(services, &times) => result,
            _ = requests.recv() => power_off(&hierarchy).await,
        }
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .step(|| "start runtime")
}

/// What differs between a guest and a test.
struct Around {
    dialer: Dialer,
    hierarchy: Hierarchy,
    mirrors: PathBuf,
    in_guest: bool,
}

/// The service with what it stands on.
fn service(
    around: Around,
    times: Arc<Times>,
    shutdown: mpsc::UnboundedSender<()>,
) -> Result<(Service, Hierarchy)> {
    let shared = Shared {
        reaper: Reaper::start().step(|| "watch children")?,
        dialer: around.dialer,
        hierarchy: around.hierarchy.clone(),
        mirrors: around.mirrors,
        pid_namespace: File::open("/proc/self/ns/pid")
            .step(|| "open pid namespace")?
            .into(),
        in_guest: around.in_guest,
    };
    let containers = Containers::new(Arc::new(shared));
    Ok((Service::new(containers, times, shutdown), around.hierarchy))
}

/// Ends everything and the machine.
async fn power_off(hierarchy: &Hierarchy) -> Result<()> {
    // The reply to the request is on its way; it may or may not arrive.
    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    if let Err(error) = hierarchy.kill_all().await {
        warn!("msg=\"containers left at power off\" error=\"{error}\"");
    }
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(errno) => Err(AgentError::Step {
            step: "power off".into(),
            errno,
        }),
    }
}
