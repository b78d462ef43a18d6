// SPDX-License-Identifier: Apache-2.0
//! What a container sees: users, capabilities, limits, mounts, devices,
//! namespaces; and its life cycle.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use bulkhead_agent_protocol::{agent, oci};
use common::*;
use tokio::time::Duration;
use ttrpc::Code;

/// Runs a shell script in a container and gives what it printed.
async fn script(rig: &Rig, script: &str, change: impl FnOnce(&mut oci::Spec)) -> String {
    let mut spec = rig.spec("c", &["sh", "-c", script]);
    change(&mut spec);
    rig.run("c", spec).await.success()
}

#[tokio::test]
async fn user_groups_umask_and_directory() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "id -u; id -g; id -G; umask; pwd; echo $HOME; stat -c %U /made/up",
        |spec| {
            let process = spec.process.mut_or_insert_default();
            process.cwd = "/made/up".into();
            process.user = Some(oci::User {
                uid: 1000,
                gid: 1000,
                umask: Some(0o027),
                additional_gids: vec![2000, 3000],
                ..Default::default()
            })
            .into();
        },
    )
    .await;
    assert_eq!(
        printed,
        "1000\n1000\n1000 2000 3000\n0027\n/made/up\n/home/user\nroot\n"
    );
}

#[tokio::test]
async fn root_has_no_groups_of_the_agent() {
    let rig = Rig::start().await;
    let printed = script(&rig, "id -G; umask", |_| {}).await;
    assert_eq!(printed, "0\n0022\n");
}

/// The five sets as the kernel shows them.
async fn capabilities(rig: &Rig, uid: u32, sets: oci::Capabilities) -> Vec<u64> {
    let printed = script(rig, "grep Cap /proc/self/status", |spec| {
        let process = spec.process.mut_or_insert_default();
        process.user.mut_or_insert_default().uid = uid;
        process.capabilities = Some(sets).into();
    })
    .await;
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
        .map(|name| {
            let line = printed.lines().find(|line| line.starts_with(name)).unwrap();
            u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
        })
        .to_vec()
}

const KILL: u64 = 1 << 5;
const CHOWN: u64 = 1;

#[tokio::test]
async fn all_five_capability_sets() {
    let rig = Rig::start().await;
    let names = |list: &[&str]| list.iter().map(|name| (*name).into()).collect::<Vec<_>>();
    // An ambient capability survives the execution of a user's program.
    let sets = oci::Capabilities {
        bounding: names(&["CAP_KILL", "CAP_CHOWN"]),
        effective: names(&["CAP_KILL"]),
        inheritable: names(&["CAP_KILL"]),
        permitted: names(&["CAP_KILL", "CAP_CHOWN"]),
        ambient: names(&["CAP_KILL"]),
        ..Default::default()
    };
    let [inheritable, permitted, effective, bounding, ambient] =
        capabilities(&rig, 1000, sets).await.try_into().unwrap();
    assert_eq!(inheritable, KILL);
    assert_eq!(permitted, KILL);
    assert_eq!(effective, KILL);
    assert_eq!(bounding, KILL | CHOWN);
    assert_eq!(ambient, KILL);
    // Root's program gets what the bounding set allows.
    let sets = oci::Capabilities {
        bounding: names(&["CAP_KILL", "CAP_CHOWN"]),
        effective: names(&["CAP_KILL", "CAP_CHOWN"]),
        permitted: names(&["CAP_KILL", "CAP_CHOWN"]),
        ..Default::default()
    };
    assert_eq!(
        capabilities(&rig, 0, sets).await,
        [0, KILL | CHOWN, KILL | CHOWN, KILL | CHOWN, 0]
    );
    // None at all.
    assert_eq!(
        capabilities(&rig, 0, oci::Capabilities::default()).await,
        [0; 5]
    );
}

#[tokio::test]
async fn an_exec_has_its_own_capabilities_or_the_containers() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sleep", "100"]);
    let kill = oci::Capabilities {
        bounding: vec!["CAP_KILL".into()],
        effective: vec!["CAP_KILL".into()],
        permitted: vec!["CAP_KILL".into()],
        ..Default::default()
    };
    spec.process.mut_or_insert_default().capabilities = Some(kill).into();
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let show = ["sh", "-c", "grep CapEff /proc/self/status"];
    let mut inherits = process(&show);
    inherits.capabilities = None.into();
    let mut own = process(&show);
    own.capabilities = Some(oci::Capabilities::default()).into();
    for (id, exec, wanted) in [("a", inherits, "20"), ("b", own, "00")] {
        let streams = rig.exec("c", id, exec).await.unwrap();
        let printed = rig.outcome("c", id, streams).await.success();
        assert!(printed.trim_end().ends_with(wanted), "{id}: {printed}");
    }
}

