// SPDX-License-Identifier: Apache-2.0

use bulkhead_vmm_api::KernelConfig;

use super::*;

fn config() -> VmConfig {
    VmConfig {
        vcpus: 1,
        memory_mib: 128,
        pages: Pages::Small,
        merge_group: None,
        kernel: KernelConfig {
            image: 0,
            cmdline: String::new(),
            initrd: None,
        },
        serial: None,
        devices: DeviceConfigs {
            rng: false,
            ..DeviceConfigs::default()
        },
    }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = config();
    change(&mut config);
    Resources::new(config, vec![null()])
        .unwrap_err()
        .to_string()
}

#[test]
fn errors_name_the_field() {
    assert!(Resources::new(config(), vec![null()]).is_ok());
    assert!(refused(|c| c.vcpus = 0).starts_with("vcpus:"));
    assert!(refused(|c| c.memory_mib = 1).starts_with("memory_mib:"));
    assert!(refused(|c| c.kernel.image = 7).contains("descriptor 7 of 1"));
    assert!(refused(|c| c.kernel.initrd = Some(0)).contains("used twice"));
    assert!(refused(|c| c.merge_group = Some(1)).starts_with("merge_group: descriptor 1"));
    for (change, field) in [
        ((|c| c.memory_mib = 129) as fn(&mut VmConfig), "memory_mib:"),
        (|c| c.merge_group = Some(0), "merge_group: memory in"),
        (
            |c| c.devices.balloon = Some(BalloonConfig::default()),
            "balloon.free_page_reporting:",
        ),
    ] {
        let text = refused(|c| {
            c.pages = Pages::Huge;
            change(c);
        });
        assert!(text.starts_with(field), "{text}");
    }
    assert!(refused(|c| c.kernel.cmdline = "a\nb".into()).starts_with("kernel.cmdline:"));
    assert!(refused(|c| c.kernel.cmdline = "a".repeat(2048)).starts_with("kernel.cmdline:"));
    for max_mib in [0, 100, 1 << 21] {
        let text = refused(|c| c.devices.mem = Some(MemConfig { max_mib }));
        assert!(text.starts_with("mem.max_mib:"), "{text}");
    }
    for (console, input, log, field) in [
        (Some(1), false, None, "console.console:"),
        (None, true, None, "console.input:"),
        (None, false, Some(1), "console.log:"),
    ] {
        let console = ConsoleConfig {
            console,
            input,
            log,
        };
        let text = refused(|c| c.devices.console = Some(console));
        assert!(text.starts_with(field), "{text}");
    }
    assert!(refused(|c| {
        c.devices.vsock = Some(VsockConfig {
            cid: 2,
            listener: None,
            uds_path: "/x".into(),
            ready_port: None,
        });
    })
    .starts_with("vsock.cid:"));
}
