// SPDX-License-Identifier: Apache-2.0
//! A pod as the CRI describes it (`runtime.v1.PodSandboxConfig`), in the terms
//! of a runtime.

use std::{collections::HashMap, fs, path::PathBuf};

use bulkhead_runtime::sandbox::PodSpec;
use bulkhead_shim_protocol::{
    cri::{DNSConfig, LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig},
    sandbox::CreateSandboxRequest,
    Named,
};
use oci_spec::runtime::{Spec, SpecBuilder};
use protobuf::Message;
use serde_json::json;

use crate::error::CallError;

/// The pod's sums, in the annotations by which containerd's CRI plugin tells
/// them for a container that stands for a pod.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What containerd names the pods' scopes of systemd's with.
const SCOPE: &str = "cri-containerd";

/// The host's, which a pod begins with where it says nothing else.
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTNAME: &str = "/etc/hostname";

/// The pod that is asked for.
///
/// # Errors
/// It cannot be had in a virtual machine, or is not understood.
pub fn pod_spec(request: &CreateSandboxRequest) -> Result<PodSpec, CallError> {
    let config = match request.options.as_ref() {
        Some(any) if any.type_url.ends_with(PodSandboxConfig::TYPE_URL) => {
            PodSandboxConfig::parse_from_bytes(&any.value)
                .map_err(|error| CallError::Invalid(format!("options: {error}")))?
        }
        Some(any) if !any.type_url.is_empty() => {
            return Err(CallError::Invalid(format!(
                "options: {} is not {}",
                any.type_url,
                PodSandboxConfig::TYPE_URL
            )))
        }
        _ => PodSandboxConfig::new(),
    };
    let linux = config.linux.clone().unwrap_or_default();
    Ok(PodSpec {
        spec: spec(request, &config, &linux)?,
        files: files(&config),
    })
}

fn spec(
    request: &CreateSandboxRequest,
    config: &PodSandboxConfig,
    linux: &LinuxPodSandboxConfig,
) -> Result<Spec, CallError> {
    let mut annotations: HashMap<String, String> = request.annotations.clone();
    annotations.extend(config.annotations.clone());
    let resources = linux.resources.clone().unwrap_or_default();
    for (key, value) in [
        (MEMORY, resources.memory_limit_in_bytes),
        (QUOTA, resources.cpu_quota),
        (PERIOD, resources.cpu_period),
    ] {
        if value > 0 {
            annotations.insert(key.into(), value.to_string());
        }
    }
    let options = linux.security_context.namespace_options.clone();
    // The host's processes and IPC objects are the guest's in a virtual
    // machine; its network is refused, as that of any pod without its own.
    let of_host = options.network.enum_value() == Ok(NamespaceMode::NODE);
    let users = options.userns_options.as_ref().map(|users| users.mode);
    let own_users = users.is_some_and(|mode| mode.enum_value() == Ok(NamespaceMode::POD));
    let network = match request.netns_path.as_str() {
        _ if of_host => json!([]),
        // That of a pod with a user namespace is the runtime's to make, and set
        // up once the pod runs.
        "" if own_users => json!([{"type": "network"}]),
        "" => json!([]),
        path => json!([{"type": "network", "path": path}]),
    };
    let mut described = json!({"namespaces": network, "sysctl": linux.sysctls});
    if let Some(path) = cgroups_path(&linux.cgroup_parent, &request.sandbox_id) {
        described["cgroupsPath"] = path.into();
    }
    let described =
        serde_json::from_value(described).map_err(|source| CallError::Json("linux", source))?;
    SpecBuilder::default()
        .hostname(config.hostname.clone())
        .annotations(annotations)
        .linux::<oci_spec::runtime::Linux>(described)
        .build()
        .map_err(|error| CallError::Invalid(format!("options: {error}")))
}

/// As containerd makes it for a container that stands for a pod; `None`: the
/// pod has no cgroup of its own.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let slice = parent.rsplit('/').next().unwrap_or_default();
    match parent {
        "" => None,
        _ if slice.ends_with(".slice") => Some(format!("{slice}:{SCOPE}:{id}")),
        _ => Some(format!("{}/{id}", parent.trim_end_matches('/'))),
    }
}

