// SPDX-License-Identifier: Apache-2.0
//! The specification's resources (runtime-spec config-linux.md, "Control
//! groups") as cgroup v2 files.

use std::fs;
use std::os::fd::AsFd;

use bulkhead_agent_protocol::oci;

use super::{devices, Cgroup};
use crate::error::{AgentError, Result};

/// One file of a group and what to write to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The controller that the file belongs to.
    pub controller: &'static str,
    /// File name.
    pub file: String,
    /// Contents.
    pub value: String,
}

/// Applies `resources` to a group; `devices` too when it is `true` (they
/// cannot be changed on a running container).
///
/// # Errors
/// [`AgentError::Invalid`] for values that make no sense, else the step that
/// failed.
pub fn apply(group: &Cgroup, resources: &oci::Resources, with_devices: bool) -> Result<()> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let now = Now {
        online: &online,
        cpu_max: &fs::read_to_string(group.path().join("cpu.max")).unwrap_or_default(),
    };
    for setting in settings(resources, now)? {
        let exists = group.has(setting.controller) && group.path().join(&setting.file).exists();
        if exists || setting.controller.is_empty() {
            group.write(&setting.file, &setting.value)?;
        } else if group.hierarchy.lenient {
            crate::warn!(
                "msg=\"no controller for a limit\" file={} value=\"{}\"",
                setting.file,
                setting.value
            );
        } else {
            return Err(AgentError::Invalid(format!(
                "linux.resources: the guest's kernel has no {} to limit",
                setting.file
            )));
        }
    }
    if with_devices {
        let program = devices::compile(&resources.devices)?;
        if let Err(error) = devices::attach(group.directory().as_fd(), &program) {
            if !group.hierarchy.lenient {
                return Err(error);
            }
            crate::warn!("msg=\"no device rules\" error=\"{error}\"");
        }
    }
    Ok(())
}

/// What settings depend on besides the specification.
#[derive(Clone, Copy, Debug)]
pub struct Now<'a> {
    /// The kernel's list of online CPUs.
    pub online: &'a str,
    /// The group's cpu.max; empty: it has none.
    pub cpu_max: &'a str,
}

/// Translates all but devices.
///
/// # Errors
/// [`AgentError::Invalid`] as for [`apply`].
pub fn settings(resources: &oci::Resources, now: Now<'_>) -> Result<Vec<Setting>> {
    let mut list = Vec::new();
    let mut set = |controller: &'static str, file: &str, value: String| {
        list.push(Setting {
            controller,
            file: file.to_owned(),
            value,
        });
    };
    if let Some(memory) = resources.memory.as_ref() {
        memory_settings(memory, &mut set)?;
    }
    if let Some(cpu) = resources.cpu.as_ref() {
        cpu_settings(cpu, now, &mut set)?;
    }
    match resources.pids_limit {
        // 0 is "not set" to the runtimes that write it.
        None | Some(0) => {}
        Some(limit) => set("pids", "pids.max", limit_or_max(limit)),
    }
    if let Some(io) = resources.block_io.as_ref() {
        io_settings(io, &mut set);
    }
    for page in &resources.hugepage_limits {
        if page.page_size.contains('/') {
            return Err(AgentError::Invalid(format!(
                "linux.resources.hugepageLimits: bad page size {:?}",
                page.page_size
            )));
        }
        // What is used, and what is reserved by those who may use it later.
        for kind in ["max", "rsvd.max"] {
            let file = format!("hugetlb.{}.{kind}", page.page_size);
            set("hugetlb", &file, page.limit.to_string());
        }
    }
    let mut unified: Vec<_> = resources.unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') {
            return Err(AgentError::Invalid(format!(
                "linux.resources.unified: {file:?} is no cgroup file"
            )));
        }
        set("", file, value.clone());
    }
    Ok(list)
}

