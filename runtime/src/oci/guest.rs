// SPDX-License-Identifier: Apache-2.0
//! A container's specification as the guest gets it: paths of the guest
//! instead of the host's, and nothing that only makes sense on the host.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::{oci, SHARED_MOUNT};
use oci_spec::runtime::{Linux, Mount, Spec};

use super::{
    devices::{may_use_all, HostDevices},
    hooks, idmap, name, namespaces, process, resources, seccomp, SpecError,
};
use crate::resource::idmap::Mapped;

/// File systems that the guest makes itself.
const GUEST_FILE_SYSTEMS: [&str; 9] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs", "none",
];

/// Where a pod's shared memory is in the guest; all containers of a pod that
/// share it mount this.
pub const GUEST_SHM: &str = "/dev/shm";

/// Sysctls of an IPC or UTS namespace.
const NAMESPACED_SYSCTLS: [&str; 5] = [
    "kernel.msg",
    "kernel.sem",
    "kernel.shm",
    "fs.mqueue.",
    "kernel.domainname",
];

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It stands for the pod: its IPC and UTS namespaces are the guest's own,
    /// for the others to share.
    Sandbox,
    /// One of the pod's, or alone.
    Container,
}

/// A file or directory of the host that a container mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Path on the host.
    pub source: PathBuf,
    /// Name below the container's directory of volumes.
    pub name: String,
    /// With what is mounted below it.
    pub recursive: bool,
    /// The guest may not write to it.
    pub read_only: bool,
    /// What the host mounts below it later is the guest's to see and to write.
    pub follows: bool,
    /// Whose the files are to the container, where that is not who they are
    /// the host's.
    pub mapped: Option<Mapped>,
}

/// A container for the agent, and what the host has to prepare for it.
#[derive(Debug)]
pub struct Prepared {
    /// The specification in the guest's terms.
    pub spec: oci::Spec,
    /// What is to be mounted below `<shared>/<id>/mounts`.
    pub volumes: Vec<Volume>,
    /// Sysctls that are the pod's, of a container that stands for it.
    pub pod_sysctls: HashMap<String, String>,
}

/// The role that the annotations tell (containerd's CRI plugin, CRI-O).
pub fn role(spec: &Spec) -> Role {
    let annotation = |key: &str| {
        let annotations = spec.annotations().as_ref();
        annotations.and_then(|map| map.get(key)).map(String::as_str)
    };
    let kinds = [
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri-o.ContainerType",
    ];
    if kinds.iter().any(|key| annotation(key) == Some("sandbox")) {
        Role::Sandbox
    } else {
        Role::Container
    }
}

/// The pod that a container joins.
#[derive(Debug, Clone, Copy)]
pub struct Pod<'a> {
    /// What stands for all of its processes on the host.
    pub pid: u32,
    /// The container that stands for it; none does with the sandbox API.
    pub sandbox: Option<&'a str>,
}

/// The host's directory that a mount has for the pod's shared memory.
pub fn shared_memory(mount: &Mount) -> Option<&Path> {
    let source = mount.source().as_deref()?;
    let bind = |name: &str| ["bind", "rbind"].contains(&name);
    let options = mount.options().iter().flatten();
    let bound = mount.typ().as_deref().is_some_and(bind) || options.map(String::as_str).any(bind);
    let there = mount.destination() == Path::new(GUEST_SHM);
    (bound && there && source.ends_with("shm")).then_some(source)
}

/// Translates the container `id`. `pod`: what there is already for it to join.
///
/// # Errors
/// What cannot be had in a virtual machine, naming the field.
pub fn container(spec: &Spec, id: &str, pod: Option<Pod<'_>>) -> Result<Prepared, SpecError> {
    let role = role(spec);
    let directory = format!("{SHARED_MOUNT}/{id}");
    let mut volumes = Vec::new();
    let mut mounts = Vec::new();
    for (number, mount) in spec.mounts().iter().flatten().enumerate() {
        let linux = spec.linux().as_ref();
        mounts.push(translate_mount(
            mount,
            linux,
            number,
            &directory,
            &mut volumes,
        )?);
    }
    let process_spec = spec
        .process()
        .as_ref()
        .ok_or_else(|| SpecError::field("process", "is missing"))?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| SpecError::field("root", "is missing"))?;
    let mut pod_sysctls = HashMap::new();
    let mut out = oci::Spec {
        version: spec.version().clone(),
        process: Some(process(process_spec)?).into(),
        root: Some(oci::Root {
            path: format!("{directory}/rootfs"),
            readonly: root.readonly().unwrap_or(false),
            ..Default::default()
        })
        .into(),
        hostname: spec.hostname().clone().unwrap_or_default(),
        domainname: spec.domainname().clone().unwrap_or_default(),
        mounts,
        ..Default::default()
    };
    if let Some(hooks) = spec.hooks() {
        if let Some(hooks) = hooks::in_guest(hooks, &directory, &mut volumes)? {
            // Hooks and listeners are told them.
            out.annotations = spec.annotations().clone().unwrap_or_default();
            out.hooks = Some(hooks).into();
        }
    }
    let mut linux = translate_linux(spec.linux().as_ref(), role, pod)?;
    if let Some(profile) = linux.seccomp.as_mut() {
        seccomp::place_listener(profile, &directory, &volumes)?;
        if !profile.listener_path.is_empty() {
            // Hooks and listeners are told them.
            out.annotations = spec.annotations().clone().unwrap_or_default();
        }
    }
    if role == Role::Sandbox {
        linux.sysctl.retain(|key, value| {
            let dotted = key.replace('/', ".");
            let pods = NAMESPACED_SYSCTLS
                .iter()
                .any(|prefix| dotted.starts_with(prefix));
            if pods {
                pod_sysctls.insert(key.clone(), std::mem::take(value));
            }
            !pods
        });
    }
    out.linux = Some(linux).into();
    Ok(Prepared {
        spec: out,
        volumes,
        pod_sysctls,
    })
}

