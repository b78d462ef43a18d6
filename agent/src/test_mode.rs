// SPDX-License-Identifier: Apache-2.0
//! The agent outside a guest, for tests: it serves a Unix socket, its stdio
//! streams go to another, and it leaves the machine as it is.

use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_agent_protocol::agent_ttrpc;
use tokio::sync::mpsc;
use ttrpc::r#async::Server;

use crate::cgroup::Hierarchy;
use crate::error::{AgentError, Context, Result};
use crate::sandbox::Times;
use crate::stdio::dial::Dialer;
use crate::sys::process::prctl;

const USAGE: &str = "bulkhead-agent is PID 1 of a guest; elsewhere it needs \
    --test-socket PATH --test-streams PATH --test-cgroup PATH [--test-rpcs LIST]";

/// Runs until Shutdown is called.
///
/// # Errors
/// Wrong arguments, or a step that failed.
pub fn run(times: Arc<Times>) -> Result<()> {
    let (socket, streams, group, calls) = arguments()?;
    // As PID 1 would: orphans come here.
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1).step(|| "become reaper")?;
    crate::runtime()?.block_on(async {
        let hierarchy = Hierarchy::for_tests(&group)?;
        let (shutdown, mut requests) = mpsc::unbounded_channel();
        let around = crate::Around {
            dialer: Dialer::Unix(streams),
            hierarchy,
            mirrors: socket.with_file_name("mirrors"),
            in_guest: false,
        };
        let (service, hierarchy) = crate::service(around, times, shutdown)?;
        let failed = |error: ttrpc::Error| AgentError::Internal(format!("serve: {error}"));
        let services = agent_ttrpc::create_agent(Arc::new(service));
        let services = crate::allowed::only(services, calls.as_deref())?;
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .map_err(failed)?
            .register_service(services);
        server.start().await.map_err(failed)?;
        requests.recv().await;
        // Let the reply out.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        hierarchy.kill_all().await?;
        hierarchy.remove_all();
        Ok(())
    })
}

fn arguments() -> Result<(PathBuf, PathBuf, PathBuf, Option<String>)> {
    let usage = || AgentError::Invalid(USAGE.into());
    let mut given = std::env::args_os().skip(1);
    let (mut socket, mut streams, mut group, mut calls) = (None, None, None, None);
    while let Some(name) = given.next() {
        let place = match name.to_str() {
            Some("--test-socket") => &mut socket,
            Some("--test-streams") => &mut streams,
            Some("--test-cgroup") => &mut group,
            Some("--test-rpcs") => {
                let list = given.next().and_then(|list| list.into_string().ok());
                calls = Some(list.ok_or_else(usage)?);
                continue;
            }
            _ => return Err(usage()),
        };
        *place = Some(PathBuf::from(given.next().ok_or_else(usage)?));
    }
    match (socket, streams, group) {
        (Some(socket), Some(streams), Some(group)) => Ok((socket, streams, group, calls)),
        _ => Err(usage()),
    }
}
