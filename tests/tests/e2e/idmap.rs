// SPDX-License-Identifier: Apache-2.0
//! Containers with a user namespace whose files are on a disk as if they had
//! none: id-mapped volumes, and a root file system that containerd 2 has mapped
//! by mount options. The distribution's containerd knows neither, so the shim
//! is called as containerd 2 calls it; and with one that knows them a pod is run
//! as a kubelet does (`hostUsers: false`).

use std::fs;
use std::os::unix::fs::{chown, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{ensure, Context as _, Result};
use bulkhead_shim_protocol::shim::{
    CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use bulkhead_shim_protocol::shim_v3_ttrpc::TaskClient;
use bulkhead_shim_protocol::types::Mount;
use bulkhead_tests::cri::Cri;
use bulkhead_tests::install::which;
use bulkhead_tests::listing::Listing;
use bulkhead_tests::proc;
use serde_json::{json, Value};
use tokio::net::UnixStream;
use ttrpc::asynchronous::{transport::Socket, Client};

use crate::context::{mentions, same, until, Context, Skip, LIMIT};
use crate::failure::{good_spec, run_spec, unpacked};
use crate::pod::{listing, places, Pod, PATIENCE};
use crate::runner::{tests, Test};
use crate::sandbox_api::{fresh, limit, start_shim};
use crate::vmm::runtime;

pub const TESTS: &[Test] = tests![
    volumes_and_layers_have_the_containers_ids,
    a_pod_has_users_of_its_own,
    what_cannot_be_id_mapped_is_refused,
];

/// Namespace of containerd's, and the container's name.
const NAMESPACE: &str = "bh-idmap";
const CONTAINER: &str = "bh-idmap-one";

/// The first of the container's ids outside of it.
const FIRST: u32 = 100_000;

/// Something mounted, until it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = proc::run(Command::new("umount").arg(&self.0), LIMIT);
    }
}

/// A disk with a file system that can be id-mapped on every kernel.
fn disk(context: &Context, mib: u64) -> Result<Mounted> {
    for program in ["mkfs.ext4", "mount", "umount"] {
        if which(program).is_none() {
            return Err(Skip(format!("{program} is missing")).into());
        }
    }
    let (image, place) = (context.dir.join("disk.img"), context.dir.join("disk"));
    fs::create_dir_all(&place)?;
    fs::File::create(&image)?.set_len(mib << 20)?;
    let mut make = Command::new("mkfs.ext4");
    proc::run(make.args(["-q", "-F"]).arg(&image), LIMIT)?.ok()?;
    let mut mount = Command::new("mount");
    mount.args(["-o", "loop", "-t", "ext4"]);
    proc::run(mount.arg(&image).arg(&place), LIMIT)?.ok()?;
    fs::remove_file(image)?;
    Ok(Mounted(place))
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let found = fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok((found.uid(), found.gid()))
}

/// Two layers of an image, as they are unpacked, and the container's own, which
/// the snapshotter gives to its root.
fn layers(disk: &Path) -> Result<Mount> {
    let at = |name: &str| disk.join(name);
    for dir in ["bin", "dev", "etc", "proc", "same", "data", "plain"] {
        fs::create_dir_all(at("1").join(dir))?;
    }
    let busybox = which("busybox").context("busybox is missing")?;
    fs::create_dir_all(at("2/bin"))?;
    fs::copy(busybox, at("2/bin/busybox"))?;
    std::os::unix::fs::symlink("busybox", at("2/bin/sh"))?;
    fs::write(at("1/etc/file"), "from a layer\n")?;
    for name in ["upper", "work"] {
        fs::create_dir_all(at(name))?;
        chown(at(name), Some(FIRST), Some(FIRST))?;
    }
    let show = |name: &str| at(name).display().to_string();
    let ids = format!("0:{FIRST}:65536");
    Ok(Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![
            "index=off".into(),
            format!("uidmap={ids}"),
            format!("gidmap={ids}"),
            format!("workdir={}", show("work")),
            format!("upperdir={}", show("upper")),
            format!("lowerdir={}:{}", show("1"), show("2")),
        ],
        ..Default::default()
    })
}

/// What the container does; its errors come out too.
const SCRIPT: &str = "exec 2>&1; cd /; \
    busybox id -u; \
    busybox stat -c '%n %u %g' /bin/busybox /same/file /data/file /plain/file; \
    echo x > /same/made; echo x > /data/made; echo x > /made; \
    busybox chown 7:8 /same/given; busybox chmod 600 /etc/file; \
    busybox stat -c '%n %u %g' /same/made /data/made /same/given; \
    echo x > /plain/made || echo refused";

const PRINTED: &str = "0\n\
    /bin/busybox 0 0\n/same/file 0 0\n/data/file 0 0\n/plain/file 65534 65534\n\
    /same/made 0 0\n/data/made 0 0\n/same/given 7 8\n";

