// SPDX-License-Identifier: Apache-2.0
//! Sending spans: OTLP over HTTP/1.1 as JSON (opentelemetry-proto §OTLP/HTTP),
//! some together.

use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{client::conn::http1, header, http::uri::Scheme, Uri};
use hyper_util::rt::TokioIo;
use opentelemetry::KeyValue;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{trace::SpanExporter as _, Resource};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{sleep, timeout, Instant},
};

use super::{SpansError, Told};

/// Most spans in one request.
const TOGETHER: usize = 64;

/// How long a span waits for others.
const WAIT: Duration = Duration::from_secs(1);

/// How long a collector may take for a request.
const ANSWER: Duration = Duration::from_secs(5);

/// Most that is read of an answer, bytes.
const LONGEST_ANSWER: usize = 64 * 1024;

/// How often it is told that a collector does not take spans.
const COMPLAINTS: Duration = Duration::from_secs(60);

/// Host and port of an address that spans can be sent to.
pub fn authority(endpoint: &str) -> Option<(String, u16)> {
    let uri: Uri = endpoint.parse().ok()?;
    if uri.scheme() != Some(&Scheme::HTTP) || uri.query().is_some() {
        return None;
    }
    let host = uri.host().filter(|host| !host.is_empty())?;
    // As in [::1].
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some((host.into(), uri.port_u16().unwrap_or(80)))
}

/// An exporter to `endpoint`, whose spans are those of a pod.
pub fn exporter(
    endpoint: &str,
    namespace: &str,
    sandbox: &str,
) -> Result<SpanExporter, SpansError> {
    let (host, port) = authority(endpoint).ok_or_else(|| SpansError::Endpoint(endpoint.into()))?;
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client { host, port })
        .with_protocol(Protocol::HttpJson)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .with_timeout(ANSWER)
        .build()?;
    let resource = Resource::builder_empty()
        .with_service_name("bulkhead")
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("bulkhead.namespace", String::from(namespace)),
            KeyValue::new("bulkhead.sandbox", String::from(sandbox)),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ])
        .build();
    exporter.set_resource(&resource);
    Ok(exporter)
}

/// Sends what comes, until nothing can come any more.
pub async fn run(exporter: SpanExporter, mut queue: mpsc::Receiver<Told>) {
    let mut complained: Option<Instant> = None;
    while let Some(first) = queue.recv().await {
        let mut spans = Vec::new();
        let mut flushed = Vec::new();
        let mut next = Some(first);
        let enough = sleep(WAIT);
        tokio::pin!(enough);
        loop {
            match next.take() {
                Some(Told::Span(span)) => spans.push(*span),
                Some(Told::Flush(done)) => flushed.push(done),
                None => break,
            }
            if spans.len() >= TOGETHER || !flushed.is_empty() {
                break;
            }
            tokio::select! {
                told = queue.recv() => next = told,
                () = &mut enough => {}
            }
        }
        let count = spans.len();
        if count > 0 {
            let sent = exporter.export(spans).await;
            if let Err(error) = sent {
                let quiet = complained.is_some_and(|at| at.elapsed() < COMPLAINTS);
                if !quiet {
                    complained = Some(Instant::now());
                    tracing::warn!(%error, count, "spans not sent");
                }
            }
        }
        for done in flushed {
            // Whoever waited may have given up.
            let _ = done.send(());
        }
    }
}

/// A connection for each request: there are few, far apart.
#[derive(Debug)]
struct Client {
    host: String,
    port: u16,
}

impl Client {
    async fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the sender.
        let connection = tokio::spawn(connection);
        let (mut parts, body) = request.into_parts();
        let host = format!("{}:{}", self.host, self.port).parse()?;
        parts.headers.insert(header::HOST, host);
        parts.uri = parts.uri.path().parse()?;
        let response = sender
            .send_request(Request::from_parts(parts, Full::new(body)))
            .await?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, LONGEST_ANSWER)
            .collect()
            .await?
            .to_bytes();
        connection.abort();
        Ok(Response::from_parts(parts, body))
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        timeout(ANSWER, self.send(request)).await?
    }
}
