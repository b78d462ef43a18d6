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
    /// MS_SHARED and so on, and whether for everything below it too; one after
    /// the other.
    pub propagation: Vec<(u64, bool)>,
    /// Fill a tmpfs with what the image has at the destination.
    pub copy_up: bool,
    /// A tmpfs that takes its mode from the directory it covers: the options
    /// do not say it.
    pub mode_of_covered: bool,
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

const ID_MAPPED: &str =
    "id-mapped mounts are made on the host, which leaves out what asks for them";

/// Translates one mount.
///
/// # Errors
/// [`AgentError::Invalid`] naming the mount.
pub fn plan(mount: &oci::Mount) -> Result<MountPlan> {
    let invalid =
        |why: String| AgentError::Invalid(format!("mounts: {}: {why}", mount.destination));
    let destination = normalise(&mount.destination);
    check_place(&destination).map_err(&invalid)?;
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(invalid(ID_MAPPED.into()));
    }
    let mut options = Options::default();
    for option in &mount.options {
        options.take(option).map_err(&invalid)?;
    }
    let bind = options.bind || options.bind_recursive || mount.type_ == "bind";
    let source = if bind {
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
    if destination == Path::new(PROC) && !may_be_proc(&source) {
        return Err(invalid(
            "only a proc file system can be mounted here".into(),
        ));
    }
    let (mut attr, mut recursive_attr) = (options.attr, options.recursive_attr);
    let mut mode_of_covered = false;
    if let Source::New {
        fs_type, options, ..
    } = &source
    {
        // Nothing is below a file system that was just made.
        merge(&mut attr, std::mem::take(&mut recursive_attr));
        mode_of_covered = fs_type == "tmpfs"
            && !options
                .iter()
                .any(|option| matches!(option, FsOption::Value(key, _) if key == "mode"));
    }
    let tmpfs = matches!(&source, Source::New { fs_type, .. } if fs_type == "tmpfs");
    if options.copy_up && !tmpfs {
        return Err(invalid("tmpcopyup is for tmpfs".into()));
    }
    let read_only_later = tmpfs && attr.set & ATTR_RDONLY != 0;
    if read_only_later {
        attr.set &= !ATTR_RDONLY;
    }
    Ok(MountPlan {
        destination,
        source,
        attr,
        recursive_attr,
        propagation: options.propagation,
        copy_up: options.copy_up,
        mode_of_covered,
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

/// Where a container's kernel state is.
const PROC: &str = "/proc";

/// Whether something may be mounted at `path` of a container, which is free of
/// links. Over the root it would not be seen, and below /proc it could fool
/// security checks.
///
/// # Errors
/// Why not.
pub fn check_place(path: &Path) -> std::result::Result<(), String> {
    if path == Path::new("/") {
        return Err("the root directory cannot be mounted over".into());
    }
    let below = path.starts_with(PROC) && path != Path::new(PROC);
    let allowed = || PROC_ALLOWED.iter().any(|known| path == Path::new(known));
    if below && !allowed() {
        return Err("only some files of /proc can be mounted over".into());
    }
    Ok(())
}

/// Whether this can be a proc file system; of a bind mount only its source
/// can tell.
fn may_be_proc(source: &Source) -> bool {
    match source {
        Source::Bind { .. } => true,
        Source::New { fs_type, .. } => fs_type == "proc",
    }
}

#[derive(Default)]
struct Options {
    bind: bool,
    bind_recursive: bool,
    copy_up: bool,
    attr: MountAttr,
    recursive_attr: MountAttr,
    propagation: Vec<(u64, bool)>,
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
            self.propagation.push(propagation);
            return Ok(());
        }
        match option {
            "bind" => self.bind = true,
            "rbind" => self.bind_recursive = true,
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => return Err(ID_MAPPED.into()),
            "remount" => return Err("remount is not supported".into()),
            // What the kernel does by default, or not at all any more.
            "" | "defaults" | "async" | "nomand" | "mand" | "loud" | "silent" | "iversion"
            | "noiversion" | "nolazytime" | "acl" | "noacl" => {}
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
        // The kernel's default is relatime, also where it is asked for by
        // taking another away; its value is 0 within the mask.
        "relatime" | "norelatime" | "atime" | "nostrictatime" => (ATTR_RELATIME, true),
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

/// Adds changes that come later, and win.
fn merge(attr: &mut MountAttr, later: MountAttr) {
    attr.set = attr.set & !later.clear | later.set;
    attr.clear = attr.clear & !later.set | later.clear;
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

    use bulkhead_agent_protocol::MOUNT_OPTIONS;

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
        assert_eq!(plan.propagation, [(libc::MS_PRIVATE, true)]);
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
    fn every_option_that_runc_knows() {
        let mut all = Options::default();
        // Id-mapped mounts are the host's part.
        for option in MOUNT_OPTIONS.iter().filter(|name| !name.ends_with("idmap")) {
            all.take(option).unwrap();
        }
        assert!(all.bind && all.bind_recursive && all.copy_up);
        // These three belong to the superblock.
        let flags = ["dirsync", "lazytime", "sync"].map(|name| FsOption::Flag(name.into()));
        assert_eq!(all.data, flags);
        assert_eq!(all.propagation.len(), 8);
        let everything = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NODIRATIME;
        let wanted = [
            everything | ATTR_NOSYMFOLLOW | ATTR_ATIME_MASK,
            everything | ATTR_NOSYMFOLLOW | ATTR_ATIME_MASK,
        ];
        let touched = [all.attr, all.recursive_attr].map(|attr| attr.set | attr.clear);
        assert_eq!(touched, wanted);
    }

    #[test]
    fn a_new_file_system_has_nothing_below_it() {
        let plan = plan(&mount(
            "tmpfs",
            "/x",
            &["noexec", "rro", "rexec", "rnoatime"],
        ))
        .unwrap();
        assert_eq!(plan.recursive_attr, MountAttr::default());
        assert_eq!(plan.attr.set, ATTR_NOATIME);
        assert!(plan.read_only_later && plan.mode_of_covered);
    }

    #[test]
    fn propagation_types_add_up() {
        let plan = plan(&mount("bind", "/x", &["rbind", "rslave", "shared"])).unwrap();
        assert_eq!(
            plan.propagation,
            [(libc::MS_SLAVE, true), (libc::MS_SHARED, false)]
        );
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
            mount("tmpfs", "/proc", &[]),
            mount("tmpfs", "/proc/acpi", &[]),
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