#[tokio::test]
async fn no_new_privileges() {
    let rig = Rig::start().await;
    for (set, wanted) in [(true, "1"), (false, "0")] {
        let printed = script(&rig, "grep NoNewPrivs /proc/self/status", |spec| {
            spec.process.mut_or_insert_default().no_new_privileges = set;
        })
        .await;
        assert_eq!(printed.split_whitespace().last(), Some(wanted));
    }
}

#[tokio::test]
async fn resource_limits() {
    let rig = Rig::start().await;
    let printed = script(&rig, "ulimit -n; ulimit -Hn; ulimit -c", |spec| {
        let limit = |name: &str, soft, hard| oci::Rlimit {
            type_: name.into(),
            soft,
            hard,
            ..Default::default()
        };
        spec.process.mut_or_insert_default().rlimits =
            vec![limit("RLIMIT_NOFILE", 100, 200), limit("RLIMIT_CORE", 0, 0)];
    })
    .await;
    assert_eq!(printed, "100\n200\n0\n");
}

#[tokio::test]
async fn descriptors_and_signals_are_a_fresh_programs() {
    let rig = Rig::start().await;
    let mut spec = rig.spec(
        "c",
        &[
            "sh",
            "-c",
            "ls /proc/$$/fd; grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status",
        ],
    );
    // The shell itself would add to what is caught.
    spec.process.mut_or_insert_default().args =
        ["grep", "-E", "Sig(Blk|Ign|Cgt)", "/proc/self/status"]
            .map(String::from)
            .to_vec();
    let printed = rig.run("c", spec).await.success();
    for line in printed.lines() {
        assert!(line.ends_with("0000000000000000"), "{printed}");
    }
    // 3 is the listing's own.
    let spec = rig.spec("c", &["ls", "/proc/self/fd"]);
    assert_eq!(rig.run("c", spec).await.success(), "0\n1\n2\n3\n");
}

#[tokio::test]
async fn a_read_only_root() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "touch /x 2>/dev/null || echo refused; touch /tmp/x 2>/dev/null || echo refused; touch /run/x && touch /dev/x && echo memory",
        |spec| spec.root.mut_or_insert_default().readonly = true,
    )
    .await;
    assert_eq!(printed, "refused\nrefused\nmemory\n");
}

#[tokio::test]
async fn masked_and_read_only_paths() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "head -c 10 /proc/timer_list | wc -c; ls /proc/scsi 2>/dev/null | wc -l; cat /secret; ls /hidden | wc -l; \
         touch /hidden/x 2>/dev/null || echo hidden; echo 1 2>/dev/null > /proc/sys/kernel/panic || echo sys; \
         touch /ro/x 2>/dev/null || echo ro",
        |spec| {
            let root = spec.root.path.clone();
            fs::write(format!("{root}/secret"), "secret").unwrap();
            fs::create_dir_all(format!("{root}/hidden/below")).unwrap();
            fs::create_dir_all(format!("{root}/ro")).unwrap();
            let linux = spec.linux.mut_or_insert_default();
            linux.masked_paths.extend(["/secret", "/hidden", "/nosuch/path"].map(String::from));
            linux.readonly_paths.extend(["/ro", "/nosuch"].map(String::from));
        },
    )
    .await;
    assert_eq!(printed, "0\n0\n0\nhidden\nsys\nro\n");
}

#[tokio::test]
async fn namespaces_are_the_containers_own() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "hostname; echo $$; ls /proc | grep -c '^[0-9]*$'; cat /proc/self/cgroup; \
         for ns in pid uts ipc mnt cgroup net; do readlink /proc/self/ns/$ns; done",
        |spec| {
            spec.hostname = "inside".into();
            spec.linux.mut_or_insert_default().masked_paths.clear();
        },
    )
    .await;
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines[0], "inside");
    assert_eq!(lines[1], "1");
    // The shell, and the two of the pipe.
    assert!(lines[2].parse::<u32>().unwrap() <= 3, "{printed}");
    assert!(lines.contains(&"0::/"), "{printed}");
    for (name, own) in [
        ("pid", true),
        ("uts", true),
        ("ipc", true),
        ("mnt", true),
        ("cgroup", true),
        ("net", false),
    ] {
        let outside = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let inside = lines.iter().find(|line| line.starts_with(name)).unwrap();
        assert_eq!(outside.to_str().unwrap() != *inside, own, "{name}");
    }
}

