// SPDX-License-Identifier: Apache-2.0
//! `serve`: the shim itself. One process a pod, one thread for everything
//! but what blocks.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bulkhead_runtime::config::Config;
use bulkhead_shim_protocol::{shim_ttrpc, shim_v3_ttrpc};
use tokio::{
    signal::unix::{signal, SignalKind},
    sync::mpsc::unbounded_channel,
    time::timeout,
};
use ttrpc::asynchronous::{transport::Listener, Server};

use crate::{
    events,
    flags::Flags,
    log::{self, Log},
    service::{Pod, Service},
    socket,
};

/// How long events may take to be sent, and an answer to be read, once the
/// pod is gone.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long the first container may take to be asked for. Nobody will ask
/// where containerd gave up on `start`.
const UNUSED: Duration = Duration::from_secs(120);

/// Why the shim cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The ttrpc server did not start.
    #[error("serve the task service")]
    Server(#[source] ttrpc::Error),
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::System { step, source }
}

/// Runs the action; returns when the pod is gone.
///
/// # Errors
/// When it cannot serve.
pub fn run(flags: &Flags) -> Result<(), ServeError> {
    // Signals of containerd's terminal are not for us. Fails for the leader of
    // a group, which then has one of its own.
    let _ = rustix::process::setsid();
    let bundle = std::env::current_dir().map_err(step("find the working directory"))?;
    // A configuration that cannot be read is told when a container is asked
    // for, where somebody sees it.
    let level = match flags.debug {
        true => tracing::Level::DEBUG,
        false => Config::load(None).map_or(tracing::Level::INFO, |config| {
            config.runtime.log_level.into()
        }),
    };
    if let Ok(file) = log::open(&bundle) {
        Log::new(file, level, &flags.namespace, &flags.group).install();
    }
    let listener = take_listener().map_err(step("take the socket over from standard input"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Mounts and the network, at times; they do not stay.
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(step("start the event loop"))?;
    let result = runtime.block_on(serve(flags, &bundle, listener));
    runtime.shutdown_background();
    result
}

/// The socket is standard input; /dev/null takes its place.
fn take_listener() -> io::Result<UnixListener> {
    let stdin = io::stdin();
    let listener: OwnedFd = stdin.as_fd().try_clone_to_owned()?;
    let null = std::fs::OpenOptions::new().read(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn serve(flags: &Flags, bundle: &Path, listener: UnixListener) -> Result<(), ServeError> {
    let socket: Option<PathBuf> = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Into::into));
    let (messages, outgoing) = unbounded_channel();
    let address = std::env::var("TTRPC_ADDRESS")
        .ok()
        .filter(|address| !address.is_empty());
    let sending = tokio::spawn(events::send(outgoing, flags.namespace.clone(), address));
    let pod = Arc::new(Pod::new(flags, bundle, messages));
    let service = Arc::new(Service::new(pod.clone()));
    let listener = Listener::try_from(listener).map_err(step("watch the socket"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(shim_ttrpc::create_task(service.clone()))
        .register_service(shim_v3_ttrpc::create_task(service));
    let mut terminate = signal(SignalKind::terminate()).map_err(step("watch signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(step("watch signals"))?;
    server.start().await.map_err(ServeError::Server)?;
    tokio::select! {
        () = pod.stopped() => {}
        () = unused(&pod) => tracing::warn!("no container was asked for: the shim goes"),
        _ = terminate.recv() => tracing::warn!("terminated"),
        _ = interrupt.recv() => tracing::warn!("interrupted"),
    }
    // Before anything else: a shim that is going is not to be found any more.
    server.stop_listen().await;
    if let Some(path) = socket {
        if let Err(error) = socket::remove(&path) {
            tracing::warn!(%error, path = %path.display(), "socket not removed");
        }
    }
    pod.shut_down().await;
    pod.close_events();
    // The answer to Shutdown is on its way, and so may events be.
    let _ = timeout(FAREWELL, sending).await;
    let _ = timeout(FAREWELL, server.shutdown()).await;
    Ok(())
}

/// Returns when nobody has asked for a container for too long.
async fn unused(pod: &Pod) {
    tokio::time::sleep(UNUSED).await;
    if pod.was_used() {
        std::future::pending::<()>().await;
    }
}
