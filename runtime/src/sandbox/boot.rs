// SPDX-License-Identifier: Apache-2.0
//! From nothing to a guest that can take containers.
//!
//! Waits: one for the VMM's answer to both of its requests, one for the
//! agent's call, one for its answer. The VMM's process starts while the host
//! prepares sockets, cgroup and network.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicU64},
        Arc, Mutex, OnceLock, PoisonError, Weak,
    },
    time::Duration,
};

use bulkhead_agent_protocol::{agent::SetupSandboxRequest, AGENT_PORT, SHARED_TAG, STREAM_PORT};
use bulkhead_ksm_throttler::group::Name;
use bulkhead_vmm_api::Pages;
use oci_spec::runtime::Spec;
use rustix::rand::{getrandom, GetRandomFlags};
use tokio::{
    net::UnixStream,
    sync::{
        mpsc::{unbounded_channel, UnboundedReceiver},
        watch, Semaphore,
    },
    time::timeout,
};

use super::{
    blocking,
    directory::{check_name, Directory, Identity},
    files::PodFiles,
    host::{adopt, attach, listen, nics, open_network, place, share, watched},
    late::LateNetwork,
    observe::watch_health,
    ports,
    state::{Extra, Pod},
    work, Event, Inner, Sandbox, SandboxRequest,
};
use crate::{
    agent::{Agent, Streams},
    clock,
    config::Config,
    error::{Error, Step},
    fault,
    hooks::Lifecycle,
    hypervisor::{
        bulkhead::{open_image, open_kernel, BulkheadVmm},
        cmdline::{self, Later},
        console::Console,
        Ending, Hypervisor, HypervisorError, Machine, Vsock,
    },
    ksm::{self, Merging},
    oci::{self, Role, Size},
    operator::{history::History, server},
    resource::{journal::Journal, process},
    timeline::Timeline,
};

/// Entropy for the guest's generator, in bytes.
const ENTROPY: usize = 64;

/// Bytes of shared memory of a pod that nobody says more of: as much as
/// containerd and others give one.
const SHARED_MEMORY: u64 = 64 << 20;

/// How many of the console's last lines an error tells.
const CONSOLE_LINES: usize = 4;

/// See [`Sandbox::start`].
pub async fn start(
    config: Config,
    request: SandboxRequest,
) -> Result<(Sandbox, UnboundedReceiver<Event>), Error> {
    check_name("sandbox", &request.id)?;
    // Before anything is taken.
    let mut request = request;
    let (spec, mut pod_sysctls, files) = match request.pod.take() {
        Some(pod) => {
            let linux = pod.spec.linux().as_ref();
            let sysctls = linux.and_then(|linux| linux.sysctl().clone());
            (pod.spec, sysctls.unwrap_or_default(), Some(pod.files))
        }
        None => {
            let spec = oci::load(&request.bundle)?;
            let sysctls = oci::container(&spec, &request.id, None)?.pod_sysctls;
            (spec, sysctls, None)
        }
    };
    oci::allow_users_network(&spec, &mut pod_sysctls);
    let shm_size = match files {
        Some(_) => Some(SHARED_MEMORY),
        None => oci::shm_size(&spec),
    };
    oci::check_network(&spec)?;
    let config = oci::configured(&spec, &config)?;
    let fault = config.debug.fault();
    let size = Size::of(&spec, &config.hypervisor)?;
    let merge_group = oci::merge_group(&spec, &config.hypervisor)?;
    let hooks = Lifecycle::new(&spec, &request.id, &request.bundle)?;
    let own_network = oci::wants_new_network(&spec);
    let of_pod = files.is_some() || oci::role(&spec) == Role::Sandbox;
    let kernel = open_kernel(&config.hypervisor.kernel)?;
    let image = open_image(&config.hypervisor.image)?;

    let directory = Directory::of(&config.runtime.state_dir, &request.namespace, &request.id);
    directory.create()?;
    let plan = Plan {
        spec,
        size,
        merge_group,
        pod_sysctls,
        shm_size,
        files,
        own_network,
        of_pod,
        kernel,
        image,
    };
    let begun = fault.after(fault::Step::Directory);
    let started = match begun {
        Ok(()) => boot(config, &request, directory.clone(), plan, &hooks).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(started) => Ok(started),
        Err(error) => {
            if own_network && hooks.any_before_start() {
                // What they have done is theirs to undo.
                hooks.poststop().await;
            }
            if let Err(left) = blocking(move || directory.release()).await {
                let left = crate::error::chain(&left);
                tracing::error!(
                    sandbox = request.id,
                    error = left,
                    "remains of a failed start"
                );
            }
            Err(error)
        }
    }
}

