// SPDX-License-Identifier: Apache-2.0
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

fn metadata(traceparent: &str) -> HashMap<String, Vec<String>> {
    [("traceparent".to_owned(), vec![traceparent.to_owned()])].into()
}

const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn callers_are_known_by_their_traceparent() {
    let caller = super::caller(&metadata(SAMPLED)).expect("a caller");
    assert_eq!(
        caller.trace_id().to_string(),
        "0af7651916cd43dd8448eb211c80319c"
    );
    assert!(caller.is_sampled() && caller.is_remote());
    for bad in ["", "00-0-0-01", "\n", &"f".repeat(100_000)] {
        assert!(super::caller(&metadata(bad)).is_none(), "{bad:.20}");
    }
    assert!(super::caller(&HashMap::new()).is_none());
}

#[test]
fn addresses_are_those_of_a_collector_in_clear() {
    for good in [
        "http://127.0.0.1:4318",
        "http://[::1]:4318/",
        "http://collector/otlp",
    ] {
        assert!(check_endpoint(good).is_ok(), "{good}");
    }
    for bad in [
        "",
        "127.0.0.1:4318",
        "https://collector:4318",
        "http://",
        "http://x/?y",
        "unix:///run/otel",
    ] {
        let error = check_endpoint(bad).expect_err(bad).to_string();
        assert!(error.starts_with("runtime.otlp_endpoint:"), "{error}");
    }
}

/// The body of one request, which is answered.
async fn request(stream: &mut TcpStream) -> (String, Value) {
    let mut read = Vec::new();
    let end = loop {
        let mut some = [0; 4096];
        let length = stream.read(&mut some).await.unwrap();
        assert!(length > 0, "a whole request");
        read.extend_from_slice(&some[..length]);
        if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8(read[..end].to_vec())
        .unwrap()
        .to_lowercase();
    let length: usize = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .expect("a length")
        .parse()
        .unwrap();
    let mut body = read[end..].to_vec();
    let have = body.len();
    body.resize(length, 0);
    stream.read_exact(&mut body[have..]).await.unwrap();
    let answer =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    stream.write_all(answer).await.unwrap();
    (head, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn spans_arrive_at_the_collector() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}/", listener.local_addr().unwrap());
    // Before there is a collector there are no spans.
    assert!(Span::of_call("Early", &metadata(SAMPLED)).is_none());
    install(&endpoint, "k8s.io", "pod-1").unwrap();

    let unsampled = SAMPLED.replace("-01", "-00");
    assert!(Span::of_call("Unsampled", &metadata(&unsampled)).is_none());
    let mut call = Span::of_call("Create", &metadata(SAMPLED)).unwrap();
    call.attribute("container.id", "c1");
    call.attribute("bulkhead.exec.id", "");
    call.end(Some("no such file".into()));
    let now = monotonic_us();
    start(
        now - 3000,
        &[
            ("start.shim", Some(now - 2000)),
            ("start.vmm", None),
            ("start.guest", Some(now)),
        ],
    );
    let flushed = tokio::spawn(flush(Duration::from_secs(30)));
    let (mut stream, _) = listener.accept().await.unwrap();
    let (head, body) = request(&mut stream).await;
    flushed.await.unwrap();

    assert!(head.starts_with("post /v1/traces http/1.1"), "{head}");
    let resource = body["resourceSpans"][0]["resource"]["attributes"].to_string();
    for said in ["service.name", "k8s.io", "pod-1"] {
        assert!(resource.contains(said), "{resource}");
    }
    let spans = body["resourceSpans"][0]["scopeSpans"][0]["spans"]
        .as_array()
        .expect("spans");
    let span = |name: &str| {
        let found = spans.iter().find(|span| span["name"] == name);
        found.unwrap_or_else(|| panic!("no {name} among {spans:?}"))
    };
    assert_eq!(spans.len(), 4);
    let call = span("Create");
    assert_eq!(call["parentSpanId"], "b7ad6b7169203331");
    assert_eq!(call["attributes"].as_array().map(Vec::len), Some(1));
    assert_eq!(call["status"]["message"], "no such file");
    let whole = span("start");
    assert_eq!(whole["parentSpanId"], "b7ad6b7169203331");
    let time = |span: &Value, which: &str| -> u64 {
        span[which].as_str().expect("nanoseconds").parse().unwrap()
    };
    let (shim, guest) = (span("start.shim"), span("start.guest"));
    for step in [shim, guest] {
        assert_eq!(step["parentSpanId"], whole["spanId"]);
        assert_eq!(step["traceId"], "0af7651916cd43dd8448eb211c80319c");
    }
    let lasts = |span| time(span, "endTimeUnixNano") - time(span, "startTimeUnixNano");
    assert_eq!((lasts(shim), lasts(guest)), (1_000_000, 2_000_000));
    assert_eq!(lasts(whole), 3_000_000);
}

#[tokio::test]
async fn a_collector_that_is_not_there_costs_spans_only() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let exporter = export::exporter(&endpoint, "k8s.io", "pod-1").unwrap();
    let (queue, told) = mpsc::channel(4);
    let task = tokio::spawn(export::run(exporter, told));
    let (done, sent) = tokio::sync::oneshot::channel();
    queue.send(Told::Flush(done)).await.expect("a queue");
    sent.await.expect("an answer");
    drop(queue);
    task.await.expect("the task ends with the queue");
}
