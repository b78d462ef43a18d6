// SPDX-License-Identifier: Apache-2.0
//! A pod through crictl, for tests.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bulkhead_tests::cri::Cri;
use bulkhead_tests::image;
use bulkhead_tests::listing::Listing;
use bulkhead_tests::proc::Done;
use serde_json::{json, Value};

use crate::context::{same, until, Context};

/// How long something may take that needs no boot.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A pod; dropping it removes it.
pub struct Pod<'a> {
    pub cri: &'a Cri,
    pub dir: PathBuf,
    pub id: String,
    name: String,
}

/// Puts `more` into `base`, objects into objects.
fn merge(base: &mut Value, more: Value) {
    match (base, more) {
        (Value::Object(base), Value::Object(more)) => {
            for (key, value) in more {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, more) => *base = more,
    }
}

impl<'a> Pod<'a> {
    /// Writes the configuration of a pod down; gives the file.
    pub fn configuration(context: &Context, name: &str, more: Value) -> Result<PathBuf> {
        let dir = context.dir.join(format!("pod-{name}"));
        fs::create_dir_all(dir.join("logs"))?;
        let mut config = json!({
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0 },
            "log_directory": dir.join("logs"),
            "linux": {},
        });
        merge(&mut config, more);
        let file = dir.join("pod.json");
        fs::write(&file, config.to_string())?;
        Ok(file)
    }

    /// RunPodSandbox.
    pub fn run(context: &'a Context, name: &str, more: Value) -> Result<Self> {
        let handler = context.cri()?.handler();
        Self::run_with(context, handler, name, more)
    }

    /// As [`Pod::run`], with another runtime handler.
    pub fn run_with(context: &'a Context, handler: &str, name: &str, more: Value) -> Result<Self> {
        Self::run_on(context, context.cri()?, handler, name, more)
    }

    /// As [`Pod::run_with`], on another containerd than the tests' own.
    pub fn run_on(
        context: &'a Context,
        cri: &'a Cri,
        handler: &str,
        name: &str,
        more: Value,
    ) -> Result<Self> {
        let file = Self::configuration(context, name, more)?;
        let file = file.to_string_lossy();
        let id = cri
            .crictl(&["runp", "--runtime", handler, &file])?
            .ok()
            .context("run a pod")?
            .out();
        Ok(Self {
            cri,
            dir: context.dir.join(format!("pod-{name}")),
            id,
            name: name.into(),
        })
    }

    /// CreateContainer.
    pub fn create(&self, name: &str, script: &str, more: Value) -> Result<String> {
        let mut config = json!({
            "metadata": { "name": name, "attempt": 0 },
            "image": { "image": image::ROOT_IMAGE },
            "command": ["sh", "-c", script],
            "log_path": format!("{name}.log"),
            "linux": {},
        });
        merge(&mut config, more);
        let file = self.dir.join(format!("{name}.json"));
        fs::write(&file, config.to_string())?;
        let (file, pod) = (file.to_string_lossy(), self.dir.join("pod.json"));
        let created = self
            .cri
            .crictl(&["create", &self.id, &file, &pod.to_string_lossy()])?;
        Ok(created
            .ok()
            .with_context(|| format!("create {name}"))?
            .out())
    }

    /// CreateContainer and StartContainer.
    pub fn start(&self, name: &str, script: &str, more: Value) -> Result<String> {
        let id = self.create(name, script, more)?;
        let started = self.cri.crictl(&["start", &id])?;
        started.ok().with_context(|| format!("start {name}"))?;
        Ok(id)
    }

    /// ExecSync.
    pub fn exec(&self, container: &str, argv: &[&str]) -> Result<Done> {
        let mut args = vec!["exec", "-s", container];
        args.extend(argv);
        self.cri.crictl(&args)
    }

    /// ExecSync of a shell script that succeeds.
    pub fn sh(&self, container: &str, script: &str) -> Result<String> {
        let done = self.exec(container, &["sh", "-c", script])?;
        Ok(done.ok().with_context(|| script.to_owned())?.out())
    }

    /// What a container has logged.
    pub fn logs(&self, container: &str) -> Result<String> {
        Ok(self.cri.crictl(&["logs", container])?.ok()?.out())
    }

    /// Waits until a container has logged these words.
    pub fn logged(&self, container: &str, words: &str) -> Result<()> {
        until(PATIENCE, &format!("{words:?} in the log"), || {
            Ok(self.logs(container)?.contains(words))
        })
    }

    /// ContainerStatus.
    pub fn status(&self, container: &str) -> Result<Value> {
        Ok(self.cri.json(&["inspect", container])?["status"].take())
    }

    /// Waits for a container's end; gives its status.
    pub fn ended(&self, container: &str) -> Result<Value> {
        until(PATIENCE, "the container's end", || {
            Ok(self.status(container)?["state"] == "CONTAINER_EXITED")
        })?;
        self.status(container)
    }

    /// The pod's address.
    pub fn address(&self) -> Result<String> {
        let status = self.cri.json(&["inspectp", &self.id])?;
        let ip = status["status"]["network"]["ip"].as_str();
        Ok(ip.context("it has no address")?.into())
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub fn remove(self) -> Result<()> {
        self.cri
            .crictl(&["stopp", &self.id])?
            .ok()
            .context("stop the pod")?;
        self.cri
            .crictl(&["rmp", &self.id])?
            .ok()
            .context("remove the pod")?;
        let pods = self.cri.crictl(&["pods", "-q", "--name", &self.name])?;
        same(pods.ok()?.out(), "")
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // After `remove` there is nothing to do; after an error this is best
        // effort.
        let _ = self.cri.crictl(&["rmp", "-f", &self.id]);
    }
}

/// Where pods can leave something.
pub fn listing(context: &Context, cri: &Cri) -> Listing {
    Listing::take(&places(context, cri))
}

pub fn places(context: &Context, cri: &Cri) -> Vec<PathBuf> {
    let dir = cri.containerd().dir();
    vec![
        context.config.state_dir.clone(),
        dir.join("state/io.containerd.runtime.v2.task"),
        dir.join("state/io.containerd.grpc.v1.cri/sandboxes"),
        dir.join("state/io.containerd.grpc.v1.cri/containers"),
        PathBuf::from("/run/containerd/s"),
    ]
}