fn translate_mount(
    mount: &Mount,
    linux: Option<&Linux>,
    number: usize,
    directory: &str,
    volumes: &mut Vec<Volume>,
) -> Result<oci::Mount, SpecError> {
    let destination = mount.destination().to_string_lossy().into_owned();
    let options = mount.options().clone().unwrap_or_default();
    let kind = mount.typ().clone().unwrap_or_default();
    let field = |problem: String| SpecError::field(format!("mounts: {destination}"), problem);
    let has = |name: &str| options.iter().any(|option| option == name);
    let source = mount.source().clone().unwrap_or_default();
    let mut out = oci::Mount {
        destination: destination.clone(),
        type_: kind.clone(),
        source: source.to_string_lossy().into_owned(),
        options: options.clone(),
        ..Default::default()
    };
    out.options.retain(|option| !idmap::is_option(option));
    let mapped = idmap::mapped(mount, linux).map_err(field)?;
    if kind == "bind" || has("bind") || has("rbind") {
        if !source.is_absolute() {
            return Err(field(format!(
                "source {:?} is not an absolute path",
                out.source
            )));
        }
        // Shared memory is memory of the guest, and all that is in it is from
        // containers, which have their ids already.
        if shared_memory(mount).is_some() {
            out.source = GUEST_SHM.into();
            return Ok(out);
        }
        let volume = Volume {
            source,
            name: number.to_string(),
            recursive: has("rbind"),
            read_only: has("ro") || has("rro"),
            follows: false,
            mapped,
        };
        out.source = format!("{directory}/mounts/{}", volume.name);
        // The last word counts, as with mount(8).
        let read_write = options.iter().rposition(|option| option == "rw");
        let read_only = options.iter().rposition(|option| option == "ro");
        let read_only = volume.read_only && (has("rro") || read_only > read_write);
        // Later mounts would come without the protection of these.
        let follows = has("rbind") && !read_only && (has("rslave") || has("rshared"));
        volumes.push(Volume {
            read_only,
            follows,
            ..volume
        });
        return Ok(out);
    }
    if mapped.is_some() {
        return Err(field(
            "only bind mounts can be id-mapped: a file system of its own has the container's ids \
             already, leave the mapping out"
                .into(),
        ));
    }
    if !GUEST_FILE_SYSTEMS.contains(&kind.as_str()) {
        return Err(field(format!(
            "file systems of type {kind:?} cannot be mounted in the guest"
        )));
    }
    Ok(out)
}

