// SPDX-License-Identifier: Apache-2.0
//! What the agent takes to start containers and processes, beside crun in the
//! same guest with the same configuration and root file system.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use bulkhead_agent_protocol::agent::{Empty, Step};
use bulkhead_agent_protocol::{oci, CAPABILITIES};
use bulkhead_runtime::oci::{parse, process};
use serde_json::{json, Value};

use super::{median, progress, Bench, Figure, LIMIT};
use crate::boxed::hot::with_libraries;
use crate::guest::{specification, Guest};
use crate::install::which;
use crate::{proc, stamp};

/// Runs of each, the first of which do not count. There are few, for crun in a
/// guest in an emulated machine takes many seconds of ours for each; but virtual
/// time is the same in each, too.
const RUNS: usize = 4;
const WARM: usize = 1;
/// The same of the empty call.
const CALLS: usize = 44;
const WARM_CALLS: usize = 4;

/// Directory of crun's container in the shared directory: a root file system
/// with what crun needs.
const TOOLS: &str = "tools";
/// In it the root file system of the containers that are measured.
const ROOT: &str = "root";
/// In it, a directory for each bundle of crun's.
const BUNDLE: &str = "bundle";
/// Becomes what follows it, and tells when before.
const STAMP: &str = "/stamp";

/// `agent-create`, `agent-exec` and `agent-rpc`.
///
/// # Errors
/// When the guest does not come up, or a start fails.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let dir = bench.dir.join("agent");
    let guest = Guest::boot(&bench.products, &dir, 256, LIMIT)?;
    let crun = which("crun").context("crun is not installed")?;
    let config = configuration(&crun, &dir)?;
    tools(&guest.shared().join(TOOLS), &crun, &config)?;
    let bench = Runs {
        guest,
        config,
        crun: crun.to_string_lossy().into_owned(),
    };
    progress("agent: the guest runs");
    bench.guest.create("tools", bench.toolbox()?)?;
    bench.guest.start("tools")?;
    let mut figures = Vec::new();
    // The quick one first; each is told at once, for all may take minutes.
    for take in [Runs::call, Runs::create, Runs::exec] {
        let figure = take(&bench)?;
        progress(&figure.line());
        figures.push(figure);
    }
    Ok(figures)
}

