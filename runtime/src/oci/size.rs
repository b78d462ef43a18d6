// SPDX-License-Identifier: Apache-2.0
//! How big a pod's virtual machine is.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxResources, Spec};

use super::SpecError;
use crate::config::{Hypervisor, MEMORY_MIB, VCPUS};

/// Guest memory in MiB; overrides everything else.
const MEMORY_ANNOTATION: &str = "io.bulkhead.hypervisor.memory_mib";
/// Virtual processors; overrides everything else.
const VCPUS_ANNOTATION: &str = "io.bulkhead.hypervisor.vcpus";
/// The sum of a pod's limits, as containerd's CRI plugin tells it: bytes.
const CRI_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// Microseconds of processor time per period.
const CRI_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
/// Microseconds.
const CRI_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// Period of a processor quota when none is given (config-linux.md, "CPU").
const DEFAULT_PERIOD: u64 = 100_000;

/// Size of a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Processors that it may get later.
    pub extra_vcpus: u8,
    /// Memory that it may get later, MiB.
    pub extra_memory_mib: u32,
}

/// What memory comes and goes in at most, so that the guest's kernel takes it:
/// a multiple of this, in MiB.
const EXTRA_UNIT: u32 = 128;

/// The limits of one container that a machine's size depends on; none: it has
/// none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Quota and period, microseconds.
    cpu: Option<(u64, u64)>,
}

impl Limits {
    /// Those of a container that has `self` until its resources are changed.
    pub fn changed(self, resources: Option<&LinuxResources>) -> Self {
        let memory = resources
            .and_then(|r| r.memory().as_ref())
            .and_then(|memory| memory.limit());
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let period = cpu.and_then(|cpu| cpu.period()).filter(|p| *p > 0);
        let quota = cpu.and_then(|cpu| cpu.quota());
        Self {
            memory: match memory {
                // 0 and what is not told leave it as it is.
                None | Some(0) => self.memory,
                Some(limit) => positive(limit).filter(|bytes| bytes >> 20 < *MEMORY_MIB.end()),
            },
            cpu: match (quota, self.cpu) {
                (None | Some(0), None) => None,
                (None | Some(0), Some((quota, before))) => Some((quota, period.unwrap_or(before))),
                (Some(quota), before) => {
                    let before = before.map_or(DEFAULT_PERIOD, |(_, period)| period);
                    positive(quota).map(|quota| (quota, period.unwrap_or(before)))
                }
            },
        }
    }
}

