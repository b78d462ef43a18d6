// SPDX-License-Identifier: Apache-2.0
//! The specification's mounts (runtime-spec config.md, "Mounts"; options of
//! config-linux.md) as what the kernel is asked to do. Nothing is touched here.

use std::path::{Component, Path, PathBuf};

use bulkhead_agent_protocol::oci;

use crate::error::{AgentError, Result};
use crate::sys::mount::{
    FsOption, MountAttr, ATTR_ATIME_MASK, ATTR_NOATIME, ATTR_NODEV, ATTR_NODIRATIME, ATTR_NOEXEC,
    ATTR_NOSUID, ATTR_NOSYMFOLLOW, ATTR_RDONLY, ATTR_RELATIME, ATTR_STRICTATIME,
};

/// Where a mount's contents come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file or directory of the guest.
    Bind {
        /// Path in the guest.
        path: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
    },
    /// A file system of its own.
    New {
        /// File system type as the kernel names it.
        fs_type: String,
        /// Its source, where it has one.
        source: Option<String>,
        /// Options of the file system.
        options: Vec<FsOption>,
    },
}

/// One mount, ready to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPlan {
    /// Path in the container, absolute, without `..`.
    pub destination: PathBuf,
    /// What is mounted.
    pub source: Source,
    /// Attributes of the mount itself.
    pub attr: MountAttr,
    /// Attributes of everything below it too.
    pub recursive_attr: MountAttr,
    /// MS_SHARED and so on, and whether for everything below it too.
    pub propagation: Option<(u64, bool)>,
    /// Fill a tmpfs with what the image has at the destination.
    pub copy_up: bool,
    /// To become read-only only when everything is mounted: something may be
    /// mounted inside, which needs a mount point.
    pub read_only_later: bool,
}

/// Paths below /proc that a bind mount may cover: files that programs like
/// lxcfs provide. Anything else there could fool security checks.
const PROC_ALLOWED: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
    "/proc/sys/crypto/fips_enabled",
];

/// Translates one mount.
///
/// # Errors
/// [`AgentError::Invalid`] naming the mount.
pub fn plan(mount: &oci::Mount) -> Result<MountPlan> {
    let invalid =
        |why: String| AgentError::Invalid(format!("mounts: {}: {why}", mount.destination));
    let destination = normalise(&mount.destination);
    if destination == Path::new("/") {
        return Err(invalid("cannot be mounted over".into()));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(invalid("id-mapped mounts are not supported yet".into()));
    }
    let mut options = Options::default();
    for option in &mount.options {
        options.take(option).map_err(&invalid)?;
    }
    let bind = options.bind || options.bind_recursive || mount.type_ == "bind";
    let source = if bind {
        check_proc(&destination).map_err(&invalid)?;
        if !mount.source.starts_with('/') {
            return Err(invalid(format!(
                "source {:?} is not absolute",
                mount.source
            )));
        }
        Source::Bind {
            path: PathBuf::from(&mount.source),
            recursive: options.bind_recursive,
        }
    } else {
        new_source(mount, &mut options).map_err(&invalid)?
    };
    let tmpfs = matches!(&source, Source::New { fs_type, .. } if fs_type == "tmpfs");
    if options.copy_up && !tmpfs {
        return Err(invalid("tmpcopyup is for tmpfs".into()));
    }
    let mut attr = options.attr;
    let read_only_later = tmpfs && attr.set & ATTR_RDONLY != 0;
    if read_only_later {
        attr.set &= !ATTR_RDONLY;
    }
    Ok(MountPlan {
        destination,
        source,
        attr,
        recursive_attr: options.recursive_attr,
        propagation: options.propagation,
        copy_up: options.copy_up,
        read_only_later,
    })
}

