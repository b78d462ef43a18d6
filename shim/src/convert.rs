// SPDX-License-Identifier: Apache-2.0
//! The runtime's types as containerd's.

use std::time::SystemTime;

use bulkhead_runtime::sandbox::{RootfsMount, Status};
use bulkhead_shim_protocol::{task, types::Mount};
use protobuf::{well_known_types::timestamp::Timestamp, MessageField};

/// A time; the epoch for one before it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos() as i32, // below 10^9
        ..Default::default()
    }
}

/// A time that may not have come.
pub fn maybe_timestamp(time: Option<SystemTime>) -> MessageField<Timestamp> {
    MessageField::from_option(time.map(timestamp))
}

/// A task's status.
pub fn status(status: Status) -> task::Status {
    match status {
        Status::Created => task::Status::CREATED,
        Status::Running => task::Status::RUNNING,
        Status::Stopped => task::Status::STOPPED,
        Status::Paused => task::Status::PAUSED,
        Status::Pausing => task::Status::PAUSING,
    }
}

/// A mount of a root file system, from containerd.
pub fn rootfs_mount(mount: Mount) -> RootfsMount {
    RootfsMount {
        fs_type: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// A mount of a root file system, for containerd.
pub fn mount(mount: RootfsMount) -> Mount {
    Mount {
        type_: mount.fs_type,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times() {
        let time = SystemTime::UNIX_EPOCH + Duration::new(5, 7);
        assert_eq!((timestamp(time).seconds, timestamp(time).nanos), (5, 7));
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(timestamp(before), Timestamp::default());
        assert!(maybe_timestamp(None).is_none());
    }

    #[test]
    fn mounts_come_back_as_they_went() {
        let there = RootfsMount {
            fs_type: "overlay".into(),
            source: "overlay".into(),
            target: "t".into(),
            options: vec!["lowerdir=/a".into()],
        };
        assert_eq!(rootfs_mount(mount(there.clone())), there);
    }
}
