// SPDX-License-Identifier: Apache-2.0
//! A pod as an operator sees it.

use std::{fs, sync::Arc, sync::Weak, time::Duration};

use async_trait::async_trait;
use bulkhead_agent_protocol::agent::{
    ContainerRequest, Empty, KernelLogRequest, NetworkStat, StatsGuestReply, StatsReply,
};
use tokio::time::{sleep, timeout};

use super::{
    state::{Phase, Stage},
    Inner,
};
use crate::{
    error::Error,
    hypervisor::{tail::printable, Hypervisor},
    operator::{
        history::History,
        metrics::{self, Metrics},
        status, time, ContainerState, ExecState, State,
    },
};

/// How long the guest may take for all figures of one answer.
const FIGURES: Duration = Duration::from_secs(3);

/// How much the guest may tell of one kind.
const MOST_FIGURES: usize = 64;

/// Longest name that it may give to something, in bytes.
const LONGEST_NAME: usize = 32;

/// How much of the guest kernel's log is asked for at a time, in bytes.
const LOG_PART: u32 = 128 << 10;

/// How often it is asked for one answer.
const LOG_PARTS: usize = 16;

/// Most lines of one answer, and characters of each.
const LOG_LINES: usize = 16_384;
const LOG_LINE: usize = 1024;

/// Whatever an operator can ask about.
#[async_trait]
pub trait Observed: Send + Sync + 'static {
    /// Figures in Prometheus's text format.
    async fn metrics(&self) -> String;
    /// What there is.
    fn state(&self) -> State;
    /// The last lines of the guest's console.
    fn console(&self, lines: usize) -> Vec<String>;
    /// The guest kernel's log.
    ///
    /// # Errors
    /// Why there is none.
    async fn kernel_log(&self) -> Result<String, Error>;
    /// What has happened.
    fn history(&self) -> &History;
}

#[async_trait]
impl Observed for Inner {
    async fn metrics(&self) -> String {
        let state = self.state();
        let mut metrics =
            Metrics::labelled(&[("namespace", &state.namespace), ("sandbox", &state.sandbox)]);
        of_pod(&mut metrics, &state, self);
        let mut answered = state.ended.is_none();
        let figures = async {
            let mut network = None;
            if answered {
                match self.agent.stats_guest(Empty::new()).await {
                    Ok(stats) => {
                        of_guest(&mut metrics, &stats);
                        network = Some(stats.network);
                    }
                    // It may not be allowed to tell; what counts is an answer.
                    Err(_) => answered = self.agent.check(Empty::new()).await.is_ok(),
                }
            }
            for container in state.containers.iter().filter(|c| c.status != "creating") {
                if !answered {
                    break;
                }
                let request = ContainerRequest {
                    container_id: container.id.clone(),
                    ..Default::default()
                };
                match self.agent.stats_container(request).await {
                    Ok(stats) => {
                        of_container(&mut metrics, &container.id, &stats);
                        network.get_or_insert(stats.network);
                    }
                    // It may just have been deleted; what counts is an answer.
                    Err(_) => answered = self.agent.check(Empty::new()).await.is_ok(),
                }
            }
            of_network(&mut metrics, &network.unwrap_or_default());
        };
        if timeout(FIGURES, figures).await.is_err() {
            answered = false;
        }
        metrics.add(&metrics::AGENT_UP, &[], f64::from(u8::from(answered)));
        metrics.to_string()
    }

    fn state(&self) -> State {
        let (ended, containers) = {
            let mut pod = self.pod();
            let ids: Vec<String> = pod.containers.keys().cloned().collect();
            let containers = ids
                .iter()
                .filter_map(|id| container(&mut pod, id))
                .collect();
            (pod.ended.clone(), containers)
        };
        State {
            namespace: self.namespace.clone(),
            sandbox: self.id.clone(),
            pid: std::process::id(),
            vmm_pid: self.vm.pid(),
            vcpus: self.size.vcpus,
            memory_mib: self.size.memory_mib,
            ended,
            start: self.timeline.start(self.vm.timeline()),
            containers,
        }
    }

    fn console(&self, lines: usize) -> Vec<String> {
        self.console.lines(lines)
    }

    async fn kernel_log(&self) -> Result<String, Error> {
        let mut request = KernelLogRequest {
            max_bytes: LOG_PART,
            ..Default::default()
        };
        let (mut text, mut lines) = (String::new(), 0);
        for _ in 0..LOG_PARTS {
            let reply = self.agent.kernel_log(request.clone()).await?;
            lines += reply.lines.len();
            if lines > LOG_LINES {
                break;
            }
            for line in &reply.lines {
                let line: String = printable(line).chars().take(LOG_LINE).collect();
                text.push_str(&line);
                text.push('\n');
            }
            // One that does not get on has no more.
            if !reply.more || reply.next <= request.from {
                break;
            }
            request.from = reply.next;
        }
        Ok(text)
    }