/// What is known before anything is taken from the host.
struct Plan {
    spec: Spec,
    size: Size,
    merge_group: Option<Name>,
    pod_sysctls: HashMap<String, String>,
    /// Of the pod's shared memory, in bytes; none: the guest's own default.
    shm_size: Option<u64>,
    /// None: a container stands for the pod.
    files: Option<Vec<(PathBuf, String)>>,
    /// The network namespace is a new one, which the first container's hooks set
    /// up, or others once it is there.
    own_network: bool,
    /// It is a pod's, not a container's alone.
    of_pod: bool,
    kernel: OwnedFd,
    image: OwnedFd,
}

async fn boot(
    config: Config,
    request: &SandboxRequest,
    directory: Directory,
    plan: Plan,
    hooks: &Lifecycle,
) -> Result<(Sandbox, UnboundedReceiver<Event>), Error> {
    let timeline = Timeline::new(request.shim_start_us);
    let journal = Journal::create(directory.path())
        .step(|| format!("create the journal in {}", directory.path().display()))?;
    let fault = config.debug.fault();
    share(&directory, &journal)?;
    work::give_debug_shell(Path::new(&config.agent.debug_shell), &directory.shared())?;
    fault.after(fault::Step::Share)?;
    let files = plan.files.map(|files| PodFiles::write(&directory, files));
    let files = files.transpose()?;
    let cgroup = place(&config.runtime, request, &plan.spec, &journal)?;
    let vm = BulkheadVmm::spawn(&config.hypervisor.path, plan.own_network)?;
    fault.after(fault::Step::Spawn)?;
    adopt(&vm, cgroup, &journal)?;
    fault.after(fault::Step::Adopt)?;
    let wanted = plan.merge_group;
    let mut merging = match wanted {
        // Others may be at it.
        Some(_) => blocking(move || Ok(Merging::join(wanted))).await?,
        None => Merging::Apart,
    };
    directory
        .identify(&Identity {
            namespace: request.namespace.clone(),
            id: request.id.clone(),
            pid: std::process::id(),
            vmm_pid: vm.pid(),
            memory_mib: plan.size.memory_mib,
            merge_group: merging.group().map(Name::to_string),
            mergeable: merging.is_member(),
            pid_started: process::start_time(std::process::id())
                .step(|| "look at this process")?
                .unwrap_or_default(),
            vcpus: plan.size.vcpus,
            created_ms: u64::try_from(clock::realtime_ns() / 1_000_000).unwrap_or_default(),
            task_socket: request.task_socket.clone(),
        })
        .step(|| "write sandbox.json")?;
    fault.after(fault::Step::Identify)?;

    let listener = listen(directory.vsock())?;
    let agent_listener = watched(listen(directory.vsock_port(AGENT_PORT))?)?;
    let stream_listener = watched(listen(directory.vsock_port(STREAM_PORT))?)?;
    fault.after(fault::Step::Listen)?;
    let made = match plan.own_network {
        true => Some(open_network(vm.pid())?),
        false => None,
    };
    let netns = match &made {
        // By a path that is nobody else's later, whatever becomes of the VMM.
        Some(made) => Some(format!("/proc/{}/fd/{}", std::process::id(), made.as_raw_fd()).into()),
        None => oci::network_namespace(&plan.spec).map(Path::to_owned),
    };
    let hooked = plan.own_network && hooks.any_before_start();
    if hooked {
        hooks.before_start(vm.pid()).await?;
    }
    // Without hooks nobody has been in it yet.
    let there = netns.clone().filter(|_| hooked || !plan.own_network);
    let (journal, network) = attach(there, journal).await?;
    let empty = network.nics.is_empty();
    let late = netns.clone().filter(|_| plan.own_network && empty);
    fault.after(fault::Step::Network)?;
    let (console, console_writer) = Console::open(&config.runtime, &request.id)
        .step(|| "open the guest's console (runtime.guest_console)")?;
    let console = Arc::new(console);
    let shared = File::open(directory.shared()).step(|| "open the shared directory")?;

    let machine = Machine {
        vcpus: plan.size.vcpus + plan.size.extra_vcpus,
        memory_mib: match config.hypervisor.pages {
            Pages::Small | Pages::Transparent => plan.size.memory_mib,
            // Whole ones.
            Pages::Huge => plan.size.memory_mib.next_multiple_of(2),
        },
        extra_memory_mib: plan.size.extra_memory_mib,
        pages: config.hypervisor.pages,
        free_page_reporting: config.hypervisor.free_page_reporting,
        dax_mib: config.hypervisor.dax_mib.next_multiple_of(2),
        host_locks: config.hypervisor.host_locks,
        merge_group: merging.take_held(),
        cmdline: cmdline::build_for(
            Later {
                vcpus: (plan.size.extra_vcpus > 0).then_some(plan.size.vcpus),
                memory: plan.size.extra_memory_mib > 0,
                debug: !config.agent.debug_shell.is_empty(),
            },
            &config.hypervisor.kernel_params,
        ),
        kernel: plan.kernel,
        image: plan.image,
        console: console_writer,
        shared: shared.into(),
        vsock: Vsock {
            listener: listener.into(),
            path: directory.vsock(),
            ready_port: AGENT_PORT,
        },
        nics: nics(network.nics, config.hypervisor.vhost_net)?,
    };
    let patience = config.agent.ready_timeout();
    let call = tokio::select! {
        biased;
        call = ready(&vm, machine, &agent_listener, patience) => call,
        ending = ended(&vm) => Err(Error::VmEnded(ending)),
    };
    let stream = call.map_err(|error| last_words(error, &console))?;
    timeline.agent_ready();
    fault.after(fault::Step::Boot)?;

    let agent = Agent::new(stream, &config.agent);
    let hostname = plan.spec.hostname().clone().unwrap_or_default();
    let mut entropy = vec![0; ENTROPY];
    getrandom(&mut entropy, GetRandomFlags::empty()).step(|| "get entropy")?;
    let setup = agent.setup_sandbox(SetupSandboxRequest {
        sandbox_id: request.id.clone(),
        hostname,
        realtime_ns: clock::realtime_ns(),
        entropy,
        shared_tag: SHARED_TAG.into(),
        shared_dax: config.hypervisor.dax_mib > 0,
        network: Some(network.guest).into(),
        sysctls: plan.pod_sysctls,
        shm_size: plan.shm_size.unwrap_or_default(),
        ..Default::default()
    });
    let guest = tokio::select! {
        biased;
        guest = setup => guest,
        ending = ended(&vm) => Err(Error::VmEnded(ending)),
    };
    let guest = guest.map_err(|error| last_words(error, &console))?;
    timeline.sandbox_ready();
    fault.after(fault::Step::SetUp)?;
    tracing::info!(
        sandbox = request.id,
        namespace = request.namespace,
        vmm = vm.pid(),
        vcpus = plan.size.vcpus,
        memory_mib = plan.size.memory_mib,
        kernel = guest.kernel_release,
        agent = guest.agent_version,
        // The guest's own clock, from the kernel's entry on.
        init_ms = guest.agent_start_ns / 1_000_000,
        "sandbox started"
    );
    ksm::kick(&config.ksm_socket(), &merging);

    let operator = match config.runtime.operator_socket {
        true => Some(server::listen(&directory.operator()).step(|| "listen for the operator")?),
        false => None,
    };
    let history = Arc::new(History::new(
        &request.namespace,
        &request.id,
        config.runtime.events_kept,
    ));
    history.tell_sandbox("sandbox-started", None);
    let (events, told) = unbounded_channel();
    let pod = Pod {
        history: history.clone(),
        containers: BTreeMap::new(),
        ended: None,
        closing: false,
        events,
        pid: vm.pid(),
        extra: Extra::default(),
    };
    let inner = Arc::new(Inner {
        namespace: request.namespace.clone(),
        id: request.id.clone(),
        size: plan.size,
        console: console.clone(),
        history,
        volumes: Default::default(),
        watcher: Default::default(),
        verdict: OnceLock::new(),
        unanswered: AtomicU64::new(0),
        tasks: Mutex::default(),
        config,
        fault,
        directory,
        journal,
        vm,
        agent,
        streams: Streams::new(stream_listener),
        timeline,
        files,
        pod: Mutex::new(pod),
        extra: Semaphore::new(1),
        hooked: AtomicBool::new(hooked),
        _network: made,
        late: late.map(LateNetwork::new),
        closed: watch::Sender::new(None),
    });
    tokio::spawn(follow(inner.vm.ending(), Arc::downgrade(&inner), console));
    // Nobody connects to ports in the namespace of a container alone.
    let forwarded = netns.filter(|_| plan.of_pod || !plan.own_network);
    beside(&inner, operator, forwarded);
    Ok((Sandbox { inner }, told))
}

