// SPDX-License-Identifier: Apache-2.0
//! Messages of the client: any bytes, with a few descriptors.
#![no_main]

use std::{fs::File, os::fd::OwnedFd};

use bulkhead_vmm::config::{snapshot_files, Devices, Resources, RestoreResources};
use bulkhead_vmm_api::{Call, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(request) = serde_json::from_slice::<Request>(data) else {
        return;
    };
    let fds: Vec<OwnedFd> = ["/dev/null", "/"]
        .into_iter()
        .map(|path| File::open(path).expect(path).into())
        .collect();
    match request.call {
        Call::Configure(config) => drop(Resources::new(*config, fds)),
        Call::Restore(config) => drop(RestoreResources::new(*config, fds)),
        Call::Snapshot(files) => drop(snapshot_files(&files, fds)),
        Call::Plug(config) => drop(Devices::plugged(*config, fds)),
        _ => {}
    }
});
