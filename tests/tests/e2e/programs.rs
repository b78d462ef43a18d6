// SPDX-License-Identifier: Apache-2.0
//! Real programs, unchanged, of Debian's packages. The root file system is
//! what `tests/programs/build` makes (`make test-programs`); without it these
//! are skipped. The scripts are in `tests/programs`, and beside them what they
//! are to print.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bulkhead_agent_protocol::CAPABILITIES;
use bulkhead_tests::containerd::remove_tree;
use bulkhead_tests::proc;
use serde_json::{json, Value};

use crate::context::{same, Context, Skip, LIMIT};
use crate::failure::good_spec;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    program_redis,
    program_nginx,
    program_postgresql,
    program_java,
    program_node,
    program_stress_ng,
    program_buildah,
    program_systemd,
];

/// How long one program may take: an emulated machine starts a JVM in minutes.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// What a program is given.
pub enum Given {
    Plain,
    Privileged,
    /// A machine of its own, nearly.
    Machine,
}

fn mount(args: &[&str]) -> Result<()> {
    proc::run(Command::new("mount").args(args), LIMIT)?
        .ok()
        .map(drop)
}

/// Runs a program's script to its end, and compares what it printed (systemd:
/// what it wrote to a file) and its status.
fn works(context: &Context, name: &str, given: &Given, status: i32) -> Result<()> {
    let lower = std::env::var("BULKHEAD_PROGRAMS")
        .map_err(|_| Skip("it needs BULKHEAD_PROGRAMS (make test-programs)".into()))?;
    let base = context.dir.join("programs");
    fs::create_dir_all(&base)?;
    let place = base.display().to_string();
    mount(&["-t", "tmpfs", "tmpfs", &place])?;
    for part in ["upper", "work", "root"] {
        fs::create_dir(base.join(part))?;
    }
    let options = format!("lowerdir={lower},upperdir={place}/upper,workdir={place}/work");
    mount(&[
        "-t",
        "overlay",
        "overlay",
        "-o",
        &options,
        &format!("{place}/root"),
    ])?;
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
    let root = base.join("root");
    fs::copy(scripts.join(format!("{name}.sh")), root.join("program"))?;

    let file = context.dir.join("program.json");
    fs::write(&file, specification(context, &root, given)?.to_string())?;
    let flags = ["--rm", "--config"];
    let mut command = context.containerd.run(&context.runtime, &flags);
    let done = proc::run(command.arg(&file).arg(context.id("program")), PATIENCE)?;
    let report = fs::read_to_string(root.join("report"));
    for path in [&root, &base] {
        proc::run(Command::new("umount").arg("-l").arg(path), LIMIT)?.ok()?;
    }
    remove_tree(&base)?;
    let out = done.out();
    let printed = report.as_ref().unwrap_or(&out);
    let wanted = fs::read_to_string(scripts.join(format!("{name}.wanted")))?;
    same(printed.trim_end(), wanted.trim_end()).with_context(|| done.err())?;
    same(done.code, status).with_context(|| done.err())
}

/// Of a container with this root, that runs `/program`.
pub fn specification(context: &Context, root: &Path, given: &Given) -> Result<Value> {
    let mut spec = good_spec(context, root)?;
    spec["process"]["args"] = json!(["/program"]);
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    spec["process"]["env"] = json!([path]);
    spec["linux"]["resources"]["memory"] = json!({ "limit": 1u64 << 30 });
    let mut more = vec![("/tmp", "tmpfs")];
    if !matches!(given, Given::Plain) {
        let all = json!(CAPABILITIES.map(|name| format!("CAP_{name}")).to_vec());
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = all.clone();
        }
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    }
    if matches!(given, Given::Machine) {
        more.extend([("/run", "tmpfs"), ("/sys/fs/cgroup", "cgroup")]);
        let kinds = ["pid", "ipc", "uts", "mount", "network", "cgroup"];
        spec["linux"]["namespaces"] = kinds.map(|kind| json!({ "type": kind })).to_vec().into();
    }
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    for (place, kind) in more {
        mounts.retain(|mount| mount["destination"] != place);
        mounts.push(json!({ "destination": place, "type": kind, "source": kind }));
    }
    Ok(spec)
}

fn program_redis(context: &Context) -> Result<()> {
    works(context, "redis", &Given::Plain, 0)
}

fn program_nginx(context: &Context) -> Result<()> {
    works(context, "nginx", &Given::Plain, 0)
}

fn program_postgresql(context: &Context) -> Result<()> {
    works(context, "postgresql", &Given::Plain, 0)
}

fn program_java(context: &Context) -> Result<()> {
    works(context, "java", &Given::Plain, 0)
}

fn program_node(context: &Context) -> Result<()> {
    works(context, "node", &Given::Plain, 0)
}

fn program_stress_ng(context: &Context) -> Result<()> {
    works(context, "stress-ng", &Given::Plain, 0)
}

fn program_buildah(context: &Context) -> Result<()> {
    works(context, "buildah", &Given::Privileged, 0)
}

fn program_systemd(context: &Context) -> Result<()> {
    // That is how the kernel ends a first process that powers off (reboot(2)).
    works(context, "systemd", &Given::Machine, 128 + libc::SIGINT)
}