fn limit_or_max(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

fn memory_settings(
    memory: &oci::Memory,
    set: &mut impl FnMut(&'static str, &str, String),
) -> Result<()> {
    // 0 is "not set" to the runtimes that write it.
    let limit = memory.limit.filter(|limit| *limit != 0);
    let swap = memory.swap.filter(|swap| *swap != 0);
    if let Some(reservation) = memory.reservation.filter(|bytes| *bytes != 0) {
        set("memory", "memory.low", limit_or_max(reservation));
    }
    if let Some(limit) = limit {
        set("memory", "memory.max", limit_or_max(limit));
    }
    // v1 counts memory and swap together, v2 swap alone.
    let swap = match (limit, swap) {
        (_, Some(swap)) if swap < 0 => Some("max".to_owned()),
        (Some(limit), Some(swap)) if limit > 0 => {
            if swap < limit {
                return Err(AgentError::Invalid(format!(
                    "linux.resources.memory: swap {swap} is less than limit {limit}"
                )));
            }
            Some((swap - limit).to_string())
        }
        (_, Some(_)) => {
            return Err(AgentError::Invalid(
                "linux.resources.memory: swap without a memory limit".into(),
            ))
        }
        (Some(limit), None) if limit < 0 => Some("max".to_owned()),
        (_, None) => None,
    };
    if let Some(swap) = swap {
        // A guest without swap space has nothing to limit.
        if swap != "max" && swap != "0" || has_swap() {
            set("memory", "memory.swap.max", swap);
        }
    }
    Ok(())
}

fn has_swap() -> bool {
    // The first line is the heading.
    fs::read_to_string("/proc/swaps").is_ok_and(|text| text.lines().count() > 1)
}

fn cpu_settings(
    cpu: &oci::Cpu,
    now: Now<'_>,
    set: &mut impl FnMut(&'static str, &str, String),
) -> Result<()> {
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        set("cpu", "cpu.weight", weight_of_shares(shares).to_string());
    }
    if let Some(idle) = cpu.idle {
        set("cpu", "cpu.idle", idle.to_string());
    }
    let period = cpu.period.filter(|period| *period != 0);
    match (cpu.quota.filter(|quota| *quota != 0), period) {
        (Some(quota), period) => {
            let quota = limit_or_max(quota);
            let value = match period {
                Some(period) => format!("{quota} {period}"),
                None => quota,
            };
            set("cpu", "cpu.max", value);
        }
        (None, Some(period)) => {
            // An update of the period alone leaves the quota.
            let quota = now.cpu_max.split_whitespace().next().unwrap_or("max");
            set("cpu", "cpu.max", format!("{quota} {period}"));
        }
        (None, None) => {}
    }
    if let Some(burst) = cpu.burst {
        set("cpu", "cpu.max.burst", burst.to_string());
    }
    if !cpu.cpus.is_empty() {
        let wanted = parse_list(&cpu.cpus).ok_or_else(|| {
            AgentError::Invalid(format!("linux.resources.cpu.cpus: {:?}", cpu.cpus))
        })?;
        // The host's numbering reaches further than the guest's.
        let online = parse_list(now.online).unwrap_or_default();
        let clipped: Vec<u32> = wanted.into_iter().filter(|n| online.contains(n)).collect();
        if clipped.is_empty() {
            crate::warn_limited!(
                "msg=\"no CPU of the set is online; not applied\" cpus=\"{}\"",
                cpu.cpus
            );
        } else {
            set("cpuset", "cpuset.cpus", format_list(&clipped));
        }
    }
    if !cpu.mems.is_empty() {
        let wanted = parse_list(&cpu.mems).ok_or_else(|| {
            AgentError::Invalid(format!("linux.resources.cpu.mems: {:?}", cpu.mems))
        })?;
        // A guest has one node.
        if wanted.contains(&0) {
            set("cpuset", "cpuset.mems", "0".to_owned());
        }
    }
    Ok(())
}

/// v1's cpu.shares (2 to 262144, default 1024) as v2's cpu.weight (1 to 10000,
/// default 100): a curve through the three pairs, in the logarithm of both.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
            10f64.powf(exponent).ceil() as u64
        }
    }
}

fn io_settings(io: &oci::BlockIo, set: &mut impl FnMut(&'static str, &str, String)) {
    // v1's 10 to 1000 onto v2's 1 to 10000.
    let convert = |weight: u32| 1 + (u64::from(weight).max(10) - 10) * 9999 / 990;
    if let Some(weight) = io.weight.filter(|weight| *weight != 0) {
        set("io", "io.weight", format!("default {}", convert(weight)));
    }
    for device in &io.weight_device {
        if let Some(weight) = device.weight {
            let value = format!("{}:{} {}", device.major, device.minor, convert(weight));
            set("io", "io.weight", value);
        }
    }
    for (key, devices) in [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ] {
        for device in devices {
            let rate = match device.rate {
                0 => "max".to_owned(),
                rate => rate.to_string(),
            };
            let value = format!("{}:{} {key}={rate}", device.major, device.minor);
            set("io", "io.max", value);
        }
    }
}

/// Parses the kernel's list format ("0-3,7"); `None` when it is not one.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    const MOST: u32 = 4096;
    let mut list = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: u32 = first.trim().parse().ok()?;
        let last: u32 = last.trim().parse().ok()?;
        if first > last || last >= MOST {
            return None;
        }
        list.extend(first..=last);
    }
    list.sort_unstable();
    list.dedup();
    Some(list)
}