/// A bundle of a container with volumes: as its user namespace has it, with ids
/// of its own, and without.
fn bundle(context: &Context, disk: &Path) -> Result<PathBuf> {
    let range = |inside: u32, outside: u32, size: u32| json!([{ "containerID": inside, "hostID": outside, "size": size }]);
    let volume = |name: &str, options: &[&str]| {
        json!({ "destination": format!("/{name}"), "type": "bind",
            "source": disk.join("volumes").join(name), "options": options })
    };
    let mut data = volume("data", &["rbind"]);
    data["uidMappings"] = range(1000, FIRST, 10);
    data["gidMappings"] = range(2000, FIRST, 10);
    for name in ["same", "data", "plain"] {
        let place = disk.join("volumes").join(name);
        fs::create_dir_all(&place)?;
        fs::write(place.join("file"), "x")?;
        fs::write(place.join("given"), "x")?;
    }
    let data_dir = disk.join("volumes/data");
    for path in [data_dir.join("file"), data_dir] {
        chown(path, Some(1000), Some(2000))?;
    }
    let bundle = fresh(context.dir.join("idmap-bundle"))?;
    fs::create_dir(bundle.join("rootfs"))?;
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "cwd": "/",
            "args": ["/bin/sh", "-c", SCRIPT],
            "env": ["PATH=/bin"],
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE"],
                "effective": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE"],
                "permitted": ["CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE"],
            },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            volume("same", &["rbind", "idmap"]),
            data,
            volume("plain", &["rbind"]),
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "network" }, { "type": "user" },
            ],
            "uidMappings": range(0, FIRST, 65536),
            "gidMappings": range(0, FIRST, 65536),
            "cgroupsPath": "/bh-idmap/one",
        },
    });
    fs::write(bundle.join("config.json"), spec.to_string())?;
    Ok(bundle)
}

async fn runs(socket: &Path, bundle: &Path, out: &Path, root: Mount) -> Result<u32> {
    let stream = UnixStream::connect(socket).await?;
    let task = TaskClient::new(Client::new(Socket::new(stream)));
    let create = CreateTaskRequest {
        id: CONTAINER.into(),
        bundle: bundle.to_string_lossy().into_owned(),
        rootfs: vec![root],
        stdout: format!("file://{}", out.display()),
        ..Default::default()
    };
    let id = || CONTAINER.to_owned();
    let ran = async {
        task.create(limit(), &create).await?;
        let start = StartRequest {
            id: id(),
            ..Default::default()
        };
        task.start(limit(), &start).await?;
        let wait = WaitRequest {
            id: id(),
            ..Default::default()
        };
        let status = task.wait(limit(), &wait).await?.exit_status;
        let delete = DeleteRequest {
            id: id(),
            ..Default::default()
        };
        task.delete(limit(), &delete).await?;
        anyhow::Ok(status)
    };
    let ran = ran.await;
    let shutdown = ShutdownRequest {
        id: id(),
        ..Default::default()
    };
    task.shutdown(limit(), &shutdown).await?;
    ran
}

fn volumes_and_layers_have_the_containers_ids(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let disk = disk(context, 64)?;
    let at = |name: &str| disk.0.join(name);
    let root = layers(&disk.0)?;
    let bundle = bundle(context, &disk.0)?;
    let before = context.listing()?;
    let log = bundle.join("log");
    fs::write(&log, "")?;
    let out = context.dir.join("idmap.out");
    fs::write(&out, "")?;
    let socket = start_shim(context, NAMESPACE, CONTAINER, &bundle)?;
    let ran = runtime()?.block_on(runs(&socket, &bundle, &out, root));
    let status = ran
        .and_then(|status| {
            until(LIMIT, "the shim's end", || Ok(!socket.exists()))?;
            Ok(status)
        })
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
    let printed = fs::read_to_string(&out)?;
    let rest = printed
        .strip_prefix(PRINTED)
        .with_context(|| format!("it printed {printed:?}"))?;
    mentions(rest, &["refused"])?;
    same(status, 0)?;
    // As it is on the disk.
    for (name, wanted) in [
        ("volumes/same/made", (0, 0)),
        ("volumes/same/given", (7, 8)),
        ("volumes/data/made", (1000, 2000)),
        ("volumes/plain/file", (0, 0)),
        ("1/etc/file", (0, 0)),
        ("upper/etc/file", (FIRST, FIRST)),
        ("upper/made", (FIRST, FIRST)),
    ] {
        same(owner(&at(name))?, wanted).context(name)?;
    }
    context.nothing_left(&before, LIMIT)?;
    drop(disk);
    for directory in [&bundle, &context.dir.join("disk")] {
        fs::remove_dir_all(directory)?;
    }
    fs::remove_file(out)?;
    Ok(())
}

/// What containerd 1.7 has of it first.
const POD_USERS: (u32, u32) = (1, 7);
/// What looks at a runtime's features first.
const FEATURES: (u32, u32) = (2, 0);