/// Begins what goes on for as long as the pod is there.
fn beside(inner: &Arc<Inner>, operator: Option<tokio::net::UnixListener>, netns: Option<PathBuf>) {
    let mut tasks = inner.tasks.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(listener) = operator {
        tasks.spawn(server::serve(listener, Arc::downgrade(inner)));
    }
    if let Some(netns) = netns {
        tasks.spawn(ports::serve(Arc::downgrade(inner), netns));
    }
    let agent = &inner.config.agent;
    if agent.health_interval_ms > 0 {
        let interval = Duration::from_millis(agent.health_interval_ms);
        tasks.spawn(watch_health(
            Arc::downgrade(inner),
            interval,
            agent.health_failures,
        ));
    }
}

/// Tells everybody when the machine has ended.
async fn follow(
    mut ending: watch::Receiver<Option<Ending>>,
    inner: Weak<Inner>,
    console: Arc<Console>,
) {
    let why = match ending.wait_for(Option::is_some).await {
        Ok(ending) => match ending.as_ref() {
            Some(ending) if !ending.is_orderly() => with_console(ending.to_string(), &console),
            Some(ending) => ending.to_string(),
            None => return,
        },
        Err(_) => return,
    };
    if let Some(inner) = inner.upgrade() {
        let why = match inner.verdict.get() {
            Some(verdict) => verdict.clone(),
            None => why,
        };
        let mut pod = inner.pod();
        if !pod.closing {
            tracing::error!(sandbox = inner.id, why, "virtual machine ended");
        }
        pod.machine_ended(why);
    }
}

