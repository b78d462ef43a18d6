// SPDX-License-Identifier: Apache-2.0
//! Being the shim: what `start` runs in the background. Standard input is the
//! socket, which listens already.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_runtime::{
    config::{self, Config},
    error::chain,
    spans,
};
use rustix::net::sockopt::socket_acceptconn;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{signal, SignalKind},
    time::sleep,
};
use tracing::Level;
use ttrpc::asynchronous::{transport::Listener, Server};

use crate::{
    flags::Flags,
    forward,
    log::{self, Log},
    options::{Options, OptionsError},
    pod::{Identity, Pod},
    reaper, service,
};

/// Where containerd takes events; not set by CRI-O.
const EVENTS: &str = "TTRPC_ADDRESS";

/// How long the answer to `Shutdown` has to be on its way.
const LAST_ANSWER: Duration = Duration::from_millis(20);

/// How long the last spans have to be sent.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Stack of a thread for blocking work. The default is larger by far than
/// what is ever used of it.
const STACK: usize = 512 * 1024;

/// Why the shim cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A system call failed.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
    /// Standard input is not a socket that listens.
    #[error("standard input is not a listening socket: run by start only")]
    NoSocket,
    /// What was given to `start` for this shim cannot be used.
    #[error("runtime options")]
    Options(#[from] OptionsError),
    /// The service cannot be offered.
    #[error("serve")]
    Serve(#[from] ttrpc::Error),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ServeError {
    move |error| ServeError::System(step, error.into())
}

/// Runs the action, until the pod has ended.
///
/// # Errors
/// When it cannot begin.
pub fn run(flags: &Flags) -> Result<(), ServeError> {
    let (listener, socket) = listener()?;
    // Not to be ended with whoever has run `start`. Fails only for the leader
    // of a group, which is by itself already.
    let _ = rustix::process::setsid();
    let bundle = std::env::current_dir().map_err(step("find the working directory"))?;
    let options = Options::kept(&bundle)?;
    // What is wrong with the configuration is told when a container is made.
    let config = options.configuration().unwrap_or_default();
    set_up_log(flags, &bundle, &config);
    // containerd removes the bundle.
    std::env::set_current_dir("/").map_err(step("leave the bundle"))?;
    reaper::adopt_orphans().map_err(step("adopt orphans"))?;

    let identity = Identity {
        namespace: flags.namespace.clone(),
        group: match flags.group.as_str() {
            "" => flags.id.clone(),
            group => group.into(),
        },
        socket,
        started_us: match flags.started_us {
            0 => bulkhead_runtime::clock::monotonic_us(),
            started_us => started_us,
        },
        options,
    };
    let runtime = runtime().map_err(step("start the event loop"))?;
    let served = runtime.block_on(serve(identity, listener, &config));
    // A thread may be in the middle of something that is of no use any more.
    runtime.shutdown_background();
    served
}

/// One thread for everything that does not block: it is what the VMM dies
/// with.
fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(STACK)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
}

/// The socket that standard input is, and its path.
fn listener() -> Result<(UnixListener, PathBuf), ServeError> {
    let stdin = io::stdin();
    if !matches!(socket_acceptconn(stdin.as_fd()), Ok(true)) {
        return Err(ServeError::NoSocket);
    }
    let socket = stdin
        .as_fd()
        .try_clone_to_owned()
        .map_err(step("take the socket"))?;
    let listener = UnixListener::from(socket);
    let path = listener
        .local_addr()
        .map_err(step("look at the socket"))?
        .as_pathname()
        .map(Path::to_owned)
        .ok_or(ServeError::NoSocket)?;
    let null = File::open("/dev/null").map_err(step("open /dev/null"))?;
    rustix::stdio::dup2_stdin(null).map_err(step("close standard input"))?;
    Ok((listener, path))
}

/// Logs to the bundle's FIFO. Where there is none, to nobody.
fn set_up_log(flags: &Flags, bundle: &Path, config: &Config) {
    let configured = Level::from(config.runtime.log_level);
    let level = match flags.debug {
        true => configured.max(Level::DEBUG),
        false => configured,
    };
    if let Ok(to) = log::open(bundle) {
        Log::new(to, level, &flags.namespace, &flags.group).install();
    }
}

async fn serve(
    identity: Identity,
    listener: UnixListener,
    config: &Config,
) -> Result<(), ServeError> {
    let runtime = &config.runtime;
    let config = &config.shim;
    if !runtime.otlp_endpoint.is_empty() {
        let (namespace, group) = (&identity.namespace, &identity.group);
        if let Err(error) = spans::install(&runtime.otlp_endpoint, namespace, group) {
            tracing::warn!(error = chain(&error), "no spans are sent");
        }
    }
    let listener = Listener::try_from(listener).map_err(step("watch the socket"))?;
    let events = std::env::var(EVENTS).unwrap_or_default();
    let (queue, forwarder) = forward::forwarder(&events, config);
    tokio::spawn(forwarder.run());
    let pod = Pod::new(identity, queue.clone());

    let mut terminate = signal(SignalKind::terminate()).map_err(step("watch signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(step("watch signals"))?;
    let children = pod.clone();
    tokio::spawn(reaper::run(move || children.children()));

    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service::services(&pod));
    server.start().await?;
    tracing::debug!(pid = std::process::id(), "shim serves");

    tokio::select! {
        () = pod.ended() => {}
        _ = terminate.recv() => {
            tracing::info!("terminated: the pod is shut down");
            pod.end().await;
        }
        _ = interrupt.recv() => {
            tracing::info!("interrupted: the pod is shut down");
            pod.end().await;
        }
        () = uncalled(&pod, config) => {
            tracing::warn!("nobody has ever called: the shim ends");
            pod.end().await;
        }
    }
    if !queue
        .drained(Duration::from_millis(config.last_events_timeout_ms))
        .await
    {
        tracing::warn!("containerd has not taken the last events");
    }
    spans::flush(LAST_SPANS).await;
    sleep(LAST_ANSWER).await;
    Ok(())
}

/// Returns if nobody calls for long: `start` was ended before it could tell the
/// address.
async fn uncalled(pod: &Pod, config: &config::Shim) {
    sleep(Duration::from_millis(config.uncalled_timeout_ms)).await;
    if pod.was_called() {
        std::future::pending().await
    }
}
