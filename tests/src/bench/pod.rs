// SPDX-License-Identifier: Apache-2.0
//! Pods through containerd's CRI plugin: how long its calls take, with Bulkhead
//! and with runc in turn, what they take of processes and of calls into the
//! guest, and what the shim keeps for itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::json;

use super::{median, memory, progress, Bench, Figure, LIMIT};
use crate::containerd::BULKHEAD;
use crate::cri::Cri;
use crate::tracing::Births;
use crate::{image, listing, proc};

/// Runs of each, the first of which does not count.
const RUNS: usize = 6;
const HANDLERS: [&str; 2] = ["bulkhead", "runc"];
/// What a start leaves to be done.
const SETTLE: Duration = Duration::from_secs(3);

/// The calls of a pod's life: how containerd's log names them and, in the end,
/// says that they are done.
const CALLS: [(&str, &str); 5] = [
    ("RunPodSandbox for", "returns sandbox id"),
    ("CreateContainer within sandbox", "returns container id"),
    ("StartContainer for", "returns successfully"),
    ("StopPodSandbox for", "returns successfully"),
    ("RemovePodSandbox", "returns successfully"),
];

/// Milliseconds of each of [`CALLS`], then of a whole `crictl exec -s`, which
/// containerd does not log.
type Times = [f64; CALLS.len() + 1];
const EXEC: usize = CALLS.len();

/// `pod-start`, `pod-exec`, `pod-delete`, `pod-start-rpcs`,
/// `pod-start-processes`, `shim-private`.
///
/// # Errors
/// When a pod does not run, or crictl or tracefs is not there.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let dir = bench.dir.join("k");
    let cri = Cri::start(&dir, &bench.products, &bench.config, BULKHEAD)?;
    let taken = take(bench, &cri);
    cri.stop()?;
    taken
}

fn take(bench: &Bench, cri: &Cri) -> Result<Vec<Figure>> {
    let mut times: BTreeMap<&str, Vec<Times>> = BTreeMap::new();
    for run in 0..RUNS {
        for handler in HANDLERS {
            let pod = Pod::new(bench, cri, handler)?;
            let took = pod.life().with_context(|| format!("with {handler}"))?;
            if run > 0 {
                times.entry(handler).or_default().push(took);
            }
        }
        progress(&format!("run {run} of pods"));
    }
    let (mut births, mut calls, mut shim) = (BTreeMap::new(), BTreeMap::new(), 0);
    for handler in HANDLERS {
        let pod = Pod::new(bench, cri, handler)?;
        let counted = Births::begin()?;
        pod.start()?;
        births.insert(handler, counted.end()?);
        if handler == "bulkhead" {
            calls = agent_calls(bench)?;
            shim = beside_another(bench)?;
        }
        pod.remove()?;
    }

    let middle = |handler: &str, calls: &[usize]| -> Result<f64> {
        let runs = times.get(handler).context("no runs")?;
        median(
            runs.iter()
                .map(|run| calls.iter().map(|call| run[*call]).sum())
                .collect(),
        )
    };
    let timed = |name: &str, calls: &[usize], what: &str| -> Result<Figure> {
        let parts = calls
            .iter()
            .filter_map(|call| CALLS.get(*call).map(|c| (call, c.0)));
        let parts = parts.map(|(call, name)| {
            let (ours, theirs) = (middle("bulkhead", &[*call])?, middle("runc", &[*call])?);
            let name = name.split(' ').next().unwrap_or_default();
            Ok(format!(", {name} {ours:.0} beside {theirs:.0}"))
        });
        let parts = parts.collect::<Result<String>>()?;
        let how = format!("{what}, median of {} runs in turn{parts}", RUNS - 1);
        let figure = Figure::new(name, middle("bulkhead", calls)?, "ms", &how);
        Ok(figure.beside("runc", middle("runc", calls)?))
    };
    let told = |counts: &BTreeMap<String, u64>| {
        let told: Vec<String> = counts.iter().map(|(of, n)| format!("{of} {n}")).collect();
        told.join(", ")
    };
    let sum = |counts: &BTreeMap<String, u64>| counts.values().sum::<u64>() as f64;
    let (ours, theirs) = (&births["bulkhead"], &births["runc"]);
    Ok(vec![
        timed(
            "pod-start",
            &[0, 1, 2],
            "a pod with one container, by the times in containerd's log",
        )?,
        timed(
            "pod-exec",
            &[EXEC],
            "crictl exec -s of a true, crictl itself included",
        )?,
        timed(
            "pod-delete",
            &[3, 4],
            "the pod with its running container, by the times in containerd's log",
        )?,
        Figure::new(
            "pod-start-rpcs",
            sum(&calls),
            "calls",
            &format!("calls of the guest's agent until the container runs: {}", told(&calls)),
        ),
        Figure::new(
            "pod-start-processes",
            sum(ours),
            "processes",
            &format!(
                "processes born on the host from RunPodSandbox until the container runs, by who bears them: {}; runc: {}",
                told(ours),
                told(theirs)
            ),
        )
        .beside("runc", sum(theirs)),
        Figure::new(
            "shim-private",
            shim as f64 / 1024.0,
            "MiB",
            "private memory of the shim of an idle pod beside another, with which it shares its program; target: at most 1.5",
        ),
    ])
}