/// Boots, and waits for the agent's call.
async fn ready(
    vm: &BulkheadVmm,
    machine: Machine,
    listener: &tokio::net::UnixListener,
    patience: Duration,
) -> Result<UnixStream, Error> {
    vm.boot(machine).await?;
    match timeout(patience, listener.accept()).await {
        Ok(call) => Ok(call.step(|| "take the agent's call")?.0),
        Err(_) => Err(Error::Timeout(format!(
            "the guest's agent did not call within {} ms (agent.ready_timeout_ms)",
            patience.as_millis()
        ))),
    }
}

/// Why the machine has ended, once it has; not before what it was asked last
/// has had its chance to fail with a better reason.
async fn ended(vm: &BulkheadVmm) -> String {
    let mut ending = vm.ending();
    let why = match ending.wait_for(Option::is_some).await {
        Ok(ending) => ending.as_ref().map(Ending::to_string),
        Err(_) => None,
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    why.unwrap_or_default()
}

/// Adds what the guest wrote last, if the machine is what failed.
fn last_words(error: Error, console: &Console) -> Error {
    match error {
        Error::VmEnded(why) => Error::VmEnded(with_console(why, console)),
        Error::Timeout(why) => Error::Timeout(with_console(why, console)),
        Error::Hypervisor(HypervisorError::Ended(ending)) => {
            Error::VmEnded(with_console(ending.to_string(), console))
        }
        other => other,
    }
}

fn with_console(why: String, console: &Console) -> String {
    let last = console.last_lines(CONSOLE_LINES);
    if last.is_empty() {
        why
    } else {
        format!("{why}; the guest's last lines: {last}")
    }
}
