// SPDX-License-Identifier: Apache-2.0
//! Metrics for Prometheus: a Unix stream socket that answers HTTP GET, as in
//! `curl --unix-socket /run/bulkhead/ksm-metrics.sock http://localhost/metrics`.

use std::{
    fmt::Write as _,
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use crate::{
    controller::{Decision, Totals},
    group, socket,
    sysfs::{Counters, Ksm},
    KsmError,
};

/// How long one client may take to ask and to listen; others wait meanwhile.
const PATIENCE: Duration = Duration::from_millis(500);

/// Longest question.
const LONGEST: usize = 8192;

/// What the daemon tells; what the kernel tells is read when asked.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    /// Since the daemon's start.
    pub totals: Totals,
    /// What ksmd is to do now.
    pub decision: Decision,
    /// The bound, as a part of one processor.
    pub cpu_share: f64,
    /// Pods heard of.
    pub pods: Pods,
}

/// Pods that have started and asked for a merge group, since the daemon's start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pods {
    /// Got it.
    pub merged: u64,
    /// Did not, because another group has mergeable memory.
    pub refused: u64,
}

/// The place where the daemon leaves it.
pub type Board = Arc<Mutex<Told>>;

/// Starts to listen. To be called before there are threads, and once.
///
/// # Errors
/// [`KsmError::Listen`].
pub fn listen(path: &Path) -> Result<UnixListener, KsmError> {
    socket::make_parent(path)
        .and_then(|()| socket::bound(path, |path| UnixListener::bind(path)))
        .map_err(|source| KsmError::Listen {
            path: path.into(),
            source,
        })
}

/// Answers on a thread of its own, for as long as the process lives.
///
/// # Errors
/// [`KsmError::System`]: there is no thread.
pub fn serve(
    listener: UnixListener,
    ksm: Ksm,
    group: PathBuf,
    board: Board,
) -> Result<(), KsmError> {
    let answer_all = move || {
        for client in listener.incoming() {
            let answered = client.and_then(|client| answer(client, &ksm, &group, &board));
            if let Err(error) = answered {
                tracing::debug!(%error, "metrics not delivered");
                // Out of descriptors, say: not at full speed.
                thread::sleep(Duration::from_millis(10));
            }
        }
    };
    thread::Builder::new()
        .name("metrics".into())
        .spawn(answer_all)
        .map(drop)
        .map_err(|source| KsmError::System {
            step: "start a thread",
            source,
        })
}

fn answer(mut client: UnixStream, ksm: &Ksm, group: &Path, board: &Board) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut question = Vec::new();
    let mut part = [0; 1024];
    while !question.windows(4).any(|end| end == b"\r\n\r\n") {
        match client.read(&mut part)? {
            0 => return Ok(()),
            _ if question.len() > LONGEST => return Err(io::ErrorKind::InvalidData.into()),
            count => question.extend(&part[..count]),
        }
    }
    let told = *board.lock().unwrap_or_else(PoisonError::into_inner);
    let (status, body) = match path_of(&question) {
        Some("/" | "/metrics") => match ksm.counters() {
            Ok(counters) => {
                let group = group::current(group).unwrap_or_else(|error| {
                    tracing::debug!(%error, "the merge group is not known");
                    None
                });
                ("200 OK", text(&told, &counters, group.as_ref()))
            }
            Err(error) => ("500 Internal Server Error", format!("{error}\n")),
        },
        Some(_) => ("404 Not Found", "the metrics are at /metrics\n".into()),
        None => ("405 Method Not Allowed", "only GET is answered\n".into()),
    };
    let length = body.len();
    client.write_all(
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
        .as_bytes(),
    )
}

/// What a GET asks for.
fn path_of(question: &[u8]) -> Option<&str> {
    let line = question.split(|byte| *byte == b'\r').next()?;
    let target = std::str::from_utf8(line).ok()?.strip_prefix("GET ")?;
    let target = target.split(' ').next()?;
    target.split('?').next()
}