fn new_source(mount: &oci::Mount, options: &mut Options) -> std::result::Result<Source, String> {
    let fs_type = match mount.type_.as_str() {
        "" | "none" => return Err("type is missing".into()),
        "cgroup" => "cgroup2",
        other => other,
    };
    let mut fs_options = std::mem::take(&mut options.data);
    match fs_type {
        // The guest's hierarchy has its options already.
        "cgroup2" => fs_options.clear(),
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" => {}
        _ if options.attr.set & ATTR_RDONLY != 0 => {
            // A file system on a device is opened read-only, too.
            fs_options.insert(0, FsOption::Flag("ro".into()));
        }
        _ => {}
    }
    let source = (!mount.source.is_empty()).then(|| mount.source.clone());
    Ok(Source::New {
        fs_type: fs_type.to_owned(),
        source,
        options: fs_options,
    })
}

/// The path without `.`, `..` and double slashes, from the root.
pub fn normalise(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}

fn check_proc(destination: &Path) -> std::result::Result<(), String> {
    let below = destination.starts_with("/proc") && destination != Path::new("/proc");
    if below
        && !PROC_ALLOWED
            .iter()
            .any(|path| destination == Path::new(path))
    {
        return Err("only some files of /proc can be mounted over".into());
    }
    Ok(())
}

#[derive(Default)]
struct Options {
    bind: bool,
    bind_recursive: bool,
    copy_up: bool,
    attr: MountAttr,
    recursive_attr: MountAttr,
    propagation: Option<(u64, bool)>,
    data: Vec<FsOption>,
}

impl Options {
    fn take(&mut self, option: &str) -> std::result::Result<(), String> {
        if let Some((attribute, set)) = attribute(option) {
            change(&mut self.attr, attribute, set);
            return Ok(());
        }
        // "rro" and its like; "rw" and "relatime" were taken above.
        if let Some((attribute, set)) = option.strip_prefix('r').and_then(attribute) {
            change(&mut self.recursive_attr, attribute, set);
            return Ok(());
        }
        if let Some(propagation) = propagation(option) {
            self.propagation = Some(propagation);
            return Ok(());
        }
        match option {
            "bind" => self.bind = true,
            "rbind" => self.bind_recursive = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => return Err("id-mapped mounts are not supported yet".into()),
            "remount" => return Err("remount is not supported".into()),
            "" | "defaults" | "async" | "nomand" | "loud" | "silent" | "noiversion"
            | "nolazytime" => {}
            _ => self.data.push(match option.split_once('=') {
                Some((key, value)) => FsOption::Value(key.to_owned(), value.to_owned()),
                None => FsOption::Flag(option.to_owned()),
            }),
        }
        Ok(())
    }
}

/// A mount attribute by its option, and whether the option sets it.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (ATTR_RDONLY, true),
        "rw" => (ATTR_RDONLY, false),
        "nosuid" => (ATTR_NOSUID, true),
        "suid" => (ATTR_NOSUID, false),
        "nodev" => (ATTR_NODEV, true),
        "dev" => (ATTR_NODEV, false),
        "noexec" => (ATTR_NOEXEC, true),
        "exec" => (ATTR_NOEXEC, false),
        "nodiratime" => (ATTR_NODIRATIME, true),
        "diratime" => (ATTR_NODIRATIME, false),
        "nosymfollow" => (ATTR_NOSYMFOLLOW, true),
        "symfollow" => (ATTR_NOSYMFOLLOW, false),
        "noatime" => (ATTR_NOATIME, true),
        "strictatime" => (ATTR_STRICTATIME, true),
        // The kernel's default is relatime; its value is 0 within the mask.
        "relatime" | "atime" | "nostrictatime" => (ATTR_RELATIME, true),
        "norelatime" => (ATTR_STRICTATIME, true),
        _ => return None,
    })
}

/// Later options win over earlier ones.
fn change(attr: &mut MountAttr, attribute: u64, set: bool) {
    let of_atime = matches!(attribute, ATTR_RELATIME | ATTR_NOATIME | ATTR_STRICTATIME);
    if of_atime {
        attr.clear |= ATTR_ATIME_MASK;
        attr.set = attr.set & !ATTR_ATIME_MASK | attribute;
    } else if set {
        attr.set |= attribute;
        attr.clear &= !attribute;
    } else {
        attr.clear |= attribute;
        attr.set &= !attribute;
    }
}