impl Size {
    /// Of the pod whose first container has this spec: its annotations, else
    /// the pod's sums as the CRI tells them, else the container's limits, else
    /// the configuration's.
    ///
    /// # Errors
    /// An annotation is not a number, or out of bounds.
    pub fn of(spec: &Spec, config: &Hypervisor) -> Result<Self, SpecError> {
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let number = |key: &str| -> Result<Option<i64>, SpecError> {
            let Some(text) = annotations.get(key) else {
                return Ok(None);
            };
            let parsed = text.trim().parse();
            parsed
                .map(Some)
                .map_err(|_| field(key, format!("{text:?} is not a number")))
        };
        let bounded = |key: &str, range: &std::ops::RangeInclusive<u64>| {
            let Some(value) = number(key)? else {
                return Ok(None);
            };
            match u64::try_from(value) {
                Ok(value) if range.contains(&value) => Ok(Some(value)),
                _ => Err(field(
                    key,
                    format!("{value} is not from {} to {}", range.start(), range.end()),
                )),
            }
        };

        let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
        let memory = match bounded(MEMORY_ANNOTATION, &MEMORY_MIB)? {
            Some(mib) => mib,
            None => {
                let limit = match number(CRI_MEMORY)? {
                    Some(bytes) => Some(bytes),
                    None => resources
                        .and_then(|r| r.memory().as_ref())
                        .and_then(|m| m.limit()),
                };
                match limit.and_then(positive) {
                    // A limit beyond all memory means none.
                    Some(bytes) if bytes >> 20 < *MEMORY_MIB.end() => {
                        bytes.div_ceil(1 << 20) + u64::from(config.overhead_mib)
                    }
                    _ => config.memory_mib.into(),
                }
            }
        };

        let most = u64::from(config.max_memory_mib);
        if memory > most {
            return Err(SpecError::field(
                "guest memory",
                format!("{memory} MiB are more than hypervisor.max_memory_mib = {most} allows"),
            ));
        }

        let vcpus = match bounded(VCPUS_ANNOTATION, &VCPUS)? {
            Some(count) => count,
            None => {
                let (quota, period) = match number(CRI_QUOTA)? {
                    Some(quota) => (Some(quota), number(CRI_PERIOD)?.and_then(positive)),
                    None => {
                        let cpu = resources.and_then(|r| r.cpu().as_ref());
                        (cpu.and_then(|c| c.quota()), cpu.and_then(|c| c.period()))
                    }
                };
                let period = period.filter(|period| *period > 0);
                match quota.and_then(positive) {
                    Some(quota) => quota
                        .div_ceil(period.unwrap_or(DEFAULT_PERIOD))
                        .clamp(*VCPUS.start(), host_processors().min(*VCPUS.end())),
                    None => config.vcpus.into(),
                }
            }
        };
        // Within the bounds, which fit.
        let vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX).min(config.max_vcpus);
        let memory_mib = u32::try_from(memory.max(*MEMORY_MIB.start())).unwrap_or(u32::MAX);
        let room = config.max_memory_mib.saturating_sub(memory_mib);
        Ok(Self {
            vcpus,
            memory_mib,
            extra_vcpus: config.extra_vcpus.min(config.max_vcpus - vcpus),
            extra_memory_mib: config
                .extra_memory_mib
                .checked_next_multiple_of(EXTRA_UNIT)
                .unwrap_or(u32::MAX)
                .min(room)
                / EXTRA_UNIT
                * EXTRA_UNIT,
        })
    }

    /// What a pod is to have beyond what it booted with, when its containers
    /// have these limits: processors, and MiB of memory. Never less than nothing:
    /// the start's size may be somebody's wish.
    pub fn extra_for(
        &self,
        limits: impl Iterator<Item = Limits> + Clone,
        overhead_mib: u32,
    ) -> (u8, u32) {
        let memory: u64 = limits
            .clone()
            .filter_map(|limits| limits.memory)
            .fold(0, u64::saturating_add);
        let memory = memory.div_ceil(1 << 20) + u64::from(overhead_mib);
        let more = memory.saturating_sub(self.memory_mib.into());
        // In blocks of 2 MiB.
        let more = more.next_multiple_of(2).min(self.extra_memory_mib.into());
        let thousandths: u64 = limits
            .filter_map(|limits| limits.cpu)
            .map(|(quota, period)| quota.saturating_mul(1000) / period.max(1))
            .fold(0, u64::saturating_add);
        let vcpus = thousandths
            .div_ceil(1000)
            .saturating_sub(self.vcpus.into())
            .min(self.extra_vcpus.into());
        // Both are at most what fits.
        (vcpus as u8, more as u32)
    }
}

