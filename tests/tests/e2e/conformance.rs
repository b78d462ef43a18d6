// SPDX-License-Identifier: Apache-2.0
//! Cases about control groups of opencontainers/runtime-tools' validation and
//! of youki's contest, with the guest's kernel: `agent/CONFORMANCE.md` has the
//! list. Figures are read in the container, from its own group.

use anyhow::{ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::UpdateContainerRequest;
use bulkhead_agent_protocol::oci;
use bulkhead_runtime::oci::{parse, resources};
use bulkhead_tests::guest::{specification, Guest};
use bulkhead_tests::start::Start;
use serde_json::{json, Value};

use crate::context::{same, Context};
use crate::guest::{guest, process, ROOT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![cgroup_cases_of_the_conformance_suites];

/// A container that does nothing and may change its own control groups.
fn spec(resources: &Value) -> Result<oci::Spec> {
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({"type": kind}));
    let mount =
        |kind: &str, place: &str| json!({"type": kind, "source": kind, "destination": place});
    let config = json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["sleep", "9999"], "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev"), mount("sysfs", "/sys"),
            mount("cgroup", "/sys/fs/cgroup")],
        "linux": {"namespaces": namespaces, "resources": resources},
    });
    specification(&config, "c", ROOT)
}

/// Numbers the further processes of the one container.
struct Case<'a> {
    guest: &'a Guest,
    execs: u32,
}

impl Case<'_> {
    fn sh(&mut self, script: &str) -> Result<String> {
        self.execs += 1;
        let id = format!("e{}", self.execs);
        let done = self.guest.exec("c", &id, process(&["sh", "-c", script])?)?;
        let printed = done.1.ok().with_context(|| script.to_owned())?;
        Ok(String::from_utf8(printed)?.trim_end().to_owned())
    }

    /// Checks files of the container's group, all in one process.
    fn files(&mut self, wanted: &[(&str, &str)]) -> Result<()> {
        let names: Vec<&str> = wanted.iter().map(|(file, _)| *file).collect();
        let printed = self.sh(&format!(
            "cd /sys/fs/cgroup; for f in {}; do read line < $f; echo \"$line\"; done",
            names.join(" ")
        ))?;
        let read: Vec<&str> = printed.lines().collect();
        for (at, (file, value)) in wanted.iter().enumerate() {
            let found = read.get(at).copied().unwrap_or_default();
            ensure!(found == *value, "{file}: {found:?} instead of {value:?}");
        }
        Ok(())
    }

    fn update(&self, resources: &Value) -> Result<()> {
        let request = UpdateContainerRequest {
            container_id: "c".into(),
            resources: Some(translated(resources)?).into(),
            ..Default::default()
        };
        let agent = self.guest.agent();
        self.guest
            .wait_for(agent.update_container(request))
            .map(drop)
    }
}

fn translated(value: &Value) -> Result<oci::Resources> {
    Ok(resources(&parse(value.to_string().as_bytes())?)?)
}

/// Files and what their first lines are.
type Files<'a> = &'a [(&'a str, &'a str)];

