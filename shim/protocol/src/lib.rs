// SPDX-License-Identifier: Apache-2.0
//! What containerd and a shim say to each other: the task service in both its
//! versions, events, and the messages of the shim's command line.
//!
//! Both versions of the task service take the messages of [`shim`], so one
//! implementation serves both.

#![forbid(unsafe_code)]

macro_rules! generated {
    ($($(#[$doc:meta])* $module:ident $(uses $($used:ident)+)?;)+) => {$(
        $(#[$doc])*
        #[allow(clippy::all, dead_code, missing_docs, unused, nonstandard_style)]
        #[rustfmt::skip]
        pub mod $module {
            $($(use super::$used;)+)?
            include!(concat!(env!("OUT_DIR"), "/", stringify!($module), ".rs"));
        }
    )+};
}

generated! {
    /// `containerd.types`.
    types;
    /// `containerd.v1.types`.
    task;
    /// Messages of `containerd.task.v2` and `containerd.task.v3`.
    shim;
    /// The service `containerd.task.v2.Task` and its client.
    shim_ttrpc;
    /// The service `containerd.task.v3.Task` and its client.
    shim_v3_ttrpc;
    /// `containerd.events`.
    events;
    /// Message of `containerd.services.events.ttrpc.v1`.
    forward;
    /// The service `containerd.services.events.ttrpc.v1.Events` and its client.
    forward_ttrpc;
    /// `io.containerd.cgroups.v2`.
    metrics;
    /// `runtimeoptions.v1`.
    runtimeoptions;
    /// `containerd.runc.v1`.
    runc;
    /// `containerd.runtime.bootstrap.v1`.
    bootstrap;
    /// Messages of `containerd.runtime.sandbox.v1`.
    sandbox;
    /// The service `containerd.runtime.sandbox.v1.Sandbox` and its client.
    sandbox_ttrpc;
    /// `runtime.v1`, the CRI's, as far as it is used.
    cri;
}

/// Something that travels in a `google.protobuf.Any`: containerd writes the
/// bare name of the message as its type, without a host in front.
pub trait Named: protobuf::Message {
    /// Package and message.
    const TYPE_URL: &'static str;

    /// Packs the message.
    ///
    /// # Errors
    /// When it is larger than protobuf allows (2 GiB).
    fn to_any(&self) -> protobuf::Result<protobuf::well_known_types::any::Any> {
        Ok(protobuf::well_known_types::any::Any {
            type_url: Self::TYPE_URL.into(),
            value: self.write_to_bytes()?,
            ..Default::default()
        })
    }
}

macro_rules! named {
    ($($message:ty = $name:literal;)+) => {$(
        impl Named for $message {
            const TYPE_URL: &'static str = $name;
        }
    )+};
}

named! {
    events::TaskCreate = "containerd.events.TaskCreate";
    events::TaskStart = "containerd.events.TaskStart";
    events::TaskExit = "containerd.events.TaskExit";
    events::TaskDelete = "containerd.events.TaskDelete";
    events::TaskOOM = "containerd.events.TaskOOM";
    events::TaskExecAdded = "containerd.events.TaskExecAdded";
    events::TaskExecStarted = "containerd.events.TaskExecStarted";
    events::TaskPaused = "containerd.events.TaskPaused";
    events::TaskResumed = "containerd.events.TaskResumed";
    metrics::Metrics = "io.containerd.cgroups.v2.Metrics";
    runtimeoptions::Options = "runtimeoptions.v1.Options";
    runc::Options = "containerd.runc.v1.Options";
    runc::ProcessDetails = "containerd.runc.v1.ProcessDetails";
    cri::PodSandboxConfig = "runtime.v1.PodSandboxConfig";
}

#[cfg(test)]
mod tests;
