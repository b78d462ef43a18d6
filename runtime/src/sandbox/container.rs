// SPDX-License-Identifier: Apache-2.0
//! Making, freezing, limiting and removing containers.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{atomic::Ordering, Arc},
};

use bulkhead_agent_protocol::{
    agent::{ContainerRequest, CreateContainerRequest, StatsReply, UpdateContainerRequest},
    MIRRORS,
};
use oci_spec::runtime::{LinuxResources, Spec};

use super::{
    blocking,
    directory::check_name,
    layers::Layers,
    mirror::{self, Mirrored},
    mountpoints,
    process::{self, Requested},
    resize::Resize,
    rootfs,
    state::{label, Container, Frozen, Phase, Process, Stage},
    watcher, CreateRequest, Deleted, Event, Exit, Inner,
};
use crate::{
    error::{chain, Error, ErrorKind, Step},
    fault,
    hooks::Lifecycle,
    io::Copies,
    oci::{self, Limits, Prepared},
    resource::{journal::Resource, mount},
};

fn request(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

/// See [`super::Sandbox::create`].
pub async fn create(inner: Arc<Inner>, mut request: CreateRequest) -> Result<u32, Error> {
    let id = request.id.clone();
    check_name("container", &id)?;
    let directory = inner.directory.shared().join(&id);
    let stdio = std::mem::take(&mut request.stdio);
    let (terminal, paths) = (stdio.terminal, stdio.paths.clone());
    {
        let mut pod = inner.pod();
        pod.accepts()?;
        if pod.containers.contains_key(&id) {
            return Err(Error::AlreadyExists(label(&id, None)));
        }
        let path = directory.clone();
        let entry = inner
            .journal
            .record(Resource::Directory { path })
            .step(|| "write the journal")?;
        let container = Container {
            bundle: request.bundle.clone(),
            phase: Phase::Creating,
            frozen: Frozen::No,
            init: Process::new(terminal, paths.clone()),
            execs: BTreeMap::new(),
            hooks: None,
            mirrors: Vec::new(),
            entry,
            limits: Limits::default(),
        };
        pod.containers.insert(id.clone(), container);
    }
    match make(&inner, &request, stdio, &directory).await {
        Ok(Made {
            copies,
            hooks,
            mirrors,
            limits,
        }) => {
            let follow = |each: Mirrored| each.follow(Arc::downgrade(&inner), id.clone());
            let mirrors = mirrors.into_iter().map(follow).collect();
            let pid = {
                let mut pod = inner.pod();
                let pid = pod.pid;
                let ended = pod.ended.clone();
                if let Some(container) = pod.containers.get_mut(&id) {
                    container.phase = Phase::Exists;
                    container.init.copies = Some(Arc::new(copies));
                    container.hooks = Some(hooks);
                    container.mirrors = mirrors;
                    container.limits = limits;
                }
                pod.tell(Event::Created {
                    id: id.clone(),
                    bundle: request.bundle,
                    rootfs: request.rootfs,
                    stdio: paths,
                    terminal,
                    pid,
                });
                // It ended while nobody looked at this one.
                if let Some(why) = ended {
                    pod.machine_ended(why);
                }
                pid
            };
            process::watch(&inner, &id, None);
            watcher::begin(&inner, inner.volumes.unwatched());
            Ok(pid)
        }
        Err(error) => {
            let error = inner.explain(error).await;
            forget(&inner, &id, &directory).await;
            Err(error)
        }
    }
}

/// A container that was made.
struct Made {
    copies: Copies,
    hooks: Arc<Lifecycle>,
    mirrors: Vec<Mirrored>,
    limits: Limits,
}

async fn make(
    inner: &Arc<Inner>,
    request: &CreateRequest,
    stdio: crate::io::Stdio,
    directory: &Path,
) -> Result<Made, Error> {
    let mut spec = oci::load(&request.bundle)?;
    if let Some(files) = &inner.files {
        files.mount(&mut spec);
    }
    let pod = oci::Pod {
        pid: pid(inner),
        sandbox: inner.files.is_none().then_some(&inner.id),
    };
    let prepared = oci::container(&spec, &request.id, Some(pod))?;
    let hooks = Lifecycle::new(&spec, &request.id, &request.bundle)?;
    match make_hooked(inner, request, stdio, directory, &spec, prepared, &hooks).await {
        Ok((copies, mirrors)) => {
            let resources = spec.linux().as_ref().and_then(|l| l.resources().as_ref());
            Ok(Made {
                copies,
                hooks: Arc::new(hooks),
                mirrors,
                limits: Limits::default().changed(resources),
            })
        }
        Err(error) => {
            // What its hooks have done is theirs to undo.
            hooks.poststop().await;
            Err(error)
        }
    }
}

async fn make_hooked(
    inner: &Arc<Inner>,
    request: &CreateRequest,
    stdio: crate::io::Stdio,
    directory: &Path,
    spec: &Spec,
    prepared: Prepared,
    hooks: &Lifecycle,
) -> Result<(Copies, Vec<Mirrored>), Error> {
    let root = spec.root().as_ref();
    let root_path = root.map_or_else(
        || request.bundle.join("rootfs"),
        |root| request.bundle.join(root.path()),
    );
    let read_only = root.and_then(|root| root.readonly()).unwrap_or(false);
    let (directory, mounts) = (directory.to_path_buf(), request.rootfs.clone());
    let (id, pod) = (request.id.clone(), inner.clone());
    // A root that nothing is mounted for is as the host has it; the guest
    // mounts its own over a snapshot, and makes that read-only itself.
    let points = (read_only && mounts.is_empty()).then(|| spec.mounts().clone());
    let (prepared, mirrors) = blocking(move || {
        let mut prepared = prepared;
        if let Some(points) = points.flatten() {
            mountpoints::make(&root_path, &points)?;
        }
        let mirrors = copied(&mut prepared, &id)?;
        let shared = pod.directory.shared();
        pod.volumes
            .place(&mut prepared, &id, &shared, &pod.journal)?;
        let layers = Layers {
            directory: &pod.directory.layers(&id),
            journal: &pod.journal,
        };
        rootfs::prepare(
            &directory,
            layers,
            &mounts,
            &root_path,
            read_only,
            &prepared.volumes,
        )?;
        Ok((prepared, mirrors))
    })
    .await?;
    inner.fault.after(fault::Step::Rootfs)?;
    let hooked = request.id == inner.id && inner.hooked.swap(false, Ordering::Relaxed);
    if !hooked {
        hooks.before_start(pid(inner)).await?;
    }

    let requested = Requested::of(&inner.streams, &stdio);
    let spec = bulkhead_agent_protocol::oci::Spec {
        bundle: request.bundle.to_string_lossy().into_owned(),
        ..prepared.spec
    };
    inner
        .agent
        .create_container(CreateContainerRequest {
            container_id: request.id.clone(),
            spec: Some(spec).into(),
            stdio: Some(requested.ids()).into(),
            mirrors: mirrors.iter().map(|each| each.tree.clone()).collect(),
            ..Default::default()
        })
        .await?;
    let made = inner.fault.after(fault::Step::Create);
    let copies = match made {
        Ok(()) => connect(inner, requested, stdio).await,
        Err(error) => Err(error),
    };
    match copies {
        Ok(copies) => Ok((copies, mirrors)),
        Err(error) => {
            // The guest has it already.
            if let Err(left) = inner
                .agent
                .delete_container(self::request(&request.id))
                .await
            {
                tracing::warn!(
                    sandbox = inner.id,
                    container = request.id,
                    error = chain(&left),
                    "container left behind in the guest"
                );
            }
            Err(error)
        }
    }
}

/// Takes out the volumes that the guest gets a copy of. Blocks.
fn copied(prepared: &mut Prepared, id: &str) -> Result<Vec<Mirrored>, Error> {
    let mut mirrors = Vec::new();
    let (spec, volumes) = (&mut prepared.spec, std::mem::take(&mut prepared.volumes));
    for volume in volumes {
        let mirrored = match volume.read_only && mirror::is_kubelets(&volume.source) {
            true => Mirrored::new(&volume)?,
            false => None,
        };
        let Some(mirrored) = mirrored else {
            prepared.volumes.push(volume);
            continue;
        };
        // A volume's name is the number of its mount.
        let number = volume.name.parse().ok();
        if let Some(mount) = number.and_then(|number: usize| spec.mounts.get_mut(number)) {
            mount.source = format!("{MIRRORS}/{id}/{}", volume.name);
        }
        mirrors.push(mirrored);
    }
    Ok(mirrors)
}

/// Takes the container's streams, and begins to copy.
async fn connect(
    inner: &Arc<Inner>,
    requested: Requested,
    stdio: crate::io::Stdio,
) -> Result<Copies, Error> {
    let watcher = inner.clone();
    let limit = inner.config.agent.stream_timeout();
    let copies = requested
        .connect(stdio, limit, move || watcher.first_output())
        .await?;
    inner.fault.after(fault::Step::Connect)?;
    Ok(copies)
}

fn pid(inner: &Inner) -> u32 {
    inner.pod().pid
}

/// Removes a container's files and its place in the pod.
async fn forget(inner: &Arc<Inner>, id: &str, directory: &Path) {
    let (path, pod, of) = (directory.to_path_buf(), inner.clone(), id.to_owned());
    let removed = blocking(move || {
        let shared = pod.directory.shared();
        let left = pod
            .volumes
            .leave(&of, |volume| pod.watcher.remove(&shared, volume));
        mount::remove_tree(&path).step(|| format!("remove {}", path.display()))?;
        left
    })
    .await;
    let container = inner.pod().containers.remove(id);
    let outcome = match (removed, container) {
        (Ok(()), Some(container)) => inner
            .journal
            .forget(container.entry)
            .step(|| "write the journal"),
        (removed, _) => removed,
    };
    if let Err(error) = outcome {
        // The journal has it: the sandbox's end is another try.
        tracing::warn!(
            sandbox = inner.id,
            container = id,
            error = chain(&error),
            "container's files not removed"
        );
    }
}

/// See [`super::Sandbox::delete`].
pub async fn delete(inner: Arc<Inner>, id: String) -> Result<Deleted, Error> {
    let (created, copies, hooks, mut exit) = {
        let mut pod = inner.pod();
        let container = pod.container(&id)?;
        if container.phase == Phase::Deleting {
            return Err(Error::Precondition(format!(
                "{} is being deleted",
                label(&id, None)
            )));
        }
        let created = match container.init.stage {
            Stage::Stopped => false,
            Stage::Created => true,
            Stage::Starting | Stage::Running => {
                return Err(Error::Precondition(format!(
                    "{} is running: kill it first",
                    label(&id, None)
                )));
            }
        };
        container.phase = Phase::Deleting;
        (
            created,
            container.init.copies.clone(),
            container.hooks.clone(),
            container.init.exit.subscribe(),
        )
    };
    if created {
        // Best effort: deleting kills as well.
        let _ = process::send_signal(&inner, &id, None, 9, true).await;
        let _ = tokio::time::timeout(
            inner.config.runtime.kill_timeout(),
            exit.wait_for(Option::is_some),
        )
        .await;
    }
    if let Some(copies) = copies {
        if !copies
            .delivered(inner.config.runtime.output_timeout())
            .await
        {
            tracing::warn!(
                sandbox = inner.id,
                container = id,
                "output was not taken, and is dropped"
            );
        }
        copies.stop();
    }
    if inner.pod().ended.is_none() {
        match inner.agent.delete_container(request(&id)).await {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            // The host's part goes all the same.
            Err(error) => tracing::warn!(
                sandbox = inner.id,
                container = id,
                error = chain(&error),
                "container not removed in the guest"
            ),
        }
    }
    let (exit, pid) = {
        let mut pod = inner.pod();
        pod.give_up_on_execs(&id);
        let exit = (*exit.borrow()).unwrap_or(Exit {
            status: super::state::KILLED,
            at: std::time::SystemTime::now(),
        });
        (exit, pod.pid)
    };
    let directory = inner.directory.shared().join(&id);
    forget(&inner, &id, &directory).await;
    if let Some(hooks) = hooks {
        hooks.poststop().await;
    }
    inner.pod().tell(Event::Deleted {
        id,
        exec: None,
        pid,
        status: exit.status,
        at: exit.at,
    });
    Ok(Deleted { pid, exit })
}

/// See [`super::Sandbox::pids`].
pub async fn pids(inner: &Inner, id: &str) -> Result<Vec<(u32, Option<String>)>, Error> {
    exists(inner, id)?;
    let reply = asked(inner, inner.agent.list_processes(request(id)).await).await?;
    Ok(reply
        .processes
        .into_iter()
        .map(|process| {
            let exec = Some(process.exec_id).filter(|exec| !exec.is_empty());
            (process.pid, exec)
        })
        .collect())
}

/// See [`super::Sandbox::stats`].
pub async fn stats(inner: &Inner, id: &str) -> Result<StatsReply, Error> {
    exists(inner, id)?;
    asked(inner, inner.agent.stats_container(request(id)).await).await
}

/// See [`super::Sandbox::update`].
pub async fn update(inner: Arc<Inner>, id: String, resources: LinuxResources) -> Result<(), Error> {
    exists(&inner, &id)?;
    let translated = oci::resources(&resources)?;
    let resize = Resize::begin(&inner, &id, &resources).await?;
    // More before it may be used, less when it is not used any more.
    resize.grow().await?;
    let update = inner.agent.update_container(UpdateContainerRequest {
        container_id: id.clone(),
        resources: Some(translated).into(),
        ..Default::default()
    });
    match asked(&inner, update.await).await {
        Ok(_) => {
            resize.finish(&id).await;
            Ok(())
        }
        Err(error) => {
            resize.undo().await;
            Err(error)
        }
    }
}

/// See [`super::Sandbox::pause`].
pub async fn pause(inner: Arc<Inner>, id: String) -> Result<(), Error> {
    {
        let mut pod = inner.pod();
        pod.accepts()?;
        let container = pod.container(&id)?;
        if container.init.stage != Stage::Running || container.frozen != Frozen::No {
            return Err(Error::Precondition(format!(
                "{} is not running",
                label(&id, None)
            )));
        }
        container.frozen = Frozen::Pausing;
    }
    let paused = inner.agent.pause_container(request(&id)).await;
    let mut pod = inner.pod();
    let Ok(container) = pod.container(&id) else {
        return Err(Error::NotFound(label(&id, None)));
    };
    match paused {
        Ok(_) => {
            container.frozen = Frozen::Yes;
            pod.tell(Event::Paused { id });
            Ok(())
        }
        Err(error) => {
            container.frozen = Frozen::No;
            Err(error)
        }
    }
}

/// See [`super::Sandbox::resume`].
pub async fn resume(inner: Arc<Inner>, id: String) -> Result<(), Error> {
    {
        let mut pod = inner.pod();
        pod.accepts()?;
        let container = pod.container(&id)?;
        if container.frozen != Frozen::Yes {
            return Err(Error::Precondition(format!(
                "{} is not paused",
                label(&id, None)
            )));
        }
    }
    inner.agent.resume_container(request(&id)).await?;
    let mut pod = inner.pod();
    if let Ok(container) = pod.container(&id) {
        container.frozen = Frozen::No;
        pod.tell(Event::Resumed { id });
    }
    Ok(())
}

fn exists(inner: &Inner, id: &str) -> Result<(), Error> {
    let mut pod = inner.pod();
    pod.container(id)?;
    pod.accepts()
}

async fn asked<T>(inner: &Inner, answer: Result<T, Error>) -> Result<T, Error> {
    match answer {
        Ok(answer) => Ok(answer),
        Err(error) => Err(inner.explain(error).await),
    }
}
