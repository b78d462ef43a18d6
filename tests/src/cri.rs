// SPDX-License-Identifier: Apache-2.0
//! A private containerd that a kubelet could use: the CRI plugin, a runtime
//! handler, images and a network for pods; and crictl to talk to it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};

use crate::containerd::{Containerd, BULKHEAD, RUNC};
use crate::install::{Products, CNI_PLUGINS};
use crate::proc::{self, Done};
use crate::{image, listing};

/// The bridge that the pods are on.
pub const BRIDGE: &str = "bh-cri0";
/// A runtime handler of Bulkhead's with a key of its configuration in
/// containerd's: [`INLINE_MEMORY_MIB`].
pub const INLINE: &str = "bulkhead-inline";
/// Memory of its pods that say nothing of theirs, in MiB.
pub const INLINE_MEMORY_MIB: u32 = 384;
/// The host's address on it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 199, 8, 1);
/// How long a call may take; a guest boots in some, and emulation is slow.
const LIMIT: Duration = Duration::from_secs(180);

/// containerd with its CRI plugin.
pub struct Cri {
    containerd: Containerd,
    crictl: PathBuf,
    handler: &'static str,
}

impl Cri {
    /// Starts one below `dir`, which is made and belongs to it, with the
    /// runtime handlers `bulkhead` and `runc`, of which `runtime` is used.
    ///
    /// # Errors
    /// As [`Containerd::start`]; crictl or the network plugins are not there.
    pub fn start(dir: &Path, products: &Products, config: &Path, runtime: &str) -> Result<Self> {
        let crictl = products.cri_tool("crictl")?;
        plugins()?;
        let handler = if runtime == BULKHEAD {
            "bulkhead"
        } else {
            "runc"
        };
        write_network(dir)?;
        let cri = |snapshotter: &str| plugin(dir, snapshotter, handler);
        let containerd = Containerd::start_with_cri(dir, &products.bin_dir(), config, &cri)?;
        containerd.import(&image::cached()?)?;
        let cri = Self {
            containerd,
            crictl,
            handler,
        };
        cri.wait_for_images(&[image::ROOT_IMAGE, image::APP_IMAGE, image::PAUSE_IMAGE])?;
        Ok(cri)
    }

    /// Waits until the plugin knows of images: it learns of them from
    /// containerd's events.
    ///
    /// # Errors
    /// It does not know of one after some minutes.
    pub fn wait_for_images(&self, names: &[&str]) -> Result<()> {
        let begin = Instant::now();
        for name in names {
            while self.crictl(&["inspecti", "-q", name])?.code != 0 {
                if begin.elapsed() > LIMIT {
                    bail!("the CRI plugin does not know of the image {name}");
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// Its containerd.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// The runtime handler under test.
    pub fn handler(&self) -> &'static str {
        self.handler
    }

    /// `crictl` on it, without a verb yet.
    pub fn command(&self) -> Command {
        let socket = format!("unix://{}", self.containerd.socket().display());
        let mut command = Command::new(&self.crictl);
        command.args(["--runtime-endpoint", &socket, "--image-endpoint", &socket]);
        command.args(["--timeout", &format!("{}s", LIMIT.as_secs())]);
        command
    }

    /// Runs a command of crictl to its end.
    ///
    /// # Errors
    /// It takes too long. That it fails is for the caller to see.
    pub fn crictl(&self, args: &[&str]) -> Result<Done> {
        proc::run(self.command().args(args), LIMIT)
    }

    /// What a command of crictl prints as JSON.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let done = self.crictl(args)?.ok().with_context(|| args.join(" "))?;
        serde_json::from_slice(&done.stdout).with_context(|| args.join(" "))
    }

    /// Removes all pods; says which there were.
    ///
    /// # Errors
    /// crictl does not answer.
    pub fn clean(&self) -> Result<Vec<String>> {
        let pods = self.crictl(&["pods", "-q"])?.ok()?.out();
        if !pods.is_empty() {
            self.crictl(&["rmp", "-fa"])?.ok().context("remove pods")?;
        }
        Ok(pods.lines().map(str::to_owned).collect())
    }

    /// Ends it and everything of it.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn stop(self) -> Result<()> {
        self.clean()?;
        self.containerd.stop()?;
        if listing::interface(BRIDGE) {
            let ip = Command::new("ip")
                .args(["link", "del", BRIDGE])
                .output()
                .context("run ip (package iproute2)")?;
            if !ip.status.success() {
                bail!("the bridge {BRIDGE} cannot be removed");
            }
        }
        Ok(())
    }
}

/// Checks that the network plugins are installed.
///
/// # Errors
/// They are not.
pub fn plugins() -> Result<()> {
    let bridge = Path::new(CNI_PLUGINS).join("bridge");
    if !bridge.exists() {
        bail!(
            "{} is missing (package containernetworking-plugins)",
            bridge.display()
        );
    }
    Ok(())
}

/// The CRI plugin's configuration.
fn plugin(dir: &Path, snapshotter: &str, handler: &str) -> String {
    let cri = "[plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "{cri}]\n  sandbox_image = {:?}\n  stream_server_address = \"127.0.0.1\"\n  \
         stream_server_port = \"0\"\n\
         {cri}.cni]\n  bin_dir = {CNI_PLUGINS:?}\n  conf_dir = {:?}\n\
         {cri}.containerd]\n  snapshotter = {snapshotter:?}\n  default_runtime_name = {handler:?}\n\
         {cri}.containerd.runtimes.bulkhead]\n  runtime_type = {BULKHEAD:?}\n  \
         privileged_without_host_devices = true\n  pod_annotations = [\"io.bulkhead.*\"]\n{}\
         {cri}.containerd.runtimes.{INLINE}]\n  runtime_type = {BULKHEAD:?}\n{}\
         {cri}.containerd.runtimes.{INLINE}.options.hypervisor]\n  memory_mib = {INLINE_MEMORY_MIB}\n\
         {cri}.containerd.runtimes.runc]\n  runtime_type = {RUNC:?}\n",
        image::PAUSE_IMAGE,
        dir.join("cni").to_string_lossy(),
        sandboxer(),
        sandboxer(),
    )
}

/// Environment variable that has pods come by the sandbox API, which
/// containerd 2 has, and not by a container that stands for them: `shim`.
const SANDBOXER: &str = "BULKHEAD_SANDBOXER";

fn sandboxer() -> String {
    match std::env::var(SANDBOXER) {
        Ok(name) if !name.is_empty() => format!("  sandboxer = {name:?}\n"),
        _ => String::new(),
    }
}

fn write_network(dir: &Path) -> Result<()> {
    let conf = dir.join("cni");
    fs::create_dir_all(&conf).with_context(|| format!("make {}", conf.display()))?;
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "bulkhead",
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": true,
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": dir.join("cni-data"),
                    "ranges": [[{ "subnet": "10.199.8.0/24" }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    fs::write(conf.join("10-bulkhead.conflist"), network.to_string())
        .context("write the network's configuration")
}
