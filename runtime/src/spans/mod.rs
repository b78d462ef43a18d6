// SPDX-License-Identifier: Apache-2.0
//! OpenTelemetry spans of a front end: one for every call that changes
//! something, and those of the [start timeline](crate::timeline).
//!
//! A process has one collector, as it has one log. Without it a span costs the
//! look at whether there is one. Spans wait in a queue with a bound and are
//! sent by a task of their own: a collector that is slow or gone costs spans,
//! never time.

mod export;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{
        atomic::{AtomicU64, Ordering},
        Mutex, OnceLock, PoisonError,
    },
    time::{Duration, SystemTime},
};

use opentelemetry::{
    propagation::TextMapPropagator as _,
    trace::{
        SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId,
        TraceState,
    },
    Context, InstrumentationScope, KeyValue,
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SpanData};
use rustix::rand::{getrandom, GetRandomFlags};
use tokio::sync::mpsc;

use crate::clock::monotonic_us;

/// Spans that wait at most.
const QUEUE: usize = 512;

static COLLECTOR: OnceLock<Collector> = OnceLock::new();

/// Where this process's spans go.
#[derive(Debug)]
struct Collector {
    queue: mpsc::Sender<Told>,
    lost: AtomicU64,
    /// What the pod's start belongs to: the first caller's span.
    caller: Mutex<Option<SpanContext>>,
}

/// What goes through the queue.
enum Told {
    Span(Box<SpanData>),
    /// To be answered when all before it has been sent, or given up.
    Flush(tokio::sync::oneshot::Sender<()>),
}

/// Why no spans can be sent.
#[derive(Debug, thiserror::Error)]
pub enum SpansError {
    /// The address is none, or not one by HTTP.
    #[error("runtime.otlp_endpoint: {0:?} is not an address as http://127.0.0.1:4318")]
    Endpoint(String),
    /// The exporter cannot be made.
    #[error("OTLP exporter")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
}

/// Whether an address can be a collector's: OTLP over HTTP, in clear, as to a
/// collector of the same node.
///
/// # Errors
/// When it cannot.
pub fn check_endpoint(endpoint: &str) -> Result<(), SpansError> {
    export::authority(endpoint)
        .map(drop)
        .ok_or_else(|| SpansError::Endpoint(endpoint.into()))
}

/// Sends this process's spans to `endpoint` from now on, as those of pod
/// `sandbox`. To be called within the runtime that is to send them; without
/// effect when there is a collector already.
///
/// # Errors
/// The address cannot be one.
pub fn install(endpoint: &str, namespace: &str, sandbox: &str) -> Result<(), SpansError> {
    let exporter = export::exporter(endpoint, namespace, sandbox)?;
    let (queue, told) = mpsc::channel(QUEUE);
    let collector = Collector {
        queue,
        lost: AtomicU64::new(0),
        caller: Mutex::default(),
    };
    if COLLECTOR.set(collector).is_ok() {
        tokio::spawn(export::run(exporter, told));
    }
    Ok(())
}

/// Waits until all spans have been sent, at most so long.
pub async fn flush(limit: Duration) {
    let Some(collector) = COLLECTOR.get() else {
        return;
    };
    let (done, sent) = tokio::sync::oneshot::channel();
    let flushed = async {
        if collector.queue.send(Told::Flush(done)).await.is_ok() {
            // An error: the task is gone, and with it the spans.
            let _ = sent.await;
        }
    };
    if tokio::time::timeout(limit, flushed).await.is_err() {
        tracing::debug!("spans not sent to the end");
    }
    match collector.lost.load(Ordering::Relaxed) {
        0 => {}
        lost => tracing::warn!(lost, "the collector was too slow for some spans"),
    }
}