fn field(key: &str, problem: String) -> SpecError {
    SpecError::field(format!("annotations: {key}"), problem)
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn host_processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(json: &str) -> Result<Size, SpecError> {
        let spec: Spec = serde_json::from_str(json).unwrap();
        Size::of(&spec, &Hypervisor::default())
    }

    fn annotated(key: &str, value: &str) -> Result<Size, SpecError> {
        size(&format!(
            r#"{{"ociVersion":"1.0.2","annotations":{{"{key}":"{value}"}}}}"#
        ))
    }

    #[test]
    fn the_configuration_is_the_last_resort() {
        let size = size(r#"{"ociVersion":"1.0.2"}"#).unwrap();
        let config = Hypervisor::default();
        assert_eq!(size.memory_mib, config.memory_mib);
        assert_eq!(size.vcpus, config.vcpus);
    }

    #[test]
    fn a_limit_gets_room_for_the_guest() {
        let limited = size(
            r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":536870912},
                "cpu":{"quota":50000,"period":100000}}}}"#,
        )
        .unwrap();
        assert_eq!(limited.memory_mib, 512 + 64);
        assert_eq!(limited.vcpus, 1);
        let unlimited =
            size(r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":-1}}}}"#);
        assert_eq!(
            unlimited.unwrap().memory_mib,
            Hypervisor::default().memory_mib
        );
        let huge = size(
            r#"{"ociVersion":"1.0.2","linux":{"resources":{"memory":{"limit":9223372036854771712}}}}"#,
        );
        assert_eq!(huge.unwrap().memory_mib, Hypervisor::default().memory_mib);
    }

    #[test]
    fn the_configuration_bounds_what_pods_ask_for() {
        let config = Hypervisor {
            max_vcpus: 2,
            max_memory_mib: 300,
            overhead_mib: 32,
            ..Hypervisor::default()
        };
        let of = |key: &str, value: &str| {
            let json = format!(r#"{{"ociVersion":"1.0.2","annotations":{{"{key}":"{value}"}}}}"#);
            Size::of(&serde_json::from_str(&json).unwrap(), &config)
        };
        assert_eq!(of(VCPUS_ANNOTATION, "8").unwrap().vcpus, 2);
        assert_eq!(of(CRI_MEMORY, "134217728").unwrap().memory_mib, 128 + 32);
        let text = of(MEMORY_ANNOTATION, "301").unwrap_err().to_string();
        assert!(text.contains("hypervisor.max_memory_mib = 300"), "{text}");
        assert!(of(CRI_MEMORY, "283115520").is_err());
    }

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_a_pod_gets_later_is_bounded() {
        let config = Hypervisor {
            max_vcpus: 4,
            max_memory_mib: 1000,
            extra_vcpus: 8,
            extra_memory_mib: 300,
            ..Hypervisor::default()
        };
        let of = |json: &str| Size::of(&serde_json::from_str(json).unwrap(), &config).unwrap();
        let size = of(r#"{"ociVersion":"1.0.2"}"#);
        assert_eq!((size.extra_vcpus, size.extra_memory_mib), (3, 384));
        let size = of(
            r#"{"ociVersion":"1.0.2","annotations":{"io.bulkhead.hypervisor.memory_mib":"700",
               "io.bulkhead.hypervisor.vcpus":"4"}}"#,
        );
        assert_eq!((size.extra_vcpus, size.extra_memory_mib), (0, 256));
        let none = Size::of(
            &serde_json::from_str(r#"{"ociVersion":"1.0.2"}"#).unwrap(),
            &Hypervisor::default(),
        );
        let none = none.unwrap();
        assert_eq!((none.extra_vcpus, none.extra_memory_mib), (0, 0));
    }

    #[test]
    fn limits_change_as_far_as_they_are_told() {
        let none = Limits::default();
        assert_eq!(none.changed(None), none);
        let both = none.changed(Some(&resources(
            r#"{"memory":{"limit":1048576},"cpu":{"quota":50000}}"#,
        )));
        assert_eq!(both.memory, Some(1 << 20));
        assert_eq!(both.cpu, Some((50_000, DEFAULT_PERIOD)));
        let other = both.changed(Some(&resources(r#"{"cpu":{"period":50000}}"#)));
        assert_eq!(other.memory, both.memory);
        assert_eq!(other.cpu, Some((50_000, 50_000)));
        let zeros = r#"{"memory":{"limit":0},"cpu":{"quota":0,"period":0}}"#;
        assert_eq!(both.changed(Some(&resources(zeros))), both);
        let gone = r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#;
        assert_eq!(both.changed(Some(&resources(gone))), none);
    }

    #[test]
    fn the_sum_of_limits_decides() {
        let size = Size {
            vcpus: 1,
            memory_mib: 256,
            extra_vcpus: 3,
            extra_memory_mib: 1024,
        };
        let limits = |mib: u64, quota: u64| Limits {
            memory: Some(mib << 20),
            cpu: Some((quota, 100_000)),
        };
        let extra = |all: &[Limits]| size.extra_for(all.iter().copied(), 64);
        assert_eq!(extra(&[]), (0, 0));
        assert_eq!(extra(&[limits(100, 50_000), Limits::default()]), (0, 0));
        assert_eq!(extra(&[limits(192, 50_000), limits(101, 50_001)]), (0, 102));
        assert_eq!(extra(&[limits(192, 150_000), limits(0, 50_000)]), (1, 0));
        assert_eq!(extra(&[limits(1 << 19, u64::MAX)]), (3, 1024));
    }

    #[test]
    fn annotations_win_and_are_checked() {
        assert_eq!(
            annotated(MEMORY_ANNOTATION, "2048").unwrap().memory_mib,
            2048
        );
        assert_eq!(annotated(VCPUS_ANNOTATION, "2").unwrap().vcpus, 2);
        assert_eq!(
            annotated(CRI_MEMORY, "134217728").unwrap().memory_mib,
            128 + 64
        );
        for (key, value) in [
            (MEMORY_ANNOTATION, "lots"),
            (MEMORY_ANNOTATION, "1"),
            (MEMORY_ANNOTATION, "-5"),
            (VCPUS_ANNOTATION, "0"),
            (VCPUS_ANNOTATION, "1000"),
            (CRI_QUOTA, "x"),
        ] {
            let text = annotated(key, value).unwrap_err().to_string();
            assert!(text.contains(key), "{text}");
        }
    }
}
