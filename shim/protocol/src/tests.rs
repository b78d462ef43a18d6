// SPDX-License-Identifier: Apache-2.0

use protobuf::{EnumOrUnknown, Message, MessageField};

use super::*;

/// Field numbers and wire types, byte by byte, as containerd's own encoder
/// writes them.
#[test]
fn messages_have_the_wire_form_that_containerd_writes() {
    let state = shim::StateResponse {
        id: "a".into(),
        bundle: "b".into(),
        pid: 7,
        status: EnumOrUnknown::new(task::Status::STOPPED),
        exit_status: 137,
        exec_id: "e".into(),
        ..Default::default()
    };
    assert_eq!(
        state.write_to_bytes().unwrap(),
        b"\x0a\x01a\x12\x01b\x18\x07\x20\x03\x48\x89\x01\x5a\x01e"
    );
    let exit = events::TaskExit {
        container_id: "c".into(),
        id: "e".into(),
        pid: 1,
        exit_status: 2,
        ..Default::default()
    };
    assert_eq!(
        exit.write_to_bytes().unwrap(),
        b"\x0a\x01c\x12\x01e\x18\x01\x20\x02"
    );
    let metrics = metrics::Metrics {
        memory: MessageField::some(metrics::MemoryStat {
            usage: 1,
            ..Default::default()
        }),
        memory_events: MessageField::some(metrics::MemoryEvents {
            oom_kill: 1,
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        metrics.write_to_bytes().unwrap(),
        b"\x22\x03\x80\x02\x01\x42\x02\x28\x01"
    );
}

#[test]
fn both_versions_of_the_service_have_all_methods() {
    struct Nothing;
    impl shim_ttrpc::Task for Nothing {}
    impl shim_v3_ttrpc::Task for Nothing {}
    let service = std::sync::Arc::new(Nothing);
    let v2 = shim_ttrpc::create_task(service.clone());
    let v3 = shim_v3_ttrpc::create_task(service);
    assert_eq!(v2["containerd.task.v2.Task"].methods.len(), 17);
    assert_eq!(v3["containerd.task.v3.Task"].methods.len(), 17);
}

#[test]
fn an_any_has_the_bare_name() {
    let any = events::TaskOOM {
        container_id: "c".into(),
        ..Default::default()
    }
    .to_any()
    .unwrap();
    assert_eq!(any.type_url, "containerd.events.TaskOOM");
    assert_eq!(any.value, b"\x0a\x01c");
}