impl Collector {
    fn send(&self, span: SpanData) {
        if self.queue.try_send(Told::Span(Box::new(span))).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn caller(&self) -> Option<SpanContext> {
        let caller = self.caller.lock();
        caller.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Something that takes its time; told when it has [ended](Span::end).
#[derive(Debug)]
pub struct Span {
    name: &'static str,
    start_us: u64,
    context: SpanContext,
    parent: Option<SpanContext>,
    attributes: Vec<KeyValue>,
}

impl Span {
    /// A call from outside begins. `metadata` came with it and may name the
    /// caller's own span (W3C Trace Context, `traceparent`); a caller that says
    /// that its trace is not sampled gets no span.
    pub fn of_call<'a>(
        name: &'static str,
        metadata: impl IntoIterator<Item = (&'a String, &'a Vec<String>)>,
    ) -> Option<Self> {
        let collector = COLLECTOR.get()?;
        let parent = caller(metadata);
        if let Some(parent) = &parent {
            if !parent.is_sampled() {
                return None;
            }
            let first = collector.caller.lock();
            let mut first = first.unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert_with(|| parent.clone());
        }
        Some(Self::beginning(name, monotonic_us(), parent))
    }

    /// What began at `start_us` of CLOCK_MONOTONIC.
    fn beginning(name: &'static str, start_us: u64, parent: Option<SpanContext>) -> Self {
        let trace = parent
            .as_ref()
            .map_or_else(|| TraceId::from_bytes(random()), SpanContext::trace_id);
        let context = SpanContext::new(
            trace,
            SpanId::from_bytes(random()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        Self {
            name,
            start_us,
            context,
            parent,
            attributes: Vec::new(),
        }
    }

    /// Says more of it. An empty value says nothing.
    pub fn attribute(&mut self, key: &'static str, value: &str) {
        if !value.is_empty() {
            self.attributes
                .push(KeyValue::new(key, String::from(value)));
        }
    }

    /// It is over, and has failed if there is an error.
    pub fn end(self, error: Option<String>) {
        let status = error.map_or(Status::Unset, Status::error);
        self.ended_at(monotonic_us(), SpanKind::Server, status);
    }

    fn ended_at(self, end_us: u64, kind: SpanKind, status: Status) {
        let Some(collector) = COLLECTOR.get() else {
            return;
        };
        let (now_us, now) = (monotonic_us(), SystemTime::now());
        let time = |at_us: u64| now - Duration::from_micros(now_us.saturating_sub(at_us));
        collector.send(SpanData {
            parent_span_id: self
                .parent
                .as_ref()
                .map_or(SpanId::INVALID, SpanContext::span_id),
            parent_span_is_remote: self.parent.as_ref().is_some_and(SpanContext::is_remote),
            span_context: self.context,
            span_kind: kind,
            name: Cow::Borrowed(self.name),
            start_time: time(self.start_us),
            end_time: time(end_us),
            attributes: self.attributes,
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status,
            instrumentation_scope: InstrumentationScope::builder("bulkhead")
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        });
    }
}

/// Tells a pod's start: from `begin_us` on, step by step. Each step ends where
/// the next one begins; one that is not known is left out.
pub fn start(begin_us: u64, steps: &[(&'static str, Option<u64>)]) {
    let Some(collector) = COLLECTOR.get() else {
        return;
    };
    let whole = Span::beginning("start", begin_us, collector.caller());
    let mut from_us = begin_us;
    for (name, end_us) in steps {
        let Some(end_us) = *end_us else { continue };
        let step = Span::beginning(name, from_us, Some(whole.context.clone()));
        step.ended_at(end_us, SpanKind::Internal, Status::Unset);
        from_us = end_us;
    }
    whole.ended_at(from_us, SpanKind::Internal, Status::Unset);
}

/// The span that a call's metadata names.
fn caller<'a>(
    metadata: impl IntoIterator<Item = (&'a String, &'a Vec<String>)>,
) -> Option<SpanContext> {
    let carrier: HashMap<String, String> = metadata
        .into_iter()
        .filter_map(|(key, values)| Some((key.to_ascii_lowercase(), values.first()?.clone())))
        .collect();
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
    let context = context.span().span_context().clone();
    context.is_valid().then_some(context)
}

/// An id. Without randomness from the kernel it is all zeroes, which is no
/// valid id: such spans are not taken by a collector.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // So few bytes come whole, or not at all before the kernel has any.
    let _ = getrandom(&mut bytes, GetRandomFlags::NONBLOCK);
    bytes
}
