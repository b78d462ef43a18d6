// SPDX-License-Identifier: Apache-2.0
//! The time of whole starts, beside runc and crun.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use super::{median, Bench, Figure, LIMIT};
use crate::containerd::BULKHEAD;
use crate::install::which;
use crate::timeline::Timeline;
use crate::{image, proc};

/// Runs of each, the first of which does not count.
const RUNS: usize = 6;
const RUNC: &str = "io.containerd.runc.v2";

fn milliseconds(command: &mut Command) -> Result<f64> {
    let begin = Instant::now();
    proc::run(command, LIMIT)?.ok()?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}

/// `ctr-run`, and from its timelines `boot` and `boot-kernel`.
///
/// # Errors
/// When a run fails.
pub fn ctr_run(bench: &Bench) -> Result<Vec<Figure>> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut boots, mut kernels) = (Vec::new(), Vec::new());
    for run in 0..RUNS {
        for runtime in [BULKHEAD, RUNC] {
            let logged = bench.containerd()?.log().len();
            let mut command = bench.containerd()?.run(runtime, &["--rm"]);
            command.args([image::ROOT_IMAGE, &format!("bench-{run}"), "true"]);
            let took = milliseconds(&mut command).with_context(|| format!("with {runtime}"))?;
            if run == 0 {
                continue;
            }
            if runtime == RUNC {
                theirs.push(took);
                continue;
            }
            ours.push(took);
            let log = bench.containerd()?.log();
            let log = log.get(logged..).unwrap_or_default();
            let timeline = Timeline::find(log).context("the shim has logged no start timeline")?;
            // VMM start, agent ready.
            boots.push(timeline.0[3] - timeline.0[1]);
            kernels.push(init_ms(log).context("the shim has not logged init_ms")?);
        }
    }
    let counted = RUNS - 1;
    Ok(vec![
        Figure::new(
            "ctr-run",
            median(ours)?,
            "ms",
            &format!("ctr run --rm of a static true, median of {counted} runs in turn"),
        )
        .beside("runc", median(theirs)?),
        Figure::new(
            "boot",
            median(boots)?,
            "ms",
            &format!("main of the VMM to the agent's ready call, median of {counted} runs"),
        ),
        Figure::new(
            "boot-kernel",
            median(kernels)?,
            "ms",
            &format!("the part of boot from the guest's clock to the agent's main, median of {counted} runs"),
        ),
    ])
}

fn init_ms(log: &str) -> Option<f64> {
    let at = log.rfind("init_ms=")? + "init_ms=".len();
    let text: String = log[at..].chars().take_while(char::is_ascii_digit).collect();
    text.parse().ok()
}

/// `run`: `bulkhead run` beside `crun run`.
///
/// # Errors
/// When a run fails.
pub fn run(bench: &Bench) -> Result<Vec<Figure>> {
    let rootfs = bench.rootfs()?;
    let bundle = bench.dir.join("bundle");
    fs::create_dir_all(&bundle)?;
    let crun = which("crun").context("crun is not installed")?;
    proc::run(Command::new(&crun).arg("spec").current_dir(&bundle), LIMIT)?.ok()?;
    let path = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
    spec["root"]["path"] = rootfs.to_string_lossy().into_owned().into();
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["/bin/true"]);
    fs::write(&path, spec.to_string())?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 0..RUNS {
        let mut command = Command::new(bench.products.program("bulkhead"));
        command.arg("--config").arg(&bench.config).arg("run");
        command.arg(&rootfs).args(["--", "/bin/true"]);
        let our = milliseconds(&mut command).context("bulkhead run")?;
        let mut command = Command::new(&crun);
        command.arg("run").arg("-b").arg(&bundle);
        command.arg(format!("bench-crun-{run}"));
        let their = milliseconds(&mut command).context("crun run")?;
        if run > 0 {
            ours.push(our);
            theirs.push(their);
        }
    }
    let how = format!(
        "bulkhead run of a static true, median of {} runs in turn",
        RUNS - 1
    );
    Ok(vec![
        Figure::new("run", median(ours)?, "ms", &how).beside("crun", median(theirs)?)
    ])
}
