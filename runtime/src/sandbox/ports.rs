// SPDX-License-Identifier: Apache-2.0
//! Connections to the pod's loopback interface on the host, as containerd's
//! port-forward makes them, go to that of the guest.

use std::{
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bulkhead_agent_protocol::agent::DialPortRequest;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};

use super::{blocking, Inner};
use crate::{
    error::{chain, Error, Step},
    hypervisor::Hypervisor,
    resource::network::loopback::Loopback,
};

/// Connections at a time; more wait until one of these ends.
const CONNECTIONS: usize = 64;

/// Pause after a failed accept (no descriptors left).
const PAUSE: Duration = Duration::from_millis(100);

/// How long the guest may take to open a stream that it has said it opens.
const ARRIVAL: Duration = Duration::from_secs(10);

/// Serves the namespace at `netns` until the machine ends. A host that cannot
/// have this runs its pods without.
pub async fn serve(inner: Weak<Inner>, netns: PathBuf) {
    let Some(mut ending) = inner.upgrade().map(|inner| inner.vm.ending()) else {
        return;
    };
    let begin = Instant::now();
    let opened = blocking(move || {
        Loopback::open(&netns).step(|| format!("listen in network namespace {}", netns.display()))
    });
    let opened = match opened.await {
        Ok(opened) => TcpListener::from_std(opened.listener)
            .step(|| "watch a socket")
            .map(|listener| (listener, opened.link)),
        Err(error) => Err(error),
    };
    let (listener, _link) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let error = chain(&error);
            tracing::warn!(error, "no port-forward to this pod (needs Linux 5.9)");
            return;
        }
    };
    let took_us = begin.elapsed().as_micros() as u64;
    tracing::debug!(took_us, "ready for port-forward");
    tokio::select! {
        () = accept(&listener, &inner) => {}
        _ = ending.wait_for(Option::is_some) => {}
    }
}

async fn accept(listener: &TcpListener, inner: &Weak<Inner>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // They end with this.
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let connection = match accepted {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!(%error, "connection to the pod's loopback interface not taken");
                sleep(PAUSE).await;
                continue;
            }
        };
        let inner = inner.clone();
        connections.spawn(async move {
            let _place = place;
            if let Err(error) = relay(connection, &inner).await {
                tracing::debug!(error = chain(&error), "port-forward");
            }
        });
    }
}

/// Connects to the port of the guest that the connection is for, and moves
/// bytes until both sides have ended.
async fn relay(mut near: TcpStream, inner: &Weak<Inner>) -> Result<(), Error> {
    let mut far = match dial(&near, inner).await {
        Ok(far) => far,
        Err(error) => {
            // As a port that nobody listens at: a reset, and no orderly end.
            let _ = rustix::net::sockopt::set_socket_linger(&near, Some(Duration::ZERO));
            return Err(error);
        }
    };
    // How it ends is the two sides' matter.
    let _ = copy_bidirectional(&mut near, &mut far).await;
    Ok(())
}

async fn dial(near: &TcpStream, inner: &Weak<Inner>) -> Result<UnixStream, Error> {
    let port = near.local_addr().step(|| "look at a connection")?.port();
    let gone = || Error::Internal("the pod is gone".into());
    let (agent, expected) = {
        let inner = inner.upgrade().ok_or_else(gone)?;
        (inner.agent.clone(), inner.streams.expect())
    };
    let request = DialPortRequest {
        port: port.into(),
        stream: expected.id(),
        ..Default::default()
    };
    agent.dial_port(request).await?;
    let stream = expected.arrival(ARRIVAL).await.ok_or_else(|| {
        Error::Timeout(format!("the guest did not open its stream for port {port}"))
    })?;
    UnixStream::from_std(stream.into()).step(|| "watch a stream")
}