#[tokio::test]
async fn namespaces_of_the_pod() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "readlink /proc/self/ns/uts; readlink /proc/self/ns/ipc; hostname",
        |spec| {
            // Not the container's to change.
            spec.hostname = "inside".into();
            for namespace in &mut spec.linux.mut_or_insert_default().namespaces {
                if namespace.type_ == "uts" || namespace.type_ == "ipc" {
                    namespace.path = format!("/proc/1/ns/{}", namespace.type_);
                }
            }
        },
    )
    .await;
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    let wanted = format!("{}\n{}\n", own("uts").display(), own("ipc").display());
    assert!(printed.starts_with(&wanted), "{printed}");
    assert!(!printed.ends_with("inside\n"), "{printed}");
}

#[tokio::test]
async fn devices_and_links() {
    let rig = Rig::start().await;
    let printed = script(
        &rig,
        "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$d; done; \
         for l in fd stdin stdout stderr core ptmx; do readlink /dev/$l; done; \
         stat -c '%n %t:%T %a %u %g' /dev/extra; echo lost > /dev/null && head -c 2 /dev/zero | wc -c",
        |spec| {
            spec.linux.mut_or_insert_default().devices = vec![oci::Device {
                path: "/dev/extra".into(),
                type_: "c".into(),
                major: 1,
                minor: 7,
                file_mode: Some(0o640),
                uid: 5,
                gid: 6,
                ..Default::default()
            }];
        },
    )
    .await;
    let wanted = "/dev/null 1:3 666\n/dev/zero 1:5 666\n/dev/full 1:7 666\n/dev/random 1:8 666\n\
        /dev/urandom 1:9 666\n/dev/tty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n\
        /proc/self/fd/2\n/proc/kcore\npts/ptmx\n/dev/extra 1:7 640 5 6\n2\n";
    assert_eq!(printed, wanted);
}

#[tokio::test]
async fn mounts_with_options() {
    let rig = Rig::start().await;
    let shared = rig.directory.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "content").unwrap();
    let printed = script(
        &rig,
        "cat /data/file; touch /data/x 2>/dev/null || echo refused; cat /etc/one; echo more >> /rw/new; \
         grep -E ' (/data|/rw|/small|/once) ' /proc/self/mountinfo | cut -d' ' -f5,6; \
         dd if=/dev/zero of=/small/f bs=1k count=200 2>/dev/null; stat -c %s /small/f; stat -c %a /small; \
         cat /once/up; touch /once/x 2>/dev/null || echo once",
        |spec| {
            let root = spec.root.path.clone();
            fs::create_dir(format!("{root}/once")).unwrap();
            fs::write(format!("{root}/once/up"), "copied\n").unwrap();
            symlink("busybox", format!("{root}/bin/cut")).unwrap();
            spec.mounts.extend([
                bind(&shared, "/data", &["rbind", "ro", "nosuid", "noexec"]),
                bind(&shared.join("file"), "/etc/one", &["bind"]),
                bind(&shared, "/rw", &["rbind", "rw", "nodev", "noatime"]),
                mount("/small", "tmpfs", &["size=100k", "mode=1700", "nosuid"]),
                mount("/once", "tmpfs", &["tmpcopyup", "ro"]),
            ]);
        },
    )
    .await;
    let wanted = "contentrefused\ncontent/data ro,nosuid,noexec,relatime\n/rw rw,nodev,noatime\n\
        /small rw,nosuid,relatime\n/once ro,relatime\n102400\n1700\ncopied\nonce\n";
    assert_eq!(printed, wanted);
    assert_eq!(fs::read_to_string(shared.join("new")).unwrap(), "more\n");
}

#[tokio::test]
async fn links_in_the_image_do_not_lead_mounts_outside() {
    let rig = Rig::start().await;
    let outside = rig.directory.path().join("outside");
    let source = rig.directory.path().join("source");
    fs::create_dir(&outside).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "mine").unwrap();
    let target = outside.clone();
    let printed = script(
        &rig,
        "cat /absolute/file /relative/deep/file",
        move |spec| {
            let root = spec.root.path.clone();
            symlink(&target, format!("{root}/absolute")).unwrap();
            symlink("../../../../../../..", format!("{root}/relative")).unwrap();
            spec.mounts.push(bind(&source, "/absolute", &["rbind"]));
            spec.mounts
                .push(bind(&source, "/relative/deep", &["rbind"]));
        },
    )
    .await;
    assert_eq!(printed, "minemine");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!std::path::Path::new("/deep").exists());
}

