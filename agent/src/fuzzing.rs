// SPDX-License-Identifier: Apache-2.0
//! What the agent does with bytes of others before it does anything for them:
//! for the fuzz targets in `agent/fuzz`.

use bulkhead_agent_protocol::{agent, oci};
use protobuf::Message;

use crate::cgroup::{devices, resources};
use crate::container::{check_name, plan};
use crate::netlink;

/// A container's specification: decoded, and made a plan.
pub fn specification(bytes: &[u8]) {
    if let Ok(spec) = oci::Spec::parse_from_bytes(bytes) {
        plan_of(&spec);
    }
}

fn plan_of(spec: &oci::Spec) {
    let Ok(plan) = plan::container(spec, "fuzz") else {
        return;
    };
    // What it was made of stands for a further process as well.
    if let Some(process) = spec.process.as_ref() {
        let _ = plan::process(process, Some(&plan.process));
    }
    limits(&plan.resources);
}

fn limits(resources: &oci::Resources) {
    let _ = resources::settings(
        resources,
        resources::Now {
            online: "0-3",
            cpu_max: "max 100000",
        },
    );
    let _ = devices::compile(&resources.devices);
}

/// The request of any call: the first byte selects it.
pub fn request(bytes: &[u8]) {
    let Some((call, bytes)) = bytes.split_first() else {
        return;
    };
    match call % 9 {
        0 => with(bytes, |request: agent::CreateContainerRequest| {
            let _ = check_name(&request.container_id, "container_id");
            if let Some(spec) = request.spec.as_ref() {
                plan_of(spec);
            }
            for mirror in &request.mirrors {
                let _ = crate::mirror::check(&mirror.entries);
            }
        }),
        1 => with(bytes, |request: agent::ExecProcessRequest| {
            let _ = check_name(&request.exec_id, "exec_id");
            if let Some(process) = request.process.as_ref() {
                let _ = plan::process(process, None);
            }
        }),
        2 => with(bytes, |request: agent::UpdateContainerRequest| {
            limits(&request.resources.unwrap_or_default());
        }),
        3 => with(bytes, |request: agent::SetupSandboxRequest| {
            for name in request.sysctls.keys() {
                let _ = plan::sysctl_path(name);
            }
            netlink::fuzz(&request.network);
        }),
        4 => with(bytes, |request: agent::SignalProcessRequest| {
            let _ = check_name(&request.container_id, "container_id");
        }),
        5 => with(bytes, |request: agent::ResizePtyRequest| {
            let _ = check_name(&request.exec_id, "exec_id");
        }),
        6 => with(bytes, |request: agent::RemoveDeviceRequest| {
            let _ = crate::devices::is_address(&request.address);
        }),
        7 => with(bytes, |request: agent::CopyFileRequest| {
            let _ = crate::container::copy::CopyPlan::new(&request);
        }),
        // Those of nothing but names.
        _ => {
            let _ = agent::ContainerRequest::parse_from_bytes(bytes);
            let _ = agent::ProcessRequest::parse_from_bytes(bytes);
            let _ = agent::StartContainerRequest::parse_from_bytes(bytes);
            let _ = agent::WaitProcessRequest::parse_from_bytes(bytes);
            let _ = agent::KernelLogRequest::parse_from_bytes(bytes);
            let _ = agent::AnnounceRequest::parse_from_bytes(bytes);
            let _ = agent::Empty::parse_from_bytes(bytes);
        }
    }
}

fn with<M: Message>(bytes: &[u8], work: impl FnOnce(M)) {
    if let Ok(message) = M::parse_from_bytes(bytes) {
        work(message);
    }
}

/// What a container's child tells, and what the kernel answers by netlink.
pub fn answer(bytes: &[u8]) {
    crate::child::report::fuzz(bytes);
    netlink::fuzz_answer(bytes);
}