    fn history(&self) -> &History {
        &self.history
    }
}

/// Whether the guest may call something so: what a kernel calls its devices.
fn plain(name: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-@:".contains(&byte);
    !name.is_empty() && name.len() <= LONGEST_NAME && name.bytes().all(letter)
}

fn of_guest(metrics: &mut Metrics, stats: &StatsGuestReply) {
    let seconds = |micros: u64| micros as f64 / 1e6;
    for figure in stats.memory.iter().take(MOST_FIGURES) {
        if plain(&figure.name) {
            let labels = [("kind", figure.name.as_str())];
            metrics.add(&metrics::GUEST_MEMORY, &labels, figure.bytes as f64);
        }
    }
    for (minutes, load) in ["1", "5", "15"].iter().zip(&stats.load_thousandths) {
        let labels = [("minutes", *minutes)];
        metrics.add(&metrics::GUEST_LOAD, &labels, f64::from(*load) / 1000.0);
    }
    metrics.add(&metrics::GUEST_THREADS, &[], stats.threads.into());
    for pressure in stats.pressure.iter().take(MOST_FIGURES) {
        if !plain(&pressure.resource) {
            continue;
        }
        for (kind, micros) in [("some", pressure.some_usec), ("full", pressure.full_usec)] {
            let labels = [("resource", pressure.resource.as_str()), ("waiting", kind)];
            metrics.add(&metrics::GUEST_PRESSURE, &labels, seconds(micros));
        }
    }
    for disk in stats.disks.iter().take(MOST_FIGURES) {
        if !plain(&disk.name) {
            continue;
        }
        let labels = [("device", disk.name.as_str())];
        for (family, value) in [
            (&metrics::GUEST_DISK_READ, disk.read_bytes as f64),
            (&metrics::GUEST_DISK_WRITTEN, disk.written_bytes as f64),
            (&metrics::GUEST_DISK_BUSY, disk.busy_ms as f64 / 1e3),
        ] {
            metrics.add(family, &labels, value);
        }
    }
}

fn container(pod: &mut super::state::Pod, id: &str) -> Option<ContainerState> {
    let phase = pod.containers.get(id)?.phase;
    let bundle = pod.containers.get(id)?.bundle.clone();
    if phase == Phase::Creating {
        return Some(ContainerState {
            id: id.into(),
            status: "creating".into(),
            bundle,
            exit_status: None,
            exited_at: None,
            execs: Vec::new(),
        });
    }
    let state = pod.state(id, None).ok()?;
    let exit = state.exited_at.map(|at| (state.exit_status, at));
    let execs = pod.containers.get(id)?.execs.iter();
    let execs = execs
        .map(|(id, process)| ExecState {
            id: id.clone(),
            status: match process.stage {
                Stage::Created | Stage::Starting => "created",
                Stage::Running => "running",
                Stage::Stopped => "stopped",
            }
            .into(),
            exit_status: process.exit.borrow().map(|exit| exit.status),
        })
        .collect();
    Some(ContainerState {
        id: id.into(),
        status: match phase {
            Phase::Deleting => "deleting",
            _ => status(state.status),
        }
        .into(),
        bundle,
        exit_status: exit.map(|(status, _)| status),
        exited_at: exit.map(|(_, at)| time(at)),
        execs,
    })
}

fn of_pod(metrics: &mut Metrics, state: &State, inner: &Inner) {
    let (pid, vmm_pid) = (state.pid.to_string(), state.vmm_pid.to_string());
    let labels = [
        ("version", env!("CARGO_PKG_VERSION")),
        ("pid", &pid),
        ("vmm_pid", &vmm_pid),
    ];
    metrics.add(&metrics::INFO, &labels, 1.0);
    let up = state.ended.is_none();
    metrics.add(&metrics::UP, &[], f64::from(u8::from(up)));
    metrics.add(&metrics::UNANSWERED, &[], inner.unanswered() as f64);
    for (call, count) in inner.agent.calls() {
        metrics.add(&metrics::CALLS, &[("call", call)], count as f64);
    }
    metrics.add(&metrics::VCPUS, &[], state.vcpus.into());
    let memory = u64::from(state.memory_mib) << 20;
    metrics.add(&metrics::MEMORY, &[], memory as f64);
    for (step, at) in state.start.steps() {
        if let Some(at) = at {
            metrics.add(&metrics::START, &[("step", step)], at / 1000.0);
        }
    }
    for (event, count) in inner.history.counts() {
        metrics.add(&metrics::EVENTS, &[("event", &event)], count as f64);
    }
    for status in ["creating", "created", "running", "paused", "stopped"] {
        let count = state.containers.iter().filter(|c| c.status == status);
        let labels = [("status", status)];
        metrics.add(&metrics::CONTAINERS, &labels, count.count() as f64);
    }
    for (process, pid) in [("vmm", state.vmm_pid), ("front_end", state.pid)] {
        of_process(metrics, process, pid);
    }
}