fn translate_linux(
    linux: Option<&Linux>,
    role: Role,
    pod: Option<Pod<'_>>,
) -> Result<oci::Linux, SpecError> {
    let mut out = oci::Linux::new();
    let Some(linux) = linux else {
        return Ok(out);
    };
    if let Some(device) = linux.net_devices().iter().flat_map(|all| all.keys()).min() {
        return Err(SpecError::field(
            format!("linux.netDevices: {device}"),
            "the host's network devices are not in the guest: give it to the pod's network \
             namespace, whose interfaces the guest has",
        ));
    }
    for namespace in linux.namespaces().iter().flatten() {
        out.namespaces
            .extend(namespaces::translate(namespace, linux, role, pod)?);
    }
    out.uid_mappings = namespaces::mappings(linux.uid_mappings());
    out.gid_mappings = namespaces::mappings(linux.gid_mappings());
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let offset = oci::TimeOffset {
            secs: offset.secs().unwrap_or(0),
            nanosecs: offset.nanosecs().unwrap_or(0),
            ..Default::default()
        };
        out.time_offsets.insert(clock.clone(), offset);
    }
    out.sysctl = linux.sysctl().clone().unwrap_or_default();
    if let Some(limits) = linux.resources() {
        out.resources = Some(resources(limits)?).into();
    }
    if let Some(path) = linux.cgroups_path() {
        out.cgroups_path = path.to_string_lossy().into_owned();
    }
    let host = HostDevices::default();
    let all = may_use_all(&out.resources.devices);
    for device in linux.devices().iter().flatten() {
        let device = oci::Device {
            path: device.path().to_string_lossy().into_owned(),
            type_: device.typ().as_str().into(),
            major: device.major(),
            minor: device.minor(),
            file_mode: device.file_mode(),
            uid: device.uid().unwrap_or(0),
            gid: device.gid().unwrap_or(0),
            ..Default::default()
        };
        out.devices.extend(host.device(device, all)?);
    }
    if let Some(profile) = linux.seccomp() {
        out.seccomp = Some(seccomp::seccomp(profile)?).into();
    }
    out.rootfs_propagation = linux.rootfs_propagation().clone().unwrap_or_default();
    out.masked_paths = linux.masked_paths().clone().unwrap_or_default();
    out.readonly_paths = linux.readonly_paths().clone().unwrap_or_default();
    if let Some(personality) = linux.personality() {
        out.personality = Some(oci::Personality {
            domain: name(&personality.domain()),
            flags: personality.flags().clone().unwrap_or_default(),
            ..Default::default()
        })
        .into();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str, mounts: &str, annotations: &str) -> Spec {
        serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.0.2","process":{{"cwd":"/","args":["true"],"user":{{"uid":0,"gid":0}}}},
                "root":{{"path":"rootfs"}},"linux":{linux},"mounts":{mounts},"annotations":{annotations}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn paths_become_the_guests() {
        let spec = spec(
            "{}",
            r#"[{"destination":"/proc","type":"proc","source":"proc"},
                {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","ro"]},
                {"destination":"/both","type":"bind","source":"/srv/b","options":["ro","rw"]},
                {"destination":"/dev/shm","type":"bind","source":"/run/x/shm","options":["rbind"]}]"#,
            "{}",
        );
        let prepared = container(&spec, "c1", None).unwrap();
        let mounts = &prepared.spec.mounts;
        assert_eq!(prepared.spec.root.path, "/run/bulkhead/shared/c1/rootfs");
        assert_eq!(mounts[1].source, "/run/bulkhead/shared/c1/mounts/1");
        assert_eq!(mounts[3].source, "/dev/shm");
        assert_eq!(
            prepared.volumes,
            [
                Volume {
                    source: "/srv/data".into(),
                    name: "1".into(),
                    recursive: true,
                    read_only: true,
                    follows: false,
                    mapped: None,
                },
                Volume {
                    source: "/srv/b".into(),
                    name: "2".into(),
                    recursive: false,
                    read_only: false,
                    follows: false,
                    mapped: None,
                },
            ]
        );
    }

    #[test]
    fn a_pods_own_container_leaves_its_namespaces_to_the_pod() {
        let namespaces = r#"{"namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},
            {"type":"mount"},{"type":"network","path":"/run/netns/x"}],
            "sysctl":{"kernel.shmmax":"1","kernel/msgmax":"2","net.core.somaxconn":"3"}}"#;
        let kinds = |annotations: &str| {
            let prepared = container(&spec(namespaces, "[]", annotations), "c", None).unwrap();
            let kinds: Vec<String> = prepared
                .spec
                .linux
                .namespaces
                .iter()
                .map(|namespace| namespace.type_.clone())
                .collect();
            (kinds, prepared.pod_sysctls.len())
        };
        assert_eq!(
            kinds("{}"),
            (["pid", "ipc", "uts", "mount"].map(String::from).to_vec(), 0)
        );
        assert_eq!(
            kinds(r#"{"io.kubernetes.cri.container-type":"sandbox"}"#),
            (["pid", "mount"].map(String::from).to_vec(), 2)
        );
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        for (linux, mounts, field) in [
            (
                r#"{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#,
                "[]",
                "linux.namespaces: pid",
            ),
            (
                r#"{"namespaces":[{"type":"user","path":"/proc/1/ns/user"}]}"#,
                "[]",
                "linux.namespaces: user",
            ),
            (
                r#"{"namespaces":[{"type":"time","path":"/proc/1/ns/time"}]}"#,
                "[]",
                "linux.namespaces: time",
            ),
            (
                "{}",
                r#"[{"destination":"/x","type":"ext4","source":"/dev/sda"}]"#,
                "mounts: /x",
            ),
            (
                "{}",
                r#"[{"destination":"/x","type":"bind","source":"data"}]"#,
                "mounts: /x",
            ),
            (
                "{}",
                r#"[{"destination":"/x","type":"bind","source":"/x","options":["idmap"]}]"#,
                "mounts: /x: idmap",
            ),
            (
                r#"{"uidMappings":[{"containerID":0,"hostID":1,"size":1}],
                    "gidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
                r#"[{"destination":"/x","type":"tmpfs","options":["idmap"]}]"#,
                "mounts: /x: only bind",
            ),
        ] {
            let text = container(&spec(linux, mounts, "{}"), "c", None)
                .unwrap_err()
                .to_string();
            assert!(text.contains(field), "{text}");
        }
    }
}
