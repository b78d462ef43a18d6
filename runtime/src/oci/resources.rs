// SPDX-License-Identifier: Apache-2.0
//! Limits of a specification (config-linux.md, "Control groups") for the
//! agent, which applies them inside the guest.

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::{LinuxBlockIo, LinuxDeviceType, LinuxResources, LinuxThrottleDevice};

use super::{devices::HostDevices, SpecError};

/// Translates limits.
///
/// # Errors
/// A value that does not fit, naming the field.
pub fn resources(resources: &LinuxResources) -> Result<oci::Resources, SpecError> {
    let mut out = oci::Resources {
        pids_limit: resources.pids().as_ref().map(|pids| pids.limit()),
        unified: resources.unified().clone().unwrap_or_default(),
        ..Default::default()
    };
    let host = HostDevices::default();
    for rule in resources.devices().iter().flatten() {
        let rule = oci::DeviceRule {
            allow: rule.allow(),
            type_: rule.typ().unwrap_or(LinuxDeviceType::A).as_str().into(),
            major: rule.major(),
            minor: rule.minor(),
            access: rule.access().clone().unwrap_or_default(),
            ..Default::default()
        };
        out.devices.extend(host.rule(rule));
    }
    if let Some(memory) = resources.memory() {
        out.memory = Some(oci::Memory {
            limit: memory.limit(),
            reservation: memory.reservation(),
            swap: memory.swap(),
            swappiness: memory.swappiness(),
            disable_oom_killer: memory.disable_oom_killer(),
            ..Default::default()
        })
        .into();
    }
    if let Some(cpu) = resources.cpu() {
        out.cpu = Some(oci::Cpu {
            shares: cpu.shares(),
            quota: cpu.quota(),
            period: cpu.period(),
            idle: cpu.idle(),
            burst: cpu.burst(),
            // The host's processors and memory nodes: the guest has its own.
            ..Default::default()
        })
        .into();
    }
    if let Some(block_io) = resources.block_io() {
        out.block_io = Some(throttling(block_io)).into();
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        out.hugepage_limits.push(oci::HugepageLimit {
            page_size: limit.page_size().clone(),
            limit: u64::try_from(limit.limit()).map_err(|_| {
                SpecError::field("linux.resources.hugepageLimits", "a limit is negative")
            })?,
            ..Default::default()
        });
    }
    Ok(out)
}

fn throttling(block_io: &LinuxBlockIo) -> oci::BlockIo {
    let devices = |list: &Option<Vec<LinuxThrottleDevice>>| {
        list.iter()
            .flatten()
            .map(|device| oci::ThrottleDevice {
                major: device.major(),
                minor: device.minor(),
                rate: device.rate(),
                ..Default::default()
            })
            .collect()
    };
    oci::BlockIo {
        weight: block_io.weight().map(u32::from),
        weight_device: block_io
            .weight_device()
            .iter()
            .flatten()
            .map(|device| oci::WeightDevice {
                major: device.major(),
                minor: device.minor(),
                weight: device.weight().map(u32::from),
                ..Default::default()
            })
            .collect(),
        throttle_read_bps_device: devices(block_io.throttle_read_bps_device()),
        throttle_write_bps_device: devices(block_io.throttle_write_bps_device()),
        throttle_read_iops_device: devices(block_io.throttle_read_iops_device()),
        throttle_write_iops_device: devices(block_io.throttle_write_iops_device()),
        ..Default::default()
    }
}