/// What `crun spec` writes, without a network namespace, which a container of
/// a pod has not.
fn configuration(crun: &Path, dir: &Path) -> Result<Value> {
    proc::run(Command::new(crun).arg("spec").current_dir(dir), LIMIT)?.ok()?;
    let mut config: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!([STAMP]);
    let namespaces = config["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.context("crun's configuration has no namespaces")?;
    namespaces.retain(|namespace| namespace["type"] != "network");
    Ok(config)
}

/// Fills the directory of crun's container.
fn tools(tools: &Path, crun: &Path, config: &Value) -> Result<()> {
    for root in [tools.to_owned(), tools.join(ROOT)] {
        for below in ["bin", "proc", "sys", "dev", "tmp", "run"] {
            fs::create_dir_all(root.join(below))?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).context("copy busybox")?;
        for name in ["sh", "sleep"] {
            symlink("busybox", root.join("bin").join(name))?;
        }
        let path = root.join(STAMP.trim_start_matches('/'));
        fs::write(&path, stamp::program())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    for file in with_libraries(crun)? {
        let place = tools.join(file.strip_prefix("/")?);
        fs::create_dir_all(place.parent().context("a library without a directory")?)?;
        fs::copy(&file, &place).with_context(|| format!("copy {}", file.display()))?;
    }
    for (name, args) in [
        ("once", json!([STAMP])),
        ("stay", json!(["/bin/sleep", "9999"])),
    ] {
        let mut config = config.clone();
        config["root"]["path"] = format!("/{ROOT}").into();
        config["process"]["args"] = args;
        config["linux"]["cgroupsPath"] = format!("/crun/{name}").into();
        let bundle: PathBuf = tools.join(BUNDLE).join(name);
        fs::create_dir_all(&bundle)?;
        fs::write(bundle.join("config.json"), config.to_string())?;
    }
    Ok(())
}

struct Runs {
    guest: Guest,
    config: Value,
    crun: String,
}

impl Runs {
    /// crun's container: all privileges, the guest's cgroups and processes.
    fn toolbox(&self) -> Result<oci::Spec> {
        let mut spec = specification(&self.config, "tools", TOOLS)?;
        let own = spec.process.mut_or_insert_default();
        own.args = vec!["/bin/sleep".into(), "9999".into()];
        let every = every_capability(own.capabilities.mut_or_insert_default());
        own.capabilities = Some(every).into();
        own.no_new_privileges = false;
        let linux = spec.linux.mut_or_insert_default();
        linux
            .namespaces
            .retain(|namespace| namespace.type_ == "mount");
        linux.masked_paths.clear();
        linux.readonly_paths.clear();
        linux.resources.mut_or_insert_default().devices = vec![oci::DeviceRule {
            allow: true,
            access: "rwm".into(),
            ..Default::default()
        }];
        let mount = |kind: &str, source: &str, destination: &str| oci::Mount {
            type_: kind.into(),
            source: source.into(),
            destination: destination.into(),
            options: if kind == "bind" {
                vec!["rbind".into()]
            } else {
                Vec::new()
            },
            ..Default::default()
        };
        spec.mounts = vec![
            mount("proc", "proc", "/proc"),
            mount("bind", "/sys", "/sys"),
            mount("tmpfs", "tmpfs", "/dev"),
            mount("tmpfs", "tmpfs", "/run"),
        ];
        Ok(spec)
    }

    /// Runs `args` in crun's container; gives the stamps.
    fn tool(&self, name: &str, args: &[&str]) -> Result<Vec<u64>> {
        let spec = self.toolbox()?;
        let mut process = spec.process.unwrap_or_default();
        process.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let outcome = self.guest.exec("tools", name, process)?.1.ok();
        Ok(stamp::stamps(&outcome.with_context(|| args.join(" "))?))
    }

    /// The time between crun's exec and the program's, in milliseconds.
    fn crun(&self, name: &str, args: &[&str]) -> Result<f64> {
        let args: Vec<&str> = [STAMP, &self.crun].iter().chain(args).copied().collect();
        match self.tool(name, &args)?[..] {
            [begin, end] => Ok(milliseconds(begin, end)),
            ref other => bail!("not two stamps: {other:?}"),
        }
    }

    fn create(&self) -> Result<Figure> {
        let (mut ours, mut theirs, mut steps) = (Vec::new(), Vec::new(), Parts::default());
        let root = format!("{TOOLS}/{ROOT}");
        let bundle = format!("/{BUNDLE}/once");
        for run in 0..RUNS {
            let id = format!("own-{run}");
            let spec = specification(&self.config, &id, &root)?;
            let (reply, outcome) = self.guest.run(&id, spec)?;
            self.guest.delete(&id)?;
            let their = self.crun(
                &id,
                &["--cgroup-manager=cgroupfs", "run", "-b", &bundle, &id],
            )?;
            progress(&format!("agent-create: {} of {RUNS}", run + 1));
            if run >= WARM {
                ours.push(steps.add(&reply.steps, &outcome.ok()?)?);
                theirs.push(their);
            }
        }
        let how = format!(
            "CreateContainer received to the program's first instruction, with the host's reply and StartContainer between; crun run from its exec; medians of {}; ms by step: {}",
            ours.len(),
            steps.told()?
        );
        let figure = Figure::new("agent-create", median(ours)?, "ms", &how);
        Ok(figure.beside("crun run", median(theirs)?))
    }

    fn exec(&self) -> Result<Figure> {
        let mut spec = specification(&self.config, "stay", &format!("{TOOLS}/{ROOT}"))?;
        spec.process.mut_or_insert_default().args = vec!["/bin/sleep".into(), "9999".into()];
        self.guest.create("stay", spec)?;
        self.guest.start("stay")?;
        let begin = format!(
            "{} --cgroup-manager=cgroupfs run -d -b /{BUNDLE}/stay stay </dev/null >/run/log 2>&1 || {{ cat /run/log >&2; exit 1; }}",
            self.crun
        );
        self.tool("stay", &["/bin/busybox", "sh", "-c", &begin])?;
        let (mut ours, mut theirs, mut steps) = (Vec::new(), Vec::new(), Parts::default());
        for run in 0..RUNS {
            let spec = parse(self.config["process"].to_string().as_bytes())?;
            let name = format!("exec-{run}");
            let (reply, outcome) = self.guest.exec("stay", &name, process(&spec)?)?;
            let their = self.crun(&name, &["--cgroup-manager=cgroupfs", "exec", "stay", STAMP])?;
            progress(&format!("agent-exec: {} of {RUNS}", run + 1));
            if run >= WARM {
                ours.push(steps.add(&reply.steps, &outcome.ok()?)?);
                theirs.push(their);
            }
        }
        let how = format!(
            "ExecProcess received to the program's first instruction; crun exec from its exec; medians of {}; ms by step: {}",
            ours.len(),
            steps.told()?
        );
        let figure = Figure::new("agent-exec", median(ours)?, "ms", &how);
        Ok(figure.beside("crun exec", median(theirs)?))
    }

    fn call(&self) -> Result<Figure> {
        let mut took = Vec::new();
        for call in 0..CALLS {
            let begin = Instant::now();
            self.guest
                .wait_for(self.guest.agent().check(Empty::new()))?;
            if call >= WARM_CALLS {
                took.push(begin.elapsed().as_secs_f64() * 1e3);
            }
        }
        let how = format!(
            "an empty call of the agent, host to guest and back; median of {}",
            took.len()
        );
        Ok(Figure::new("agent-rpc", median(took)?, "ms", &how))
    }
}

/// Those of the classic sets; the agent leaves out what the kernel has not.
fn every_capability(like: &oci::Capabilities) -> oci::Capabilities {
    let names: Vec<String> = CAPABILITIES
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    oci::Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..like.clone()
    }
}

/// What each step of the agent's took, over the runs.
#[derive(Default)]
struct Parts {
    order: Vec<String>,
    took: BTreeMap<String, Vec<f64>>,
}

impl Parts {
    /// Adds a run; gives the whole of it, in milliseconds.
    fn add(&mut self, steps: &[Step], output: &[u8]) -> Result<f64> {
        let [end] = stamp::stamps(output)[..] else {
            bail!("not one stamp: {output:?}");
        };
        let first = steps.first().context("the agent told no steps")?;
        ensure!(first.name == "received", "the first step is {}", first.name);
        let program = Step {
            name: "program".into(),
            at_ns: end,
            ..Default::default()
        };
        let mut before = first.at_ns;
        for step in steps[1..].iter().chain([&program]) {
            if !self.took.contains_key(&step.name) {
                self.order.push(step.name.clone());
            }
            let took = self.took.entry(step.name.clone()).or_default();
            took.push(milliseconds(before, step.at_ns));
            before = step.at_ns;
        }
        Ok(milliseconds(first.at_ns, end))
    }

    fn told(&self) -> Result<String> {
        let part = |name: &String| {
            let took = self.took.get(name).cloned().unwrap_or_default();
            Ok(format!("{name} {:.2}", median(took)?))
        };
        Ok(self
            .order
            .iter()
            .map(part)
            .collect::<Result<Vec<_>>>()?
            .join(", "))
    }
}

fn milliseconds(begin: u64, end: u64) -> f64 {
    (end as f64 - begin as f64) / 1e6
}
