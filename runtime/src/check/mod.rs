// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check`: whether this host can run microVMs, line by line, each
//! failure with its remedy. Every line tries the thing itself; nothing is
//! concluded from names alone.

mod image;
mod kvm;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

use crate::{
    error::chain,
    resource::{cgroup, network},
};

/// What is checked, from the configuration.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest image.
    pub image: PathBuf,
    /// Where sandboxes keep their state.
    pub state_dir: PathBuf,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What was looked at.
    pub name: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

/// What came of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be; says what was found.
    Good(String),
    /// Works, but not as well as it could; says why and what to do.
    Fair {
        /// What was found.
        found: String,
        /// What would make it good.
        remedy: String,
    },
    /// No microVM runs like this.
    Bad {
        /// What was found.
        found: String,
        /// What would make it good.
        remedy: String,
    },
}

impl Verdict {
    fn bad(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Bad {
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn fair(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Fair {
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// All lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// In the order they were tried.
    pub lines: Vec<Line>,
}

impl Report {
    /// Whether microVMs can run here.
    pub fn passed(&self) -> bool {
        !self
            .lines
            .iter()
            .any(|line| matches!(line.verdict, Verdict::Bad { .. }))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { name, verdict } in &self.lines {
            match verdict {
                Verdict::Good(found) => writeln!(f, "ok    {name}: {found}")?,
                Verdict::Fair { found, remedy } => {
                    writeln!(f, "warn  {name}: {found}\n      remedy: {remedy}")?;
                }
                Verdict::Bad { found, remedy } => {
                    writeln!(f, "FAIL  {name}: {found}\n      remedy: {remedy}")?;
                }
            }
        }
        let verdict = if self.passed() {
            "this host can run microVMs"
        } else {
            "this host cannot run microVMs yet"
        };
        writeln!(f, "{verdict}")
    }
}

/// Tries everything. Takes below a second; leaves nothing behind.
pub fn run(subject: &Subject) -> Report {
    let mut lines = Vec::new();
    let mut add = |name, verdict| lines.push(Line { name, verdict });
    add("permissions", permissions());
    add("cpu", kvm::cpu());
    add("kvm", kvm::opens());
    add("vmm", executable(&subject.vmm));
    add("kvm speed", kvm::runs_guests(&subject.vmm));
    add("guest kernel", image::kernel(&subject.kernel));
    add("guest image", image::image(&subject.image));
    add("tap and redirect", tap());
    add("cgroups", cgroups());
    add("state directory", state_dir(&subject.state_dir));
    Report { lines }
}

fn permissions() -> Verdict {
    if geteuid().is_root() {
        Verdict::Good("running as root".into())
    } else {
        Verdict::bad(
            format!("running as uid {}", geteuid()),
            "run as root: mounts, taps and cgroups need it",
        )
    }
}

fn executable(path: &Path) -> Verdict {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => {
            Verdict::Good(path.display().to_string())
        }
        Ok(_) => Verdict::bad(
            format!("{} is not an executable file", path.display()),
            "set hypervisor.path in the configuration to the bulkhead-vmm binary",
        ),
        Err(error) => Verdict::bad(
            format!("{}: {error}", path.display()),
            "install bulkhead-vmm, or set hypervisor.path in the configuration",
        ),
    }
}

fn tap() -> Verdict {
    match network::probe() {
        Ok(()) => Verdict::Good("a tap can be made and traffic redirected to it".into()),
        Err(error) => Verdict::bad(
            chain(&error),
            "load the modules tun, sch_ingress, cls_u32 and act_mirred",
        ),
    }
}

fn cgroups() -> Verdict {
    match cgroup::v2_root() {
        None => Verdict::fair(
            "cgroup v2 is not mounted: pods are not accounted in their cgroups",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup/unified",
        ),
        Some(root) => {
            let probe = root.join(format!("bulkhead-check-{}", std::process::id()));
            match std::fs::create_dir(&probe).and_then(|()| std::fs::remove_dir(&probe)) {
                Ok(()) => Verdict::Good(format!("cgroup v2 at {}", root.display())),
                Err(error) => Verdict::bad(
                    format!("no cgroup can be made in {}: {error}", root.display()),
                    "run where the cgroup file system is writable (in a container: --privileged)",
                ),
            }
        }
    }
}

fn state_dir(path: &Path) -> Verdict {
    let probe = path.join(format!(".check-{}", std::process::id()));
    let tried = std::fs::create_dir_all(path)
        .and_then(|()| std::fs::create_dir(&probe))
        .and_then(|()| std::fs::remove_dir(&probe));
    // `v/s_1024` and a 16-digit name come below it; a Unix socket's path
    // has at most 107 bytes.
    let longest = path.as_os_str().len() + "/s/0123456789abcdef/v/s_1024".len();
    match tried {
        Err(error) => Verdict::bad(
            format!("{} is not writable: {error}", path.display()),
            "set runtime.state_dir to a writable directory on a tmpfs",
        ),
        Ok(()) if longest > 107 => Verdict::bad(
            format!("{} is too long for sockets below it", path.display()),
            "set runtime.state_dir to a path of at most 77 bytes",
        ),
        Ok(()) => Verdict::Good(path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_fails_with_one_bad_line_and_shows_its_remedy() {
        let good = Line {
            name: "cpu",
            verdict: Verdict::Good("fine".into()),
        };
        let warn = Line {
            name: "cgroups",
            verdict: Verdict::fair("none", "mount them"),
        };
        let bad = Line {
            name: "kvm",
            verdict: Verdict::bad("absent", "load it"),
        };
        let mut report = Report {
            lines: vec![good, warn],
        };
        assert!(report.passed());
        report.lines.push(bad);
        assert!(!report.passed());
        let text = report.to_string();
        assert!(text.contains("FAIL  kvm: absent\n      remedy: load it"));
        assert!(text.ends_with("this host cannot run microVMs yet\n"));
    }

    #[test]
    fn missing_files_are_named() {
        let subject = Subject {
            vmm: "/nowhere/vmm".into(),
            kernel: "/nowhere/kernel".into(),
            image: "/nowhere/image".into(),
            state_dir: std::env::temp_dir().join(format!("bulkhead-check-{}", std::process::id())),
        };
        let text = run(&subject).to_string();
        for name in ["/nowhere/vmm", "/nowhere/kernel", "/nowhere/image"] {
            assert!(text.contains(name), "{text}");
        }
        let _ = std::fs::remove_dir_all(&subject.state_dir);
    }
}