#[tokio::test]
async fn proc_is_not_mounted_through_a_link() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["true"]);
    let root = std::path::PathBuf::from(&spec.root.path);
    fs::remove_dir(root.join("proc")).unwrap();
    symlink("/tmp", root.join("proc")).unwrap();
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(
        text.contains("/proc") && text.contains("symbolic link"),
        "{text}"
    );
}

#[tokio::test]
async fn mounts_do_not_reach_the_guest() {
    let rig = Rig::start().await;
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let root = rig.directory.path().to_str().unwrap().to_owned();
    let during = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(
        !during.contains(&root),
        "before: {before}\nduring: {during}"
    );
}

#[tokio::test]
async fn errors_name_the_step_and_the_path() {
    let rig = Rig::start().await;
    let missing = |name: &str| rig.directory.path().join(name);
    let mut no_source = rig.spec("c", &["true"]);
    no_source
        .mounts
        .push(bind(&missing("nosuch"), "/data", &["bind"]));
    let mut bad_option = rig.spec("c", &["true"]);
    bad_option
        .mounts
        .push(mount("/t", "tmpfs", &["nosuchoption=1"]));
    let mut no_root = rig.spec("c", &["true"]);
    no_root.root.mut_or_insert_default().path = missing("noroot").to_str().unwrap().into();
    for (spec, wanted) in [
        (no_source, "nosuch: No such file or directory"),
        (bad_option, "nosuchoption"),
        (no_root, "open root file system"),
    ] {
        let (code, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!(code, Code::INTERNAL, "{text}");
        assert!(text.contains(wanted), "{text}");
        assert!(!rig.cgroup_of("c").exists());
    }
}

#[tokio::test]
async fn requests_that_make_no_sense() {
    let rig = Rig::start().await;
    let (code, text) = status(rig.create("../x", rig.spec("c", &["true"])).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    let mut spec = rig.spec("c", &["true"]);
    spec.linux
        .mut_or_insert_default()
        .namespaces
        .push(oci::Namespace {
            type_: "user".into(),
            ..Default::default()
        });
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("user"), "{text}");
    let request = agent::CreateContainerRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let (code, text) = status(rig.client.create_container(rig.context(), &request).await);
    assert_eq!(
        (code, text.as_str()),
        (Code::INVALID_ARGUMENT, "spec: missing")
    );
}

#[tokio::test]
async fn the_life_cycle_refuses_what_does_not_fit() {
    let rig = Rig::start().await;
    assert_eq!(status(rig.start_container("c").await).0, Code::NOT_FOUND);
    assert_eq!(status(rig.wait("c", "").await).0, Code::NOT_FOUND);
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec.clone()).await.unwrap();
    assert_eq!(
        status(rig.create("c", spec).await.map(drop)).0,
        Code::ALREADY_EXISTS
    );
    rig.start_container("c").await.unwrap();
    assert_eq!(
        status(rig.start_container("c").await).0,
        Code::FAILED_PRECONDITION
    );
    let (code, text) = status(rig.delete("c").await);
    assert_eq!(
        (code, text.as_str()),
        (
            Code::FAILED_PRECONDITION,
            "container c is running and cannot be deleted"
        )
    );
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    rig.wait("c", "").await.unwrap();
    let exec = rig.exec("c", "e", process(&["true"])).await.map(drop);
    assert_eq!(status(exec).0, Code::FAILED_PRECONDITION);
    rig.delete("c").await.unwrap();
    assert_eq!(status(rig.delete("c").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    let streams = rig.create("c", spec).await.unwrap();
    assert!(std::path::Path::new(&format!("/proc/{}", streams.pid)).exists());
    rig.delete("c").await.unwrap();
    assert!(!rig.cgroup_of("c").exists());
    assert!(!std::path::Path::new(&format!("/proc/{}/exe", streams.pid)).exists());
}

#[tokio::test]
async fn pause_and_resume() {
    let rig = Rig::start().await;
    let spec = rig.spec(
        "c",
        &[
            "sh",
            "-c",
            "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done",
        ],
    );
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let stdout = streams.stdout.as_mut().unwrap();
    read_until(stdout, "3\n").await;
    let request = rig.container("c");
    rig.client
        .pause_container(rig.context(), &request)
        .await
        .unwrap();
    let exec = rig.exec("c", "e", process(&["true"])).await.map(drop);
    assert_eq!(status(exec).0, Code::FAILED_PRECONDITION);
    let twice = rig.client.pause_container(rig.context(), &request).await;
    assert_eq!(status(twice).0, Code::FAILED_PRECONDITION);
    // What was written before the pause is read; then there is silence.
    let mut buffer = vec![0; 65536];
    use tokio::io::AsyncReadExt;
    while tokio::time::timeout(Duration::from_millis(300), stdout.read(&mut buffer))
        .await
        .is_ok()
    {}
    rig.client
        .resume_container(rig.context(), &request)
        .await
        .unwrap();
    read_until(stdout, "\n").await;
    // A paused container can be killed.
    rig.client
        .pause_container(rig.context(), &request)
        .await
        .unwrap();
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 137);
    rig.delete("c").await.unwrap();
}

#[tokio::test]
async fn lists_and_stats() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    let init = rig.create("c", spec).await.unwrap().pid;
    rig.start_container("c").await.unwrap();
    let exec = rig
        .exec("c", "e", process(&["sleep", "100"]))
        .await
        .unwrap()
        .pid;
    let list = rig
        .client
        .list_processes(rig.context(), &rig.container("c"))
        .await
        .unwrap();
    let mut listed: Vec<_> = list
        .processes
        .iter()
        .map(|process| (process.pid, process.exec_id.as_str()))
        .collect();
    listed.sort();
    let mut wanted = vec![(init, ""), (exec, "e")];
    wanted.sort();
    assert_eq!(listed, wanted);
    let stats = rig
        .client
        .stats_container(rig.context(), &rig.container("c"))
        .await
        .unwrap();
    // cpu.stat is there without any controller.
    assert!(stats.cpu.is_some(), "{stats:?}");
}