fn cgroup_cases_of_the_conformance_suites(context: &Context) -> Result<()> {
    let guest = guest(context, Start::Cold, "conformance", 256)?;
    // What is given at the create, what the group has then.
    let cases: &[(Value, Files<'_>)] = &[
        (
            json!({}),
            &[
                ("cpu.weight", "100"),
                ("cpu.max", "max 100000"),
                ("cpu.idle", "0"),
                ("memory.max", "max"),
                ("pids.max", "max"),
            ],
        ),
        (
            json!({"cpu": {"shares": 1024, "quota": 500_000, "period": 900_000}, "pids": {"limit": 50},
                "memory": {"limit": 52_428_800, "reservation": 26_214_400},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}],
                "unified": {"memory.high": "41943040"}}),
            &[
                ("cpu.weight", "100"),
                ("cpu.max", "500000 900000"),
                ("pids.max", "50"),
                ("memory.max", "52428800"),
                ("memory.low", "26214400"),
                ("memory.high", "41943040"),
                ("hugetlb.2MB.max", "4194304"),
                ("hugetlb.2MB.rsvd.max", "4194304"),
            ],
        ),
        (
            json!({"cpu": {"shares": 300_000, "quota": -1}, "pids": {"limit": -1}}),
            &[
                ("cpu.weight", "10000"),
                ("cpu.max", "max 100000"),
                ("pids.max", "max"),
            ],
        ),
        (
            json!({"cpu": {"shares": 0, "quota": 0, "period": 1_000_000}, "pids": {"limit": 0}}),
            &[
                ("cpu.weight", "100"),
                ("cpu.max", "max 1000000"),
                ("pids.max", "max"),
            ],
        ),
        (
            json!({"cpu": {"quota": 5000, "idle": 1}}),
            &[("cpu.max", "5000 100000"), ("cpu.idle", "1")],
        ),
    ];
    let mut case = Case {
        guest: &guest,
        execs: 0,
    };
    for (given, wanted) in cases {
        let context = || given.to_string();
        guest.create("c", spec(given)?).with_context(context)?;
        guest.start("c")?;
        case.files(wanted).with_context(context)?;
        end(&guest)?;
    }
    // What the kernel cannot do is an error that names it.
    for (given, word) in [
        (json!({"cpu": {"period": 100}}), "cpu.max"),
        (
            json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]}),
            "hugetlb.3MB.max",
        ),
        (
            json!({"memory": {"limit": 4096, "swap": 1}}),
            "linux.resources.memory",
        ),
    ] {
        let Err(error) = guest.create("c", spec(&given)?) else {
            anyhow::bail!("{given} was taken");
        };
        let text = format!("{error:#}");
        ensure!(text.contains(word), "{given}: {text}");
    }

    guest.create("c", spec(&json!({}))?)?;
    guest.start("c")?;
    // Updates, each of what the one before it left.
    let updates: &[(Value, Files<'_>)] = &[
        (
            json!({"cpu": {"period": 50_000}}),
            &[("cpu.max", "max 50000")],
        ),
        (
            json!({"cpu": {"quota": 30_000}}),
            &[("cpu.max", "30000 50000")],
        ),
        (
            json!({"cpu": {"period": 900_000}}),
            &[("cpu.max", "30000 900000")],
        ),
        (
            json!({"cpu": {"burst": 20_000}}),
            &[("cpu.max.burst", "20000")],
        ),
        (json!({"cpu": {"burst": 0}}), &[("cpu.max.burst", "0")]),
        (
            json!({"cpu": {"quota": -1, "shares": 100}}),
            &[("cpu.max", "max 900000"), ("cpu.weight", "17")],
        ),
        (
            json!({"memory": {"limit": 67_108_864, "reservation": 33_554_432}, "pids": {"limit": 10}}),
            &[
                ("memory.max", "67108864"),
                ("memory.low", "33554432"),
                ("pids.max", "10"),
            ],
        ),
        (
            json!({"pids": {"limit": -1}, "unified": {"pids.max": "20", "cpu.weight": "16",
                "cpu.max": "4200 100000", "memory.max": "50331648"}}),
            &[
                ("pids.max", "20"),
                ("cpu.weight", "16"),
                ("memory.max", "50331648"),
            ],
        ),
        (
            json!({"unified": {"cpu.max": "max 100000", "cpuset.cpus": "0", "cpuset.mems": "0"}}),
            &[
                ("cpu.max", "max 100000"),
                ("cpuset.cpus", "0"),
                ("cpuset.mems", "0"),
            ],
        ),
        (json!({"cpu": {"idle": 1}}), &[("cpu.idle", "1")]),
        (json!({"cpu": {"idle": 0}}), &[("cpu.idle", "0")]),
    ];
    for (given, wanted) in updates {
        let context = || format!("update {given}");
        case.update(given).with_context(context)?;
        case.files(wanted).with_context(context)?;
    }

    // A container that manages groups of its own: further processes go where
    // its first one is when they may not be in its group itself.
    same(case.sh("cat /proc/self/cgroup")?.as_str(), "0::/")?;
    case.sh(
        "mkdir /sys/fs/cgroup/sub && echo 1 > /sys/fs/cgroup/sub/cgroup.procs && \
         echo $$ > /sys/fs/cgroup/sub/cgroup.procs && \
         echo +memory > /sys/fs/cgroup/cgroup.subtree_control",
    )?;
    same(case.sh("cat /proc/self/cgroup")?.as_str(), "0::/sub")?;
    end(&guest)
}

fn end(guest: &Guest) -> Result<()> {
    crate::guest::kill(guest, "c")?;
    same(
        guest.block_on(crate::guest::end(guest, "c"))?.exit_status,
        137,
    )?;
    guest.delete("c")
}
