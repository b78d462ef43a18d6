// SPDX-License-Identifier: Apache-2.0
//! Docker's daemon and command line, with containers by their runtime's name.

use std::env;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context as _, Result};
use bulkhead_tests::listing::interface;
use bulkhead_tests::proc::{self, Done};
use bulkhead_tests::sys;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::context::{mentions, same, until, Context, Skip, LIMIT};
use crate::failure::unpacked;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![docker_runs_containers, docker_gives_containers_a_network];

/// Environment variable with a directory that has `dockerd` and `docker`.
const DOCKER: &str = "BULKHEAD_DOCKER";
/// The bridge that the daemon makes, with the daemon's own address.
const BRIDGE: &str = "docker0";
const ADDRESS: &str = "10.199.9.1/24";
/// How long something may take that needs no boot.
const PATIENCE: Duration = Duration::from_secs(90);

/// A daemon on the tests' containerd, in namespaces of its own there. Ends when
/// dropped.
struct Daemon {
    programs: PathBuf,
    dir: PathBuf,
    child: Child,
}

impl Daemon {
    /// Skips the test where there is none to start.
    fn start(context: &Context) -> Result<Self> {
        context.only_bulkhead()?;
        let Some(programs) = env::var_os(DOCKER).filter(|dir| !dir.is_empty()) else {
            let why = format!("{DOCKER} names no Docker (make test-docker builds one)");
            return Err(Skip(why).into());
        };
        let programs = PathBuf::from(programs);
        let dir = context.dir.join("docker");
        fs::create_dir_all(&dir)?;
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(programs.join("dockerd"));
        let containerd = context.containerd.socket();
        command
            .arg("--data-root")
            .arg(dir.join("data"))
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            .arg("--host")
            .arg(format!("unix://{}", dir.join("sock").display()))
            .arg("--containerd")
            .arg(containerd)
            .args(["--iptables=false", "--ip6tables=false"])
            .args(["--userland-proxy=false", "--bip", ADDRESS])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        sys::tie_to_this_thread(&mut command, Vec::new());
        let child = command.spawn().context("run dockerd")?;
        let mut daemon = Self {
            programs,
            dir,
            child,
        };
        let serves = daemon.wait_until_serving();
        serves.with_context(|| daemon.log())?;
        // As `docker run` finds it, without a registry.
        let root = unpacked(context)?;
        let image = daemon.dir.join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&root).arg("-cf").arg(&image).arg(".");
        proc::run(&mut tar, LIMIT)?.ok()?;
        let image = image.to_string_lossy();
        daemon.docker(&["import", &image, "box"])?.ok()?;
        Ok(daemon)
    }

    fn wait_until_serving(&mut self) -> Result<()> {
        let socket = self.dir.join("sock");
        until(PATIENCE, "dockerd", || {
            let ended = self.child.try_wait()?;
            ensure!(ended.is_none(), "dockerd has ended: {ended:?}");
            Ok(UnixStream::connect(&socket).is_ok())
        })?;
        until(PATIENCE, "dockerd's answer", || {
            Ok(self.docker(&["version"])?.code == 0)
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("docker"));
        let host = format!("unix://{}", self.dir.join("sock").display());
        command.env("DOCKER_CONFIG", &self.dir).args(["-H", &host]);
        command.args(args);
        command
    }

    fn docker(&self, args: &[&str]) -> Result<Done> {
        proc::run(&mut self.command(args), LIMIT)
    }

    /// Runs it to its end, which is a success; gives what it prints.
    fn ok(&self, args: &[&str]) -> Result<String> {
        let done = self.docker(args)?.ok();
        Ok(done.with_context(|| args.join(" "))?.out())
    }

    /// `docker run` with Bulkhead.
    fn run(&self, context: &Context, flags: &[&str], argv: &[&str]) -> Result<Done> {
        let mut args = vec!["run", "--runtime", &context.runtime];
        args.extend(flags);
        args.push("box");
        args.extend(argv);
        self.docker(&args)
    }

    fn stop(mut self) -> Result<()> {
        self.end();
        bulkhead_tests::containerd::remove_tree(&self.dir)?;
        if interface(BRIDGE) {
            let mut remove = Command::new("ip");
            proc::run(remove.args(["link", "del", BRIDGE]), LIMIT)?.ok()?;
        }
        Ok(())
    }

    fn end(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // It is not reaped yet, so the number is its.
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs a test with a daemon, whose log is told with what is wrong.
fn with_daemon(context: &Context, test: impl FnOnce(&Daemon) -> Result<()>) -> Result<()> {
    let daemon = Daemon::start(context)?;
    // With what stays: directories of Docker's namespace, and what it makes for
    // a container with the host's network, which this runtime refuses.
    let first = daemon.run(context, &["--rm"], &["true"])?.ok();
    first.with_context(|| daemon.log())?;
    daemon.run(context, &["--rm", "--network", "host"], &["true"])?;
    let before = context.listing()?;
    test(&daemon).with_context(|| daemon.log())?;
    context.nothing_left(&before, LIMIT)?;
    daemon.stop()
}

fn docker_runs_containers(context: &Context) -> Result<()> {
    with_daemon(context, |daemon| {
        let run = |flags: &[&str], argv: &[&str]| daemon.run(context, flags, argv);
        let done = run(
            &["--rm"],
            &["sh", "-c", "uname -r; echo to stderr >&2; exit 7"],
        )?;
        let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        same(done.code, 7).with_context(|| done.err())?;
        ensure!(done.out() != host.trim(), "the kernel is the host's");
        mentions(&done.err(), &["to stderr"])?;

        let volume = daemon.dir.join("volume");
        fs::create_dir_all(&volume)?;
        let bound = format!("{}:/data", volume.display());
        let flags = [
            "--rm",
            "-v",
            &bound,
            "--tmpfs",
            "/scratch:size=1m",
            "--user",
            "1000:1000",
            "--env",
            "NAME=value",
            "--workdir",
            "/tmp",
            "--hostname",
            "ship",
            "--memory",
            "64m",
            "--cpus",
            "0.5",
            "--read-only",
            "--init=false",
        ];
        fs::write(volume.join("file"), "in a volume\n")?;
        let script = "cat /data/file; busybox id -u; echo $NAME; busybox pwd; busybox hostname; \
            cat /sys/fs/cgroup/memory.max; cat /sys/fs/cgroup/cpu.max; \
            busybox touch /made 2>/dev/null || echo read-only";
        let out = run(&flags, &["sh", "-c", script])?.ok()?.out();
        let wanted = "in a volume\n1000\nvalue\n/tmp\nship\n67108864\n50000 100000\nread-only";
        same(out.as_str(), wanted)?;

        // One that goes on.
        let script =
            "trap 'echo bye; exit 3' TERM; echo begun; while :; do busybox sleep 0.1; done";
        run(&["-d", "--name", "long"], &["sh", "-c", script])?.ok()?;
        until(PATIENCE, "its output", || {
            Ok(daemon.ok(&["logs", "long"])?.contains("begun"))
        })?;
        same(
            daemon.ok(&["exec", "--env", "A=b", "long", "sh", "-c", "echo $A"])?,
            "b",
        )?;
        let failing = daemon.docker(&["exec", "long", "sh", "-c", "exit 9"])?;
        same(failing.code, 9)?;
        let mut cat = daemon.command(&["exec", "-i", "long", "cat"]);
        let echoed = proc::run_with(&mut cat, Some(b"to and fro".to_vec()), PATIENCE)?;
        same(echoed.ok()?.out(), "to and fro")?;
        let stats = ["stats", "--no-stream", "--format", "{{.PIDs}}", "long"];
        let pids: u32 = daemon.ok(&stats)?.parse().context("its processes")?;
        ensure!(pids > 0, "a container without processes");
        daemon.ok(&["pause", "long"])?;
        same(
            daemon.ok(&["inspect", "-f", "{{.State.Status}}", "long"])?,
            "paused",
        )?;
        daemon.ok(&["unpause", "long"])?;
        daemon.ok(&["update", "--memory", "80m", "--memory-swap", "80m", "long"])?;
        let limit = ["exec", "long", "cat", "/sys/fs/cgroup/memory.max"];
        same(daemon.ok(&limit)?, "83886080")?;
        let copied = daemon.dir.join("copied");
        daemon.ok(&["cp", "long:/etc/passwd", &copied.to_string_lossy()])?;
        mentions(&fs::read_to_string(&copied)?, &["root:x:0"])?;
        daemon.ok(&["stop", "--timeout", "60", "long"])?;
        same(
            daemon.ok(&["inspect", "-f", "{{.State.ExitCode}}", "long"])?,
            "3",
        )?;
        mentions(&daemon.ok(&["logs", "long"])?, &["bye"])?;
        // Again, by its name.
        daemon.ok(&["start", "long"])?;
        same(daemon.ok(&["exec", "long", "echo", "again"])?, "again")?;
        daemon.ok(&["rm", "-f", "long"]).map(drop)
    })
}

fn docker_gives_containers_a_network(context: &Context) -> Result<()> {
    with_daemon(context, |daemon| {
        let serve = "echo from the container >/tmp/page; busybox httpd -p 8080 -h /tmp; \
            echo serving; exec busybox sleep 7777";
        let flags = ["-d", "--name", "web"];
        daemon.run(context, &flags, &["sh", "-c", serve])?.ok()?;
        until(PATIENCE, "its output", || {
            Ok(daemon.ok(&["logs", "web"])?.contains("serving"))
        })?;
        let address = "{{.NetworkSettings.IPAddress}}";
        let address = daemon.ok(&["inspect", "-f", address, "web"])?;
        mentions(
            &daemon.ok(&["exec", "web", "busybox", "ip", "addr"])?,
            &[&address],
        )?;
        let url = format!("http://{address}:8080/page");
        let mut get = Command::new("busybox");
        let page = proc::run(get.args(["wget", "-q", "-O", "-", &url]), PATIENCE)?;
        same(
            page.ok().context("from the host")?.out(),
            "from the container",
        )?;
        // Another container, by its address and through one that it shares the
        // network namespace of.
        let other = ["busybox", "wget", "-q", "-O", "-", &url];
        let done = daemon.run(context, &["--rm"], &other)?.ok();
        same(done.context("from another")?.out(), "from the container")?;
        let none = daemon.run(
            context,
            &["--rm", "--network", "none"],
            &["busybox", "ip", "-o", "link"],
        )?;
        let links = none.ok().context("without a network")?.out();
        ensure!(
            !links.contains("eth0"),
            "an interface without a network: {links}"
        );
        let host = daemon.run(context, &["--rm", "--network", "host"], &["true"])?;
        ensure!(host.code != 0, "the host's network");
        mentions(&host.err(), &["a microVM has a network stack of its own"])?;
        daemon.ok(&["rm", "-f", "web"]).map(drop)
    })
}
