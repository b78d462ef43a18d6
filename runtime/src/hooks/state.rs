// SPDX-License-Identifier: Apache-2.0
//! A container's state as its hooks are told it (runtime.md, "State"), and
//! which of them run when.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use serde::Serialize;

use super::{run::run, HookError, HostHooks};
use crate::{error::chain, oci::SpecError};

/// The hooks of one container, and what they are told.
#[derive(Debug)]
pub struct Lifecycle {
    hooks: HostHooks,
    version: String,
    id: String,
    bundle: PathBuf,
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

impl Lifecycle {
    /// Of the container `id`.
    ///
    /// # Errors
    /// A hook that cannot be, naming the field.
    pub fn new(spec: &Spec, id: &str, bundle: &Path) -> Result<Self, SpecError> {
        let annotations = spec.annotations().iter().flatten();
        Ok(Self {
            hooks: HostHooks::of(spec)?,
            version: spec.version().clone(),
            id: id.into(),
            bundle: bundle.into(),
            annotations: annotations
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        })
    }

    /// Whether any hook may set the container's network up.
    pub fn any_before_start(&self) -> bool {
        self.hooks.any_before_start()
    }

    /// Runs `prestart` and `createRuntime`, in their order, up to the first
    /// that fails.
    ///
    /// # Errors
    /// That one's.
    pub async fn before_start(&self, pid: u32) -> Result<(), HookError> {
        let state = self.state("creating", Some(pid));
        for hook in &self.hooks.before_start {
            run(hook, &self.bundle, &state).await?;
        }
        Ok(())
    }

    /// Runs `poststart`, up to the first that fails.
    ///
    /// # Errors
    /// That one's.
    pub async fn poststart(&self, pid: u32) -> Result<(), HookError> {
        let state = self.state("running", Some(pid));
        for hook in &self.hooks.poststart {
            run(hook, &self.bundle, &state).await?;
        }
        Ok(())
    }

    /// Runs `poststop`. What fails is only logged.
    pub async fn poststop(&self) {
        let state = self.state("stopped", None);
        for hook in &self.hooks.poststop {
            if let Err(error) = run(hook, &self.bundle, &state).await {
                tracing::warn!(container = self.id, error = chain(&error), "hook failed");
            }
        }
    }

    fn state(&self, status: &str, pid: Option<u32>) -> Vec<u8> {
        let state = State {
            oci_version: &self.version,
            id: &self.id,
            status,
            pid,
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        // Only a path that is no text cannot be written; a bundle with such a
        // name has not been found by its JSON request.
        serde_json::to_vec(&state).unwrap_or_default()
    }
}
