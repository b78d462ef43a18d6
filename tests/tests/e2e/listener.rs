// SPDX-License-Identifier: Apache-2.0
//! A seccomp listener in a sidecar (config-linux.md, "Seccomp"): its socket is
//! in a volume that both containers have.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context as _, Result};
use bulkhead_tests::boxed::hot::with_libraries;
use serde_json::json;

use crate::context::{mentions, same, Context};
use crate::pod::Pod;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![a_sidecar_decides_about_calls];

/// The program and what it needs, in one directory.
const PROGRAM: &str = "bulkhead-listener";

fn a_sidecar_decides_about_calls(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let volume = context.dir.join("listener");
    fs::create_dir(&volume)?;
    let mut loader = None;
    for file in with_libraries(&context.products.program(PROGRAM))? {
        let name = file.file_name().context("a library without a name")?;
        if name.to_string_lossy().starts_with("ld-linux") {
            loader = Some(name.to_owned());
        }
        fs::copy(&file, volume.join(name)).with_context(|| file.display().to_string())?;
        fs::set_permissions(volume.join(name), fs::Permissions::from_mode(0o755))?;
    }
    let loader = loader.context("it is no dynamic program")?;
    let profile = context.dir.join("notify.json");
    let rules = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "listenerPath": volume.join("socket"),
        "listenerMetadata": "from the profile",
        "syscalls": [{ "names": ["chmod", "fchmodat"], "action": "SCMP_ACT_NOTIFY" }],
    });
    fs::write(&profile, rules.to_string())?;

    let pod = Pod::run(context, "listener", json!({}))?;
    let mounts = json!([{ "host_path": volume, "container_path": "/side" }]);
    let script = format!(
        "exec /side/{} --library-path /side /side/{PROGRAM} /side/socket",
        loader.to_string_lossy()
    );
    let sidecar = pod.start("sidecar", &script, json!({ "mounts": mounts }))?;
    pod.logged(&sidecar, "listening")?;
    let security = json!({ "seccomp": { "profile_type": 2, "localhost_ref": profile } });
    let judged = pod.start(
        "judged",
        "chmod 700 /tmp 2>&1; echo status $?; exec sleep 9999",
        json!({ "mounts": mounts, "linux": { "security_context": security } }),
    )?;
    pod.logged(&judged, "status 1")?;
    pod.logged(&judged, "Block device required")?;
    pod.logged(&sidecar, "refused")?;
    let log = pod.logs(&sidecar)?;
    let id = format!("\"id\":\"{judged}\"");
    mentions(&log, &["from the profile", "\"fds\":[\"seccompFd\"]", &id])?;
    // Further processes have their own.
    let done = pod.exec(&judged, &["chmod", "700", "/tmp"])?;
    same(done.code, 1)?;
    mentions(&done.err(), &["Block device required"])?;
    pod.logged(&sidecar, "\"status\":\"running\"")?;
    pod.remove()?;
    fs::remove_dir_all(&volume)?;
    Ok(())
}