/// Private memory of the shim of an idle container that is not alone, in KiB.
fn beside_another(bench: &Bench) -> Result<u64> {
    let program = "containerd-shim-bulkhead-v2";
    let before: Vec<u32> = listing::by_program(program).iter().map(|p| p.pid).collect();
    let mut command = bench.containerd()?.run(BULKHEAD, &["-d", "--null-io"]);
    command.args([image::ROOT_IMAGE, "bench-beside", "sleep", "100000"]);
    proc::run(&mut command, LIMIT)?.ok()?;
    thread::sleep(SETTLE);
    let now = listing::by_program(program);
    let new = now.iter().find(|p| !before.contains(&p.pid));
    let (own, _) = memory::private_of(new.context("no new shim")?.pid)?;
    bench.containerd()?.clean()?;
    Ok(own)
}

/// What the one pod's shim tells of calls into the guest. The question itself
/// makes some, which are not counted.
fn agent_calls(bench: &Bench) -> Result<BTreeMap<String, u64>> {
    let mut command = Command::new(bench.products.program("bulkhead"));
    command.arg("--config").arg(&bench.config).arg("metrics");
    let text = proc::run(&mut command, LIMIT)?.ok()?.out();
    let calls = calls_in(&text);
    if calls.is_empty() {
        bail!("no calls in the metrics: {text}");
    }
    Ok(calls)
}

fn calls_in(metrics: &str) -> BTreeMap<String, u64> {
    let lines = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix("bulkhead_sandbox_agent_calls_total{")?;
        let (labels, count) = rest.rsplit_once("} ")?;
        let (_, call) = labels.rsplit_once("call=\"")?;
        let call = call.strip_suffix('"')?.to_owned();
        // Statistics are read for the metrics; nothing else here asks for them.
        (call != "read statistics" && call != "check").then_some((call, count.parse().ok()?))
    });
    lines.collect()
}

/// A pod with a container that sleeps.
struct Pod<'a> {
    cri: &'a Cri,
    handler: &'static str,
    config: PathBuf,
    container: PathBuf,
}

impl<'a> Pod<'a> {
    fn new(bench: &Bench, cri: &'a Cri, handler: &'static str) -> Result<Self> {
        let dir = bench.dir.join("pod");
        fs::create_dir_all(&dir)?;
        let write = |name: &str, value: serde_json::Value| -> Result<PathBuf> {
            let path = dir.join(name);
            fs::write(&path, value.to_string())?;
            Ok(path)
        };
        let config = json!({
            "metadata": { "name": "bench", "namespace": "default", "uid": "bench", "attempt": 0 },
            "log_directory": dir,
            "linux": {},
        });
        let container = json!({
            "metadata": { "name": "sleeper", "attempt": 0 },
            "image": { "image": image::ROOT_IMAGE },
            "command": ["sleep", "100000"],
            "log_path": "sleeper.log",
            "linux": {},
        });
        Ok(Self {
            cri,
            handler,
            config: write("pod.json", config)?,
            container: write("container.json", container)?,
        })
    }