#[tokio::test]
async fn three_containers_at_once() {
    let rig = Rig::start().await;
    let ids = ["a", "b", "c"];
    let specs = ids.map(|id| rig.spec(id, &["sh", "-c", &format!("echo {id}; sleep 0.2")]));
    let [a, b, c] = specs;
    let (a, b, c) = tokio::join!(rig.run("a", a), rig.run("b", b), rig.run("c", c));
    for (id, outcome) in ids.into_iter().zip([a, b, c]) {
        assert_eq!(outcome.success(), format!("{id}\n"));
    }
}

#[tokio::test]
async fn many_containers_leave_nothing() {
    let rig = Rig::start().await;
    let descriptors = || {
        fs::read_dir(format!("/proc/{}/fd", rig.agent_pid()))
            .unwrap()
            .count()
    };
    let spec = rig.spec("c", &["true"]);
    rig.run("c", spec.clone()).await.success();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = descriptors();
    for _ in 0..30 {
        rig.run("c", spec.clone()).await.success();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(descriptors() <= before, "{} > {before}", descriptors());
    assert!(!rig.cgroup_of("c").exists());
    assert_eq!(children_of(rig.agent_pid()), [""; 0], "zombies or orphans");
    let threads = fs::read_dir(format!("/proc/{}/task", rig.agent_pid()))
        .unwrap()
        .count();
    assert_eq!(threads, 1, "the agent has one thread");
}

/// The names of a process's children, dead or alive.
fn children_of(parent: u32) -> Vec<String> {
    let parent = parent.to_string();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter(|stat| {
            // Behind the name, which ends with the last bracket: state, parent.
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            rest.split_whitespace().nth(1) == Some(parent.as_str())
        })
        .collect()
}

#[tokio::test]
async fn a_hundred_execs_at_once() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let rig = &rig;
    let runs = (0..100).map(|number| async move {
        let id = format!("e{number}");
        let exec = process(&["sh", "-c", &format!("echo {number}; exit {number}")]);
        let streams = rig.exec("c", &id, exec).await.unwrap();
        let outcome = rig.outcome("c", &id, streams).await;
        assert_eq!(
            (outcome.status, outcome.stdout),
            (number, format!("{number}\n"))
        );
    });
    let all: Vec<_> = runs.collect();
    let mut set = Vec::new();
    for run in all {
        set.push(Box::pin(run));
    }
    common::join_all(set).await;
}
