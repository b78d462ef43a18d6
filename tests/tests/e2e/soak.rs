// SPDX-License-Identifier: Apache-2.0
//! Many pods, four at a time, beside one that stays.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::cri::Cri;
use bulkhead_tests::image;
use bulkhead_tests::listing::Listing;
use serde_json::json;

use crate::cli::listed;
use crate::context::{same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![pods_come_and_go];

/// Environment variable with how many pods there are to be.
const PODS: &str = "BULKHEAD_SOAK";
/// Without it: a round.
const DEFAULT: u32 = 4;
/// At a time.
const SIDE_BY_SIDE: usize = 4;
/// Probes of each pod.
const PROBES: usize = 3;
/// What a shim may have more in the end, in KiB; buffers, not leaks: a leak of
/// a kilobyte a probe is more than that in a long run.
const GROWTH: u64 = 512;

/// A pod with a container in it.
struct Pod<'a> {
    cri: &'a Cri,
    id: String,
    container: String,
}

fn write(path: PathBuf, value: &serde_json::Value) -> Result<String> {
    fs::write(&path, value.to_string())?;
    Ok(path.to_string_lossy().into_owned())
}

impl<'a> Pod<'a> {
    fn start(cri: &'a Cri, dir: &Path, name: &str) -> Result<Self> {
        let call = |args: &[&str]| -> Result<String> {
            Ok(cri
                .crictl(args)?
                .ok()
                .with_context(|| args.join(" "))?
                .out())
        };
        let pod = json!({
            "metadata": { "name": name, "namespace": "soak", "uid": name, "attempt": 0 },
            "log_directory": dir,
            "linux": {},
        });
        let pod = write(dir.join(format!("{name}.pod.json")), &pod)?;
        let container = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": image::ROOT_IMAGE },
            "command": ["sh", "-c", "echo up; sleep 100000"],
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        let config = write(dir.join(format!("{name}.json")), &container)?;
        let id = call(&["runp", "--runtime", cri.handler(), &pod])?;
        let container = call(&["create", &id, &config, &pod])?;
        call(&["start", &container])?;
        Ok(Self { cri, id, container })
    }

    fn probe(&self) -> Result<()> {
        let done = self
            .cri
            .crictl(&["exec", "-s", &self.container, "echo", "alive"])?;
        same(done.ok().context("probe")?.out().as_str(), "alive")
    }

    fn remove(self) -> Result<()> {
        for verb in ["stopp", "rmp"] {
            let done = self.cri.crictl(&[verb, &self.id])?.ok();
            done.with_context(|| format!("{verb} {}", self.id))?;
        }
        Ok(())
    }
}

/// Memory that the shim of a pod has written, in KiB. The rest is its program's,
/// which is its own or not as other shims are there.
fn shim(context: &Context, pod: &Pod<'_>) -> Result<u64> {
    let told = listed(context, &pod.id)?;
    let pid = told["pid"].as_u64().context("the shim's process id")?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB"));
    Ok(kib.context("what it has written")?.trim().parse()?)
}

fn pods_come_and_go(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let pods = match env::var(PODS) {
        Ok(text) if !text.is_empty() => text.parse().with_context(|| format!("{PODS}={text}"))?,
        _ => DEFAULT,
    };
    let cri = context.cri()?;
    let dir = context.dir.join("soak");
    fs::create_dir_all(&dir)?;
    // What is made once and for all.
    Pod::start(cri, &dir, "first")?.remove()?;
    let mut places = context.places();
    let state = cri.containerd().dir();
    places.push(state.join("state"));
    places.push(state.join("cni-data"));
    let stays = Pod::start(cri, &dir, "stays")?;
    for _ in 0..PROBES {
        stays.probe()?;
    }
    let (before, memory_before) = (Listing::take(&places), shim(context, &stays)?);

    let next = AtomicU32::new(0);
    let worker = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= pods {
                return Ok(());
            }
            let name = format!("soak-{number}");
            let one = || -> Result<()> {
                let pod = Pod::start(cri, &dir, &name)?;
                for _ in 0..PROBES {
                    pod.probe()?;
                    stays.probe()?;
                }
                pod.remove()
            };
            one().with_context(|| name.clone())?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..SIDE_BY_SIDE).map(|_| scope.spawn(worker)).collect();
        let done = workers.into_iter().map(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => bail!("a worker panicked"),
        });
        done.collect::<Result<Vec<()>>>()
    })?;

    let left = Listing::left_since(&before, &places, LIMIT);
    same(left, Vec::<String>::new()).context("left behind")?;
    let memory_after = shim(context, &stays)?;
    if memory_after > memory_before + GROWTH {
        bail!("the shim of the pod that stays has {memory_after} KiB, it had {memory_before} KiB");
    }
    stays.remove()
}
