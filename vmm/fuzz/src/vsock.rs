// SPDX-License-Identifier: Apache-2.0
//! A guest's packets: any descriptors, rings and headers, with somebody on the
//! host who takes connections, and ends them.
#![no_main]

mod guest;

use std::{
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use bulkhead_vmm::virtio::vsock::Vsock;
use bulkhead_vmm_api::VsockConfig;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

/// The directory of the sockets, and who listens at port 1.
fn host() -> &'static (PathBuf, UnixListener) {
    static HOST: OnceLock<(PathBuf, UnixListener)> = OnceLock::new();
    HOST.get_or_init(|| {
        let directory = TempDir::new().expect("a directory");
        let path = directory.as_path().join("v");
        let listener = UnixListener::bind(directory.as_path().join("v_1")).expect("a socket");
        listener.set_nonblocking(true).expect("a flag");
        // Stays as long as the process.
        std::mem::forget(directory);
        (path, listener)
    })
}

fuzz_target!(|data: &[u8]| {
    let (path, listener) = host();
    let config = VsockConfig {
        cid: 3,
        listener: None,
        uds_path: path.to_string_lossy().into_owned(),
        ready_port: Some(1),
    };
    let mut device = Vsock::new(&config, None, Arc::new(|_| ())).expect("a device");
    guest::drive(&mut device, data);
    while listener.accept().is_ok() {}
});
