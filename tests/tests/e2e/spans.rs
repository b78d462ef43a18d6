// SPDX-License-Identifier: Apache-2.0
//! The spans that a pod's shim sends to an OpenTelemetry collector.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{ensure, Context as _, Result};
use serde_json::Value;

use crate::cli::with_config;
use crate::context::{same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![a_collector_is_told_of_a_pods_calls_and_start];

/// Takes spans as a collector does: OTLP over HTTP, as JSON.
struct Collector {
    endpoint: String,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Collector {
    fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let taken = Arc::clone(&requests);
        // Ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                match take(stream) {
                    Ok(request) => taken
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(request),
                    Err(error) => eprintln!("collector: {error:#}"),
                }
            }
        });
        Ok(Self { endpoint, requests })
    }

    /// All spans so far.
    fn spans(&self) -> Vec<Value> {
        let requests = self.requests.lock();
        let requests = requests.unwrap_or_else(PoisonError::into_inner);
        let scopes = requests
            .iter()
            .flat_map(|request| array(&request["resourceSpans"]));
        scopes
            .flat_map(|resource| array(&resource["scopeSpans"]))
            .flat_map(|scope| array(&scope["spans"]))
            .collect()
    }
}

fn array(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn take(stream: TcpStream) -> Result<Value> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let line = line.trim_end().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    reader.get_mut().write_all(answer.as_bytes())?;
    serde_json::from_slice(&body).context("a request as JSON")
}

fn a_collector_is_told_of_a_pods_calls_and_start(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let before = context.listing()?;
    let collector = Collector::start()?;
    let line = format!("[runtime]\notlp_endpoint = \"{}\"\n", collector.endpoint);
    let text = context.config.toml().replace("[runtime]\n", &line);
    let pod = with_config(context, &text, || {
        context.detached(&[], &["sh", "-c", "echo up; exec sleep 1000"])
    })?;
    pod.exec(&["true"])?.ok()?;
    let id = pod.id.clone();
    pod.remove()?;

    let wanted = [
        "Create",
        "Start",
        "Exec",
        "Kill",
        "Delete",
        "start",
        "start.shim",
        "start.vmm",
        "start.guest",
        "start.sandbox",
        "start.container",
        "start.output",
    ];
    let names = |collector: &Collector| -> Vec<String> {
        let spans = collector.spans();
        let names = spans.iter().filter_map(|span| span["name"].as_str());
        names.map(str::to_owned).collect()
    };
    let arrived = until(LIMIT, "all spans", || {
        let names = names(&collector);
        Ok(wanted.iter().all(|name| names.iter().any(|n| n == name)))
    });
    arrived.with_context(|| format!("there are {:?}", names(&collector)))?;

    let spans = collector.spans();
    let named = |name: &str| spans.iter().find(|span| span["name"] == name);
    let whole = named("start").context("start")?;
    for step in spans.iter().filter(|span| {
        span["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("start."))
    }) {
        same(&step["parentSpanId"], &whole["spanId"])?;
    }
    let create = named("Create").context("Create")?;
    ensure!(create.to_string().contains(&id), "{create} is not of {id}");
    let requests = collector
        .requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    for request in requests.iter() {
        let resource = request["resourceSpans"][0]["resource"].to_string();
        ensure!(
            resource.contains("service.name") && resource.contains(&id),
            "{resource} is not of pod {id}"
        );
    }
    drop(requests);
    context.nothing_left(&before, LIMIT)
}
