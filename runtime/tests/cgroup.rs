// SPDX-License-Identifier: Apache-2.0
//! A real cgroup, in a program of its own: this process is moved into it, so
//! whatever another test started meanwhile would be killed with it.

use std::{io, path::Path};

use bulkhead_runtime::resource::{cgroup::SandboxCgroup, journal::Journal};

fn processes(path: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(path.join("cgroup.procs")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn a_cgroup_is_made_used_and_removed_with_its_processes() {
    let name = format!("/bulkhead-test-{}/inner", std::process::id());
    let dir = std::env::temp_dir().join(format!("bulkhead-cgroup-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let journal = Journal::create(&dir).unwrap();
    let cgroup = match SandboxCgroup::create(&name, &journal) {
        Ok(Some(cgroup)) => cgroup,
        Ok(None) => {
            println!(
                "SKIPPED: a_cgroup_is_made_used_and_removed_with_its_processes: no cgroups here"
            );
            return;
        }
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            println!("SKIPPED: a_cgroup_is_made_used_and_removed_with_its_processes: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let before = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    cgroup.join().unwrap();
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    for path in cgroup.paths() {
        let inside = processes(path);
        assert!(inside.contains(&child.id()), "{}", path.display());
        assert!(inside.contains(&std::process::id()), "{}", path.display());
    }
    Journal::release_all(&dir).unwrap();
    assert!(!child.wait().unwrap().success());
    let after = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    assert_eq!(after, before);
    for path in cgroup.paths() {
        assert!(!path.exists(), "{}", path.display());
        assert!(!path.parent().unwrap().exists(), "{}", path.display());
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