/// What a container finds in /etc of the pod's network.
fn files(config: &PodSandboxConfig) -> Vec<(PathBuf, String)> {
    // A host without one has nothing to say.
    let of_host = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let hostname = match config.hostname.as_str() {
        "" => of_host(HOSTNAME),
        name => format!("{name}\n"),
    };
    let resolver = match config.dns_config.as_ref() {
        Some(dns) => resolv_conf(dns).unwrap_or_else(|| of_host(RESOLV_CONF)),
        None => of_host(RESOLV_CONF),
    };
    vec![
        (HOSTNAME.into(), hostname),
        (HOSTS.into(), of_host(HOSTS)),
        (RESOLV_CONF.into(), resolver),
    ]
}

/// resolv.conf(5); `None` where nothing is said.
fn resolv_conf(dns: &DNSConfig) -> Option<String> {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use bulkhead_shim_protocol::cri::{
        LinuxContainerResources, LinuxSandboxSecurityContext, NamespaceOption,
    };
    use protobuf::MessageField;

    use super::*;

    fn request(config: &PodSandboxConfig) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "p".into(),
            bundle_path: "/b".into(),
            options: MessageField::some(config.to_any().unwrap()),
            netns_path: "/run/netns/x".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_of_the_cri_is_understood() {
        let config = PodSandboxConfig {
            hostname: "web".into(),
            dns_config: MessageField::some(DNSConfig {
                servers: vec!["10.0.0.10".into()],
                searches: vec!["a.local".into(), "local".into()],
                options: vec!["ndots:5".into()],
                ..Default::default()
            }),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                sysctls: [("net.core.somaxconn".to_owned(), "512".to_owned())].into(),
                resources: MessageField::some(LinuxContainerResources {
                    memory_limit_in_bytes: 1 << 30,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let pod = pod_spec(&request(&config)).unwrap();
        assert_eq!(pod.spec.hostname().as_deref(), Some("web"));
        let annotations = pod.spec.annotations().clone().unwrap();
        assert_eq!(annotations[MEMORY], "1073741824");
        assert!(!annotations.contains_key(QUOTA));
        let linux = pod.spec.linux().clone().unwrap();
        assert_eq!(linux.sysctl().clone().unwrap()["net.core.somaxconn"], "512");
        let path = linux.cgroups_path().clone().unwrap();
        assert_eq!(path, PathBuf::from("/kubepods/pod1/p"));
        let namespaces = linux.namespaces().clone().unwrap();
        assert_eq!(
            namespaces[0].path().clone(),
            Some(PathBuf::from("/run/netns/x"))
        );
        assert_eq!(pod.files[0], (HOSTNAME.into(), "web\n".into()));
        assert_eq!(
            pod.files[2].1,
            "search a.local local\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
    }

    #[test]
    fn cgroups_are_where_containerd_has_them() {
        let path = |parent| cgroups_path(parent, "p");
        assert_eq!(path(""), None);
        assert_eq!(path("/k8s.io/"), Some("/k8s.io/p".into()));
        assert_eq!(
            path("/kubepods.slice/kubepods-pod1.slice"),
            Some("kubepods-pod1.slice:cri-containerd:p".into())
        );
    }

    #[test]
    fn a_pod_on_the_host_s_network_has_none_of_its_own() {
        let options = NamespaceOption {
            network: NamespaceMode::NODE.into(),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            linux: MessageField::some(LinuxPodSandboxConfig {
                security_context: MessageField::some(LinuxSandboxSecurityContext {
                    namespace_options: MessageField::some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let pod = pod_spec(&request(&config)).unwrap();
        let linux = pod.spec.linux().clone().unwrap();
        assert_eq!(linux.namespaces().clone().unwrap_or_default(), []);
    }

    #[test]
    fn the_network_of_a_pod_with_a_user_namespace_is_made_for_it() {
        let users = |mode: NamespaceMode| {
            let mut config = PodSandboxConfig::new();
            let linux = config.linux.mut_or_insert_default();
            let security = linux.security_context.mut_or_insert_default();
            let options = security.namespace_options.mut_or_insert_default();
            options.userns_options.mut_or_insert_default().mode = mode.into();
            let mut request = request(&config);
            request.netns_path.clear();
            let linux = pod_spec(&request).unwrap().spec.linux().clone().unwrap();
            linux.namespaces().clone().unwrap_or_default()
        };
        let made = users(NamespaceMode::POD);
        assert_eq!((made.len(), made[0].path()), (1, &None));
        assert_eq!(users(NamespaceMode::NODE), []);
    }

    #[test]
    fn other_options_are_refused_by_name() {
        let mut other = request(&PodSandboxConfig::new());
        other.options.mut_or_insert_default().type_url = "x.Y".into();
        let error = pod_spec(&other).unwrap_err().to_string();
        assert!(error.contains("x.Y is not runtime.v1"), "{error}");
    }
}
