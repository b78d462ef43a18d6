// SPDX-License-Identifier: Apache-2.0
//! For people.

use std::fmt;

use super::{Density, Pod};

/// In MiB.
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// In MiB, or that it is not known.
fn maybe(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".into(), |bytes| format!("{:.1}", mib(bytes)))
}

/// Whether a pod's memory is mergeable, and with whose.
fn group(pod: &Pod) -> String {
    match &pod.merge_group {
        None => "-".into(),
        Some(name) if pod.mergeable => name.clone(),
        Some(name) => format!("not merged ({name})"),
    }
}

impl fmt::Display for Density {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            pods,
            host,
            shared,
            room,
        } = self;
        if !pods.is_empty() {
            let names: Vec<String> = pods
                .iter()
                .map(|pod| format!("{}/{}", pod.namespace, pod.id))
                .collect();
            let width = names.iter().map(String::len).max().unwrap_or(0).max(3);
            writeln!(
                f,
                "{:width$} {:>8} {:>8} {:>6} {:>6} {:>7} {:>7} {:>8} {:>7}  GROUP",
                "MiB", "OWN", "GUEST", "VMM", "SHIM", "TABLES", "KERNEL", "FILES", "MERGED"
            )?;
            for (name, pod) in names.iter().zip(pods) {
                writeln!(
                    f,
                    "{name:width$} {:>8.1} {:>8.1} {:>6.1} {:>6.1} {:>7.1} {:>7} {:>8.1} {:>7}  {}",
                    mib(pod.own),
                    mib(pod.guest),
                    mib(pod.vmm),
                    mib(pod.shim),
                    mib(pod.page_tables),
                    maybe(pod.kernel),
                    mib(pod.file_shared),
                    maybe(pod.merged),
                    group(pod)
                )?;
            }
            writeln!(
                f,
                "OWN is the sum of GUEST to KERNEL; FILES and MERGED are shared with others.\n"
            )?;
        }
        let own: u64 = pods.iter().map(|pod| pod.own).sum();
        writeln!(
            f,
            "pods:       {}, with {:.1} MiB of their own",
            pods.len(),
            mib(own)
        )?;
        writeln!(f, "page cache: saves {:.1} MiB", mib(shared.page_cache))?;
        writeln!(f, "templates:  save {:.1} MiB", mib(shared.template))?;
        match shared.ksm {
            Some(saved) => writeln!(f, "KSM:        saves {:.1} MiB", mib(saved))?,
            None => writeln!(f, "KSM:        not in this kernel")?,
        }
        writeln!(
            f,
            "host:       {:.0} of {:.0} MiB available; page tables take {:.1} MiB, those of guests {}",
            mib(host.available),
            mib(host.memory),
            mib(host.page_tables),
            match host.guest_page_tables {
                Some(bytes) => format!("{:.1} MiB", mib(bytes)),
                None => "an amount that this kernel does not tell".into(),
            }
        )?;
        match room {
            Some(room) => writeln!(
                f,
                "room:       {} more like these, at {:.1} MiB each; {} more if all used all of their memory",
                room.like_these,
                mib(room.each),
                room.all_used
            ),
            None => writeln!(f, "room:       not known without a pod to go by"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::density;

    #[test]
    fn people_are_told_in_mebibytes() {
        let mut density = density();
        density.pods[1].mergeable = false;
        density.pods[1].kernel = None;
        let text = density.to_string();
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1],
            [
                "default/a",
                "50.0",
                "40.0",
                "2.0",
                "6.0",
                "1.0",
                "1.0",
                "9.0",
                "0.0",
                "red"
            ]
        );
        assert_eq!(lines[2][6], "-");
        assert!(text.contains("not merged (red)"), "{text}");
        assert!(
            text.contains("room:       29 more like these, at 35.0 MiB each; 2 more if"),
            "{text}"
        );
        density.pods.clear();
        density.room = None;
        assert!(density.to_string().starts_with("pods:       0,"));
    }
}