fn of_process(metrics: &mut Metrics, process: &str, pid: u32) {
    let labels = [("process", process)];
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
    let ticks = read("stat").and_then(|stat| {
        // The command's name, in parentheses, may hold anything.
        let (_, after) = stat.rsplit_once(')')?;
        let mut fields = after.split_ascii_whitespace().skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        Some(user + system)
    });
    if let Some(ticks) = ticks {
        let seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        metrics.add(&metrics::PROCESS_CPU, &labels, seconds);
    }
    let pages = read("statm").and_then(|text| {
        let resident = text.split_ascii_whitespace().nth(1)?;
        resident.parse::<u64>().ok()
    });
    if let Some(pages) = pages {
        let bytes = pages.saturating_mul(rustix::param::page_size() as u64);
        metrics.add(&metrics::PROCESS_RSS, &labels, bytes as f64);
    }
    if let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) {
        metrics.add(&metrics::PROCESS_FDS, &labels, fds.count() as f64);
    }
}

fn of_container(metrics: &mut Metrics, id: &str, stats: &StatsReply) {
    let labels = [("container", id)];
    let seconds = |micros: u64| micros as f64 / 1e6;
    if let Some(cpu) = stats.cpu.as_ref() {
        metrics.add(&metrics::CPU, &labels, seconds(cpu.usage_usec));
        metrics.add(&metrics::THROTTLED, &labels, seconds(cpu.throttled_usec));
    }
    if let Some(memory) = stats.memory.as_ref() {
        metrics.add(&metrics::USAGE, &labels, memory.usage as f64);
        if memory.usage_limit != u64::MAX {
            metrics.add(&metrics::LIMIT, &labels, memory.usage_limit as f64);
        }
    }
    if let Some(events) = stats.memory_events.as_ref() {
        metrics.add(&metrics::OOM, &labels, events.oom_kill as f64);
    }
    if let Some(pids) = stats.pids.as_ref() {
        metrics.add(&metrics::PIDS, &labels, pids.current as f64);
    }
    for io in &stats.io {
        let device = format!("{}:{}", io.major, io.minor);
        let labels = [("container", id), ("device", &device)];
        metrics.add(&metrics::READ, &labels, io.rbytes as f64);
        metrics.add(&metrics::WRITTEN, &labels, io.wbytes as f64);
    }
}

fn of_network(metrics: &mut Metrics, network: &[NetworkStat]) {
    let named = network.iter().filter(|stat| plain(&stat.name));
    for stat in named.take(MOST_FIGURES) {
        let labels = [("interface", stat.name.as_str())];
        for (family, value) in [
            (&metrics::NET_RX_BYTES, stat.rx_bytes),
            (&metrics::NET_RX_PACKETS, stat.rx_packets),
            (&metrics::NET_RX_DROPS, stat.rx_dropped),
            (&metrics::NET_TX_BYTES, stat.tx_bytes),
            (&metrics::NET_TX_PACKETS, stat.tx_packets),
            (&metrics::NET_TX_DROPS, stat.tx_dropped),
        ] {
            metrics.add(family, &labels, value as f64);
        }
    }
}

/// Asks the agent from time to time whether it is there. One that does not
/// answer any more leaves its containers without anybody to stop them or to
/// tell their end: the machine is ended, and with it they.
pub async fn watch_health(weak: Weak<Inner>, interval: Duration, failures: u32) {
    let mut in_a_row = 0;
    loop {
        sleep(interval).await;
        let Some(inner) = weak.upgrade() else {
            return;
        };
        if inner.pod().accepts().is_err() {
            return;
        }
        match inner.agent.check(Empty::new()).await {
            Ok(_) => in_a_row = 0,
            Err(error) => {
                in_a_row += 1;
                inner.count_unanswered();
                let error = crate::error::chain(&error);
                tracing::warn!(sandbox = inner.id, error, in_a_row, "health");
            }
        }
        if in_a_row >= failures && inner.pod().accepts().is_ok() {
            give_up(&inner, in_a_row).await;
            return;
        }
    }
}

async fn give_up(inner: &Arc<Inner>, questions: u32) {
    let why = format!(
        "the guest's agent has not answered {questions} times in a row (agent.health_failures)"
    );
    tracing::error!(
        sandbox = inner.id,
        why,
        "the virtual machine of a guest that does not answer is ended"
    );
    // Who looks at the machine's end tells this instead.
    let _ = inner.verdict.set(why);
    inner
        .vm
        .shutdown(inner.config.hypervisor.stop_timeout())
        .await;
}