fn a_pod_has_users_of_its_own(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    // Where there is no crictl, this test is skipped.
    context.cri()?;
    let version = context.containerd.version()?;
    if version < POD_USERS {
        let (major, minor) = version;
        let why = format!("containerd {major}.{minor} has no user namespaces of pods");
        return Err(Skip(why).into());
    }
    let disk = disk(context, 1024)?;
    let config = context.dir.join("config.toml");
    let directory = disk.0.join("k");
    let cri = Cri::start(&directory, &context.products, &config, &context.runtime)?;
    let outcome = pods_users(context, &cri).with_context(|| cri.containerd().log_tail(20));
    cri.stop()?;
    outcome?;
    if version >= FEATURES {
        features_are_asked_for(context, &disk.0)?;
    }
    drop(disk);
    fs::remove_dir_all(context.dir.join("disk"))?;
    Ok(())
}

/// What a kubelet is told, and what lets an id-mapped volume through.
fn features_are_asked_for(context: &Context, disk: &Path) -> Result<()> {
    let inspect = ["plugins", "inspect-runtime", "--runtime", &context.runtime];
    let told = context.ctr(&inspect)?.ok()?.out();
    let told: Value = serde_json::from_str(&told).context(told)?;
    let features = &told["Features"];
    let idmap = &features["linux"]["mountExtensions"]["idmap"];
    same(&idmap["enabled"], &json!(true)).with_context(|| told.to_string())?;

    let volume = disk.join("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("file"), "x")?;
    chown(volume.join("file"), Some(1000), Some(2000))?;
    let root = unpacked(context)?;
    let mut spec = good_spec(context, &root)?;
    let range = |outside: u32| json!([{ "containerID": outside, "hostID": 0, "size": 10 }]);
    let mounts = spec["mounts"].as_array_mut().context("a list of mounts")?;
    mounts.push(
        json!({ "destination": "/data", "type": "bind", "source": volume,
        "options": ["rbind"], "uidMappings": range(1000), "gidMappings": range(2000) }),
    );
    spec["process"]["args"] = json!(["busybox", "stat", "-c", "%u:%g", "/data/file"]);
    same(run_spec(context, &spec)?.ok()?.out(), "0:0")
}

fn pods_users(context: &Context, cri: &Cri) -> Result<()> {
    let ids = json!([{ "container_id": 0, "host_id": FIRST, "length": 65536 }]);
    let users = json!({ "mode": 0, "uids": ids, "gids": ids });
    let options = json!({ "namespace_options": { "userns_options": users } });
    let config = json!({ "linux": { "security_context": options } });
    // With what stays: the bridge, and directories of all pods.
    let first = Pod::run_on(context, cri, cri.handler(), "users", json!({}))?;
    first.start("first", "true", json!({}))?;
    first.remove()?;
    let before = listing(context, cri);
    let pod = Pod::run_on(context, cri, cri.handler(), "users", config.clone())?;
    let serve = "mkdir /srv; echo from the pod >/srv/page; echo serving; \
        exec httpd -f -p 80 -h /srv";
    let one = pod.start("one", serve, config.clone())?;
    pod.logged(&one, "serving")?;
    let two = pod.start("two", "exec sleep 7777", config)?;
    for container in [&one, &two] {
        let map = pod.sh(container, "cat /proc/self/uid_map /proc/self/gid_map")?;
        let numbers: Vec<&str> = map.split_whitespace().collect();
        same(numbers, ["0", "100000", "65536"].repeat(2))?;
        same(pod.sh(container, "id -u; stat -c %u /bin/busybox")?, "0\n0")?;
    }
    // The network, which containerd 1.7 makes only when the pod runs.
    let address = pod.address()?;
    mentions(&pod.sh(&two, "ip -4 addr show eth0")?, &[&address])?;
    let url = format!("http://{address}/page");
    let mut get = Command::new("busybox");
    let page = proc::run(get.args(["wget", "-q", "-O", "-", &url]), PATIENCE)?;
    same(page.ok().context("from the host")?.out(), "from the pod")?;
    pod.remove()?;
    let left = Listing::left_since(&before, &places(context, cri), PATIENCE);
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    Ok(())
}

fn what_cannot_be_id_mapped_is_refused(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let root = unpacked(context)?;
    let mut spec = good_spec(context, &root)?;
    let before = context.listing()?;
    let mount = |source: &str| {
        json!({ "destination": "/x", "type": "bind", "source": source,
            "options": ["bind", "idmap"] })
    };
    let push = |spec: &mut Value, mount: Value| -> Result<()> {
        let mounts = spec["mounts"].as_array_mut().context("a list of mounts")?;
        mounts.push(mount);
        Ok(())
    };
    // Those of a user namespace that the container has not.
    push(&mut spec, mount("/proc/sys"))?;
    let done = run_spec(context, &spec)?;
    mentions(&done.err(), &["mounts: /x: idmap without uidmappings"])?;
    let range = json!([{ "containerID": 0, "hostID": FIRST, "size": 65536 }]);
    spec["linux"]["uidMappings"] = range.clone();
    spec["linux"]["gidMappings"] = range;
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    let namespaces = namespaces.context("a list of namespaces")?;
    namespaces.push(json!({ "type": "user" }));
    let done = run_spec(context, &spec)?;
    mentions(
        &done.err(),
        &["mounts: source /proc/sys: proc, the file system of /proc/sys, cannot be id-mapped"],
    )?;
    context.containerd.clean()?;
    context.nothing_left(&before, LIMIT)
}