fn format_list(list: &[u32]) -> String {
    let text: Vec<String> = list.iter().map(u32::to_string).collect();
    text.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now<'_> = Now {
        online: "0-1\n",
        cpu_max: "20000 100000\n",
    };

    fn values(resources: &oci::Resources) -> Vec<(String, String)> {
        settings(resources, NOW)
            .unwrap()
            .into_iter()
            .map(|setting| (setting.file, setting.value))
            .collect()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn shares_follow_the_curve_that_runc_uses() {
        for (shares, weight) in [
            (0, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (1_000_000, 10_000),
        ] {
            assert_eq!(weight_of_shares(shares), weight, "shares {shares}");
        }
        // Rising all the way.
        let mut last = 0;
        for shares in (2..=262_144).step_by(97) {
            let weight = weight_of_shares(shares);
            assert!(weight >= last && (1..=10_000).contains(&weight));
            last = weight;
        }
    }

    #[test]
    fn swap_is_what_exceeds_the_memory_limit() {
        let resources = oci::Resources {
            memory: Some(oci::Memory {
                limit: Some(100),
                swap: Some(150),
                reservation: Some(50),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        assert_eq!(
            values(&resources),
            [
                pair("memory.low", "50"),
                pair("memory.max", "100"),
                pair("memory.swap.max", "50")
            ]
        );
    }

    #[test]
    fn less_swap_than_memory_is_refused() {
        let resources = oci::Resources {
            memory: Some(oci::Memory {
                limit: Some(100),
                swap: Some(50),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let error = settings(&resources, NOW).unwrap_err();
        assert!(matches!(error, AgentError::Invalid(_)), "{error}");
    }

    #[test]
    fn cpu_sets_are_clipped_to_what_is_online() {
        let resources = oci::Resources {
            cpu: Some(oci::Cpu {
                quota: Some(50_000),
                period: Some(100_000),
                cpus: "1,4-7".into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        assert_eq!(
            values(&resources),
            [pair("cpu.max", "50000 100000"), pair("cpuset.cpus", "1")]
        );
    }

    #[test]
    fn cpu_time_and_huge_pages() {
        let of = |cpu: oci::Cpu| {
            values(&oci::Resources {
                cpu: Some(cpu).into(),
                ..Default::default()
            })
        };
        let cpu = |quota: Option<i64>, period: Option<u64>| oci::Cpu {
            quota,
            period,
            ..Default::default()
        };
        for (quota, period, wanted) in [
            (Some(5000), None, Some("5000")),
            (Some(-1), None, Some("max")),
            (Some(5000), Some(50_000), Some("5000 50000")),
            (None, Some(50_000), Some("20000 50000")),
            (Some(0), Some(0), None),
        ] {
            let wanted: Vec<_> = wanted.iter().map(|value| pair("cpu.max", value)).collect();
            assert_eq!(of(cpu(quota, period)), wanted, "{quota:?} {period:?}");
        }
        let idle = oci::Cpu {
            shares: Some(0),
            idle: Some(1),
            burst: Some(7),
            ..Default::default()
        };
        assert_eq!(
            of(idle),
            [pair("cpu.idle", "1"), pair("cpu.max.burst", "7")]
        );
        let pages = oci::Resources {
            hugepage_limits: vec![oci::HugepageLimit {
                page_size: "2MB".into(),
                limit: 9,
                ..Default::default()
            }],
            ..Default::default()
        };
        let wanted = ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"].map(|file| pair(file, "9"));
        assert_eq!(values(&pages), wanted);
    }

    #[test]
    fn unified_keys_cannot_leave_the_group() {
        let mut resources = oci::Resources::default();
        resources
            .unified
            .insert("../agent/cgroup.procs".into(), "1".into());
        assert!(settings(&resources, NOW).is_err());
    }

    #[test]
    fn lists_are_parsed_or_refused() {
        assert_eq!(parse_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_list(""), Some(vec![]));
        assert_eq!(parse_list("3-1"), None);
        assert_eq!(parse_list("0-4294967295"), None);
        assert_eq!(parse_list("a"), None);
    }

    #[test]
    fn pids_and_io() {
        let resources = oci::Resources {
            pids_limit: Some(-1),
            block_io: Some(oci::BlockIo {
                weight: Some(500),
                throttle_read_bps_device: vec![oci::ThrottleDevice {
                    major: 8,
                    minor: 0,
                    rate: 1024,
                    ..Default::default()
                }],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        assert_eq!(
            values(&resources),
            [
                pair("pids.max", "max"),
                pair("io.weight", "default 4950"),
                pair("io.max", "8:0 rbps=1024")
            ]
        );
    }
}