/// In Prometheus's text format.
fn text(told: &Told, counters: &Counters, group: Option<&group::Name>) -> String {
    let Told {
        totals,
        decision,
        cpu_share,
        pods,
    } = told;
    let is = |yes: bool| f64::from(u8::from(yes));
    let rows: [(&str, &str, &str, f64); 19] = [
        (
            "active",
            "gauge",
            "Whether a run is under way",
            is(*decision != Decision::Idle),
        ),
        (
            "paused",
            "gauge",
            "Whether ksmd stands still in a run, for its bound",
            is(*decision == Decision::Pause),
        ),
        ("kicks_total", "counter", "Kicks heard", totals.kicks as f64),
        (
            "pods_merged_total",
            "counter",
            "Pods started with mergeable memory",
            pods.merged as f64,
        ),
        (
            "pods_refused_total",
            "counter",
            "Pods started without, because another merge group has mergeable memory",
            pods.refused as f64,
        ),
        ("runs_total", "counter", "Runs begun", totals.runs as f64),
        (
            "pauses_total",
            "counter",
            "Steps after which ksmd stood still for its bound",
            totals.pauses as f64,
        ),
        (
            "scans_total",
            "counter",
            "Full scans in runs",
            totals.scans as f64,
        ),
        (
            "merged_pages_total",
            "counter",
            "Pages of 4 KiB newly saved in runs",
            totals.merged as f64,
        ),
        (
            "cpu_seconds_total",
            "counter",
            "Processor time of ksmd in runs",
            totals.cpu.as_secs_f64(),
        ),
        (
            "cpu_share_limit",
            "gauge",
            "Bound on ksmd in a run, as a part of one processor",
            *cpu_share,
        ),
        (
            "profit_pages_per_cpu_second",
            "gauge",
            "Pages saved per second of processor time, in the last full scan",
            totals.profit,
        ),
        (
            "pages_shared",
            "gauge",
            "Pages that others share",
            counters.pages_shared as f64,
        ),
        (
            "pages_sharing",
            "gauge",
            "Pages saved by sharing",
            counters.pages_sharing as f64,
        ),
        (
            "pages_unshared",
            "gauge",
            "Pages found unique",
            counters.pages_unshared as f64,
        ),
        (
            "pages_volatile",
            "gauge",
            "Pages that changed too fast or were seen once",
            counters.pages_volatile as f64,
        ),
        (
            "zero_pages",
            "gauge",
            "Pages replaced by the zero page",
            counters.zero_pages as f64,
        ),
        (
            "pages_to_scan",
            "gauge",
            "Pages that ksmd looks at before it sleeps",
            counters.pages_to_scan as f64,
        ),
        (
            "sleep_seconds",
            "gauge",
            "How long ksmd then sleeps",
            counters.sleep_millisecs as f64 / 1000.0,
        ),
    ];
    let mut text = String::new();
    for (name, kind, help, value) in rows {
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "# HELP bulkhead_ksm_{name} {help}.\n# TYPE bulkhead_ksm_{name} {kind}\nbulkhead_ksm_{name} {value}\n"
        );
    }
    if let Some(group) = group {
        // A name needs no escaping.
        let _ = write!(
            text,
            "# HELP bulkhead_ksm_merge_group_info The one merge group that has mergeable memory.\n\
             # TYPE bulkhead_ksm_merge_group_info gauge\nbulkhead_ksm_merge_group_info{{group=\"{group}\"}} 1\n"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn get_alone_is_understood() {
        assert_eq!(path_of(b"GET /metrics HTTP/1.1\r\n\r\n"), Some("/metrics"));
        assert_eq!(
            path_of(b"GET /metrics?x=1 HTTP/1.1\r\n\r\n"),
            Some("/metrics")
        );
        assert_eq!(path_of(b"POST /metrics HTTP/1.1\r\n\r\n"), None);
        assert_eq!(path_of(b"\xff\r\n\r\n"), None);
    }

    #[test]
    fn every_metric_has_help_and_type() {
        let told = Told {
            totals: Totals {
                kicks: 3,
                cpu: Duration::from_millis(1500),
                ..Totals::default()
            },
            decision: Decision::Pause,
            cpu_share: 0.2,
            pods: Pods {
                merged: 5,
                refused: 2,
            },
        };
        let counters = Counters {
            pages_sharing: 21_504,
            ..Counters::default()
        };
        let text = text(&told, &counters, Some(&"red".parse().unwrap()));
        for line in [
            "bulkhead_ksm_active 1",
            "bulkhead_ksm_kicks_total 3",
            "bulkhead_ksm_pods_merged_total 5",
            "bulkhead_ksm_pods_refused_total 2",
            "bulkhead_ksm_merge_group_info{group=\"red\"} 1",
            "bulkhead_ksm_cpu_seconds_total 1.5",
            "bulkhead_ksm_cpu_share_limit 0.2",
            "bulkhead_ksm_pages_sharing 21504",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
        let values = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(text.lines().count(), 3 * values);
    }
}