/// A propagation type by its name, and whether it is recursive.
pub fn propagation(name: &str) -> Option<(u64, bool)> {
    let (kind, recursive) = match name.strip_prefix('r') {
        Some(kind) => (kind, true),
        None => (name, false),
    };
    let kind = match kind {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((kind, recursive))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, destination: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: destination.into(),
            type_: kind.into(),
            source: "/source".into(),
            options: options.iter().map(|option| (*option).into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_read_only_bind() {
        let plan = plan(&mount("bind", "/data", &["rbind", "ro", "rprivate"])).unwrap();
        assert_eq!(
            plan.source,
            Source::Bind {
                path: "/source".into(),
                recursive: true
            }
        );
        assert_eq!(plan.attr.set, ATTR_RDONLY);
        assert_eq!(plan.propagation, Some((libc::MS_PRIVATE, true)));
        assert!(!plan.read_only_later);
    }

    #[test]
    fn bind_is_known_by_its_option_too() {
        let plan = plan(&mount("none", "/data", &["bind"])).unwrap();
        assert!(matches!(
            plan.source,
            Source::Bind {
                recursive: false,
                ..
            }
        ));
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let plan = plan(&mount(
            "bind",
            "/data",
            &["rbind", "rro", "rnoexec", "relatime", "rw"],
        ))
        .unwrap();
        assert_eq!(plan.recursive_attr.set, ATTR_RDONLY | ATTR_NOEXEC);
        assert_eq!(plan.attr.set, 0);
        assert_eq!(plan.attr.clear, ATTR_RDONLY | ATTR_ATIME_MASK);
    }

    #[test]
    fn tmpfs_options_go_to_the_file_system() {
        let plan = plan(&mount(
            "tmpfs",
            "/dev",
            &["nosuid", "strictatime", "mode=755", "size=65536k", "ro"],
        ))
        .unwrap();
        assert_eq!(plan.attr.set, ATTR_NOSUID | ATTR_STRICTATIME);
        assert!(plan.read_only_later);
        let Source::New { options, .. } = plan.source else {
            panic!("not a file system");
        };
        assert_eq!(
            options,
            [
                FsOption::Value("mode".into(), "755".into()),
                FsOption::Value("size".into(), "65536k".into())
            ]
        );
    }

    #[test]
    fn the_last_of_contrary_options_wins() {
        let plan = plan(&mount(
            "bind",
            "/x",
            &["bind", "noexec", "exec", "noatime", "strictatime"],
        ))
        .unwrap();
        assert_eq!(plan.attr.set, ATTR_STRICTATIME);
        assert_eq!(plan.attr.clear, ATTR_NOEXEC | ATTR_ATIME_MASK);
    }

    #[test]
    fn cgroup_becomes_version_two() {
        let plan = plan(&mount(
            "cgroup",
            "/sys/fs/cgroup",
            &["nosuid", "ro", "memory"],
        ))
        .unwrap();
        let Source::New {
            fs_type, options, ..
        } = plan.source
        else {
            panic!("not a file system");
        };
        assert_eq!((fs_type.as_str(), options.len()), ("cgroup2", 0));
    }

    #[test]
    fn what_is_refused() {
        for bad in [
            mount("bind", "/", &["bind"]),
            mount("bind", "/a/../..", &["bind"]),
            mount("bind", "/proc/self/attr", &["bind"]),
            mount("bind", "/proc/1/../sysrq-trigger", &["bind"]),
            mount("bind", "/x", &["bind", "idmap"]),
            mount("", "/x", &[]),
            mount("proc", "/proc", &["tmpcopyup"]),
        ] {
            let error = plan(&bad).unwrap_err();
            assert!(matches!(error, AgentError::Invalid(_)), "{bad:?}");
        }
        assert!(plan(&mount("bind", "/proc/meminfo", &["bind"])).is_ok());
        assert!(plan(&mount("bind", "/procession/x", &["bind"])).is_ok());
    }

    #[test]
    fn paths_are_normalised_from_the_root() {
        assert_eq!(normalise("a//b/./c/../d"), PathBuf::from("/a/b/d"));
        assert_eq!(normalise("/../../x"), PathBuf::from("/x"));
    }
}
