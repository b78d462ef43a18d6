// SPDX-License-Identifier: Apache-2.0
//! Streams to ports of the loopback interface.

mod common;

use bulkhead_agent_protocol::agent;
use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::timeout;
use ttrpc::Code;

/// Asks for a stream to a port; `None` for the id is a fresh one.
async fn dial(rig: &Rig, port: u32, id: Option<u64>) -> ttrpc::Result<UnixStream> {
    let (fresh, arrival) = rig.stream();
    let request = agent::DialPortRequest {
        port,
        stream: id.unwrap_or(fresh),
        ..Default::default()
    };
    rig.client.dial_port(rig.context(), &request).await?;
    Ok(timeout(PATIENCE, arrival).await.unwrap().unwrap())
}

async fn pair(rig: &Rig, address: &str) -> (UnixStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let stream = dial(rig, port.into(), None).await.unwrap();
    let (accepted, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    (stream, accepted)
}

fn code(result: ttrpc::Result<UnixStream>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn each_way_ends_by_itself() {
    let rig = Rig::start().await;
    for address in ["127.0.0.1", "::1"] {
        let (mut stream, mut server) = pair(&rig, address).await;
        let sent = vec![7; 3_000_000];
        let (_, received) = tokio::join!(
            async {
                stream.write_all(&sent).await.unwrap();
                stream.shutdown().await.unwrap();
            },
            async {
                let mut received = Vec::new();
                server.read_to_end(&mut received).await.unwrap();
                received
            }
        );
        assert!(received == sent, "{address}: {} bytes", received.len());
        // The other way is still open.
        server.write_all(b"counted").await.unwrap();
        drop(server);
        let mut answer = String::new();
        let read = timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
        read.unwrap().unwrap();
        assert_eq!(answer, "counted");
    }
}

#[tokio::test]
async fn a_server_that_goes_away_ends_the_stream() {
    let rig = Rig::start().await;
    let (mut stream, server) = pair(&rig, "127.0.0.1").await;
    stream.write_all(b"unread").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    // An end or an error, but no waiting.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer))
        .await
        .unwrap();
    assert!(answer.is_empty());
}

#[tokio::test]
async fn what_cannot_be_dialled_is_said() {
    let rig = Rig::start().await;
    let free = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let (kind, text) = code(dial(&rig, free.into(), None).await);
    assert_eq!(kind, Code::INTERNAL);
    assert!(
        text.contains(&format!("port {free}")) && text.contains("ECONNREFUSED"),
        "{text}"
    );
    for port in [0, 65_536] {
        let (kind, text) = code(dial(&rig, port, None).await);
        assert_eq!(kind, Code::INVALID_ARGUMENT);
        assert!(text.contains(&format!("port: {port}")), "{text}");
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (kind, text) = code(dial(&rig, port.into(), Some(0)).await);
    assert_eq!(kind, Code::INVALID_ARGUMENT);
    assert!(text.contains("stream"), "{text}");
}