    fn crictl(&self, args: &[&str]) -> Result<String> {
        let done = self.cri.crictl(args)?.ok();
        Ok(done.with_context(|| args.join(" "))?.out())
    }

    /// Until its container runs; gives the pod's id and the container's.
    fn start(&self) -> Result<(String, String)> {
        let config = text(&self.config)?;
        let pod = self.crictl(&["runp", "--runtime", self.handler, config])?;
        let container = self.crictl(&["create", &pod, text(&self.container)?, config])?;
        self.crictl(&["start", &container])?;
        Ok((pod, container))
    }

    fn remove(&self) -> Result<()> {
        self.cri.clean().map(drop)
    }

    /// From its begin to its end.
    fn life(&self) -> Result<Times> {
        let logged = self.cri.containerd().log().len();
        let (pod, container) = self.start()?;
        let begin = Instant::now();
        self.crictl(&["exec", "-s", &container, "true"])?;
        let exec = begin.elapsed();
        self.crictl(&["stopp", &pod])?;
        self.crictl(&["rmp", &pod])?;
        let log = self.cri.containerd().log();
        let mut times = times(log.get(logged..).unwrap_or_default())?;
        times[EXEC] = exec.as_secs_f64() * 1000.0;
        Ok(times)
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// How long each of [`CALLS`] took.
fn times(log: &str) -> Result<Times> {
    let mut times = Times::default();
    for (time, (name, done)) in times.iter_mut().zip(CALLS) {
        let start = format!("msg=\"{name}");
        let mut of_call = log.lines().filter(|line| line.contains(&start));
        let begin = of_call.next().and_then(seconds);
        let end = of_call.find(|line| line.contains(done)).and_then(seconds);
        let (Some(begin), Some(end)) = (begin, end) else {
            bail!("containerd has not logged the begin and the end of {name}: {log}");
        };
        // Over midnight.
        let took = if end < begin { end + 86400.0 } else { end } - begin;
        *time = took * 1000.0;
    }
    Ok(times)
}

/// The time of day that a line begins with.
fn seconds(line: &str) -> Option<f64> {
    let (_, rest) = line.strip_prefix("time=\"")?.split_once('T')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit() && c != ':' && c != '.')?;
    let mut sum = 0.0;
    for part in rest[..digits].split(':') {
        sum = sum * 60.0 + part.parse::<f64>().ok()?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_call_is_in_the_log() {
        let mut log = String::new();
        for (at, (name, done)) in CALLS.iter().enumerate() {
            log.push_str(&format!(
                "time=\"2026-01-02T23:59:59.{at}00000000Z\" level=info msg=\"{name} x\"\n\
                 time=\"2026-01-03T00:00:00.500000000Z\" level=info msg=\"{name} x {done} y\"\n"
            ));
        }
        let times = times(&log).unwrap();
        assert!((times[0] - 1500.0).abs() < 0.01, "{times:?}");
        assert!((times[4] - 1100.0).abs() < 0.01, "{times:?}");
        assert!(super::times("nothing").is_err());
    }

    #[test]
    fn calls_of_the_agent_are_in_the_metrics() {
        let text = "# HELP x\nbulkhead_sandbox_agent_calls_total{sandbox=\"a\",call=\"create container\"} 2\n\
                    bulkhead_sandbox_agent_calls_total{sandbox=\"a\",call=\"check\"} 9\n";
        assert_eq!(calls_in(text), [("create container".to_owned(), 2)].into());
    }
}
