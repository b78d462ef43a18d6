// SPDX-License-Identifier: Apache-2.0
//! The agent's protocol: one ttrpc service over vsock, with the OCI runtime
//! specification's types as protobuf so that no JSON is parsed in the guest.
//!
//! The agent dials the host's [`AGENT_PORT`] when it is ready and then serves
//! ttrpc on that connection; the host is the client.

#![forbid(unsafe_code)]

/// vsock port of the host that the agent dials when it is ready. The
/// connection then carries ttrpc with the agent as the server.
pub const AGENT_PORT: u32 = 1024;

/// vsock port of the host that the agent dials once per stdio stream. Each
/// connection starts with the stream's id, a little-endian `u64`.
pub const STREAM_PORT: u32 = 1025;

/// vsock context id of the host (virtio 1.2 §5.10.4).
pub const HOST_CID: u32 = 2;

/// virtio-fs tag of the directory that the runtime shares with the guest.
pub const SHARED_TAG: &str = "shared";

/// Where the agent mounts [`SHARED_TAG`].
pub const SHARED_MOUNT: &str = "/run/bulkhead/shared";

/// The time of modification, seconds and nanoseconds since the epoch, that
/// [`agent::AnnounceRequest`] gives to a file: the VMM's file server leaves a
/// file as it is that gets it (`bulkhead_vmm::virtio::fs`).
pub const ANNOUNCED: (i64, i64) = (13_569_465_600, 141_592_653);

/// Names of capabilities, without `CAP_`, in the order of their numbers (capabilities(7)).
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Mount options that are understood (OCI runtime-spec, config.md, "Mounts");
/// any other is the file system's own.
pub const MOUNT_OPTIONS: [&str; 63] = [
    "acl",
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noacl",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

/// Where the guest's copies of small directories of the host are, one directory
/// for each container.
pub const MIRRORS: &str = "/run/bulkhead/mirrors";

/// OCI runtime-spec types (generated from `proto/oci.proto`).
#[allow(clippy::all, dead_code, missing_docs, unused, nonstandard_style)]
#[rustfmt::skip]
pub mod oci {
    include!(concat!(env!("OUT_DIR"), "/oci.rs"));
}

/// Request and reply messages (generated from `proto/agent.proto`).
#[allow(clippy::all, dead_code, missing_docs, unused, nonstandard_style)]
#[rustfmt::skip]
pub mod agent {
    use super::oci;
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The service and its client (generated from `proto/agent.proto`).
#[allow(clippy::all, dead_code, missing_docs, unused, nonstandard_style)]
#[rustfmt::skip]
pub mod agent_ttrpc {
    use super::agent;
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
