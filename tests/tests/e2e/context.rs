// SPDX-License-Identifier: Apache-2.0
//! What every test works with.

use std::cell::{Cell, OnceCell};
use std::env;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context as _, Result};
use bulkhead_agent_protocol::SHARED_TAG;
use bulkhead_tests::containerd::{remove_tree, Containerd, BULKHEAD};
use bulkhead_tests::cri::{self, Cri};
use bulkhead_tests::guest::Guest;
use bulkhead_tests::install::{Config, Products};
use bulkhead_tests::listing::Listing;
use bulkhead_tests::proc::{self, Done};
use bulkhead_tests::start::{Saved, Start};
use bulkhead_tests::vmm::{Size, Vmm};
use bulkhead_tests::{image, inside};

/// How long one command of ctr may take; a guest boots in it.
pub const LIMIT: Duration = Duration::from_secs(300);

/// The runtime under test.
pub fn runtime() -> String {
    env::var("BULKHEAD_TEST_RUNTIME").unwrap_or_else(|_| BULKHEAD.into())
}

/// A test that cannot run here, and why.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// One containerd with Bulkhead configured and the images imported.
pub struct Context {
    /// The containerd.
    pub containerd: Containerd,
    /// The runtime's name.
    pub runtime: String,
    /// The build products.
    pub products: Products,
    /// A directory for the tests.
    pub dir: PathBuf,
    /// Bulkhead's configuration as it should be.
    pub config: Config,
    /// Whether a VMM is to be killed for a call that is forbidden to it.
    pub forbidden_call: Cell<bool>,
    counter: AtomicU32,
    cri: OnceCell<Cri>,
    saved: Saved,
}

impl Context {
    /// Starts containerd and imports the images.
    pub fn start() -> Result<Self> {
        let products = Products::find()?;
        let dir = inside::work_dir("bh-e2e");
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let mut config = products.config(&dir.join("state"));
        config.guest_console = Some(dir.join("console-"));
        config.merge_groups = vec!["red".into(), "blue".into()];
        config.write(&dir.join("config.toml"))?;
        let containerd = Containerd::start(
            &dir.join("c"),
            &products.bin_dir(),
            &dir.join("config.toml"),
        )?;
        containerd.import(&image::cached()?)?;
        let saved = Saved::new(dir.join("saved"), LIMIT);
        Ok(Self {
            containerd,
            runtime: runtime(),
            products,
            dir,
            config,
            forbidden_call: Cell::new(false),
            counter: AtomicU32::new(0),
            cri: OnceCell::new(),
            saved,
        })
    }

    /// Ends it and removes everything.
    pub fn stop(mut self) -> Result<()> {
        if let Some(cri) = self.cri.take() {
            cri.stop()?;
        }
        self.containerd.stop()?;
        remove_tree(&self.dir)
    }

    /// A containerd for pods, beside the other one; started when it is first
    /// asked for. Skips the test where its tools could not be built.
    pub fn cri(&self) -> Result<&Cri> {
        if let Some(cri) = self.cri.get() {
            return Ok(cri);
        }
        let tools = cri::plugins().and_then(|()| self.products.cri_tool("crictl"));
        if let Err(missing) = tools {
            return Err(Skip(format!("{missing:#}")).into());
        }
        let config = self.dir.join("config.toml");
        let cri = Cri::start(&self.dir.join("k"), &self.products, &config, &self.runtime)?;
        Ok(self.cri.get_or_init(|| cri))
    }

    /// Ends the test unless it runs with Bulkhead.
    pub fn only_bulkhead(&self) -> Result<()> {
        if self.runtime != BULKHEAD {
            return Err(Skip(format!("it is about Bulkhead, not {}", self.runtime)).into());
        }
        Ok(())
    }

    /// Brings up a machine of this size in a VMM that has none yet, without the
    /// runtime, until its agent has called.
    pub fn bring_up(&self, start: Start, vmm: &mut Vmm, dir: &Path, size: Size) -> Result<()> {
        start.bring_up(vmm, &self.saved, &self.products, dir, size)
    }

    /// A guest of this size in a directory of its own, without the runtime.
    pub fn guest(&self, start: Start, name: &str, size: Size) -> Result<Guest> {
        let guest = self.guest_to_save(start, name, size)?;
        guest.set_up(SHARED_TAG)?;
        Ok(guest)
    }

    /// As [`Self::guest`], when its agent has called: it has to be set up.
    pub fn guest_to_save(&self, start: Start, name: &str, size: Size) -> Result<Guest> {
        self.only_bulkhead()?;
        let dir = self.dir.join(self.id(name));
        Guest::up(&self.products, &dir, LIMIT, |vmm| {
            self.bring_up(start, vmm, &dir, size)
        })
    }

    /// A name that no container has had.
    pub fn id(&self, what: &str) -> String {
        let n = self.counter.fetch_add(1, Ordering::Relaxed);
        format!("{what}-{n}")
    }

    /// `ctr run` with the root image.
    pub fn run_command(&self, flags: &[&str], id: &str, argv: &[&str]) -> Command {
        let mut command = self.containerd.run(&self.runtime, flags);
        command.args([image::ROOT_IMAGE, id]).args(argv);
        command
    }

    /// `ctr run --rm` of a command to its end.
    pub fn run(&self, flags: &[&str], argv: &[&str]) -> Result<Done> {
        let id = self.id("run");
        let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
        proc::run(&mut self.run_command(&flags, &id, argv), LIMIT)
    }

    /// `ctr run --rm` of a shell script to its end.
    pub fn sh(&self, script: &str) -> Result<Done> {
        self.run(&[], &["sh", "-c", script])
    }

    /// Any other command of ctr.
    pub fn ctr(&self, args: &[&str]) -> Result<Done> {
        proc::run(self.containerd.ctr().args(args), LIMIT)
    }

    /// A container that runs on by itself. Dropping it removes it.
    pub fn detached(&self, flags: &[&str], argv: &[&str]) -> Result<Detached<'_>> {
        let id = self.id("bg");
        let flags: Vec<&str> = ["-d", "--null-io"].iter().chain(flags).copied().collect();
        proc::run(&mut self.run_command(&flags, &id, argv), LIMIT)?
            .ok()
            .context("start a container")?;
        Ok(Detached { context: self, id })
    }

    /// As [`Context::detached`], of the specification in this file.
    pub fn detached_spec(&self, id: &str, spec: &Path) -> Result<Detached<'_>> {
        let flags = ["-d", "--null-io", "--config"];
        let mut command = self.containerd.run(&self.runtime, &flags);
        proc::run(command.arg(spec).arg(id), LIMIT)?
            .ok()
            .context("start a container")?;
        Ok(Detached {
            context: self,
            id: id.into(),
        })
    }

    /// A `ctr run --rm` in the background with its output in files.
    pub fn attached(&self, flags: &[&str], argv: &[&str]) -> Result<Attached> {
        self.attached_with(Stdio::null(), flags, argv)
    }

    /// As [`Context::attached`], with this standard input.
    pub fn attached_with(&self, stdin: Stdio, flags: &[&str], argv: &[&str]) -> Result<Attached> {
        let id = self.id("fg");
        let out = self.dir.join(format!("{id}.out"));
        let err = self.dir.join(format!("{id}.err"));
        let flags: Vec<&str> = ["--rm"].iter().chain(flags).copied().collect();
        let child = self
            .run_command(&flags, &id, argv)
            .stdin(stdin)
            .stdout(File::create(&out)?)
            .stderr(File::create(&err)?)
            .spawn()
            .context("run ctr")?;
        Ok(Attached {
            id,
            child,
            out,
            err,
        })
    }

    /// Where containers can leave something.
    pub fn places(&self) -> Vec<PathBuf> {
        let c = self.containerd.dir();
        vec![
            c.join("state"),
            c.join("root/io.containerd.runtime.v2.task"),
            self.config.state_dir.clone(),
            PathBuf::from("/run/containerd/s"),
            PathBuf::from("/run/containerd/fifo"),
        ]
    }

    /// Takes a listing after a first container has come and gone, so that what
    /// is made once and for all is in it.
    pub fn listing(&self) -> Result<Listing> {
        self.sh("exit 0")?.ok().context("the first container")?;
        self.containerd.clean()?;
        // What a shim does after it has answered the last call.
        thread::sleep(Duration::from_millis(1500));
        Ok(Listing::take(&self.places()))
    }

    /// Fails if anything is new since `before` and stays.
    pub fn nothing_left(&self, before: &Listing, limit: Duration) -> Result<()> {
        let left = Listing::left_since(before, &self.places(), limit);
        if !left.is_empty() {
            bail!("left behind:\n  {}", left.join("\n  "));
        }
        Ok(())
    }
}

/// A container in the background.
pub struct Detached<'a> {
    context: &'a Context,
    /// Its name.
    pub id: String,
}

impl Detached<'_> {
    /// Runs another process in it.
    pub fn exec(&self, argv: &[&str]) -> Result<Done> {
        let exec = self.context.id("exec");
        let mut args = vec!["task", "exec", "--exec-id", &exec, &self.id];
        args.extend(argv);
        self.context.ctr(&args)
    }

    /// What `ctr task ls` says of it.
    pub fn status(&self) -> Result<String> {
        status(self.context, &self.id)
    }

    /// Waits until its status is `wanted`.
    pub fn wait_for(&self, wanted: &str, limit: Duration) -> Result<()> {
        until(limit, &format!("{} to be {wanted}", self.id), || {
            Ok(self.status()? == wanted)
        })
    }

    /// Kills it, deletes its task and removes it, and checks each.
    pub fn remove(self) -> Result<()> {
        let id = self.id.clone();
        self.context.ctr(&["task", "kill", "-s", "KILL", &id])?;
        self.wait_for("STOPPED", LIMIT)?;
        self.context.ctr(&["task", "delete", &id])?;
        self.context
            .ctr(&["container", "delete", &id])?
            .ok()
            .context("delete the container")?;
        Ok(())
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        // After `remove` there is nothing to do; after an error this is best
        // effort, and the runner looks for what is left.
        let _ = self.context.ctr(&["task", "delete", "-f", &self.id]);
        let _ = self.context.ctr(&["container", "delete", &self.id]);
    }
}

/// What `ctr task ls` says of a container; empty when it has no task.
pub fn status(context: &Context, id: &str) -> Result<String> {
    let list = context.ctr(&["task", "ls"])?.ok()?.out();
    Ok(list
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then(|| words.last().unwrap_or_default().to_owned())
        })
        .next()
        .unwrap_or_default())
}

/// A `ctr run` in the background.
pub struct Attached {
    /// The container's name.
    pub id: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Attached {
    /// The way into its standard input.
    pub fn stdin(&mut self) -> Result<ChildStdin> {
        self.child.stdin.take().context("it has no input")
    }

    /// Its standard output so far.
    pub fn out(&self) -> String {
        read(&self.out)
    }

    /// Its standard error so far.
    pub fn err(&self) -> String {
        read(&self.err)
    }

    /// Waits until it has printed `words`.
    pub fn wait_for(&mut self, words: &str) -> Result<()> {
        let begin = Instant::now();
        while !self.out().contains(words) {
            if let Some(status) = self.child.try_wait()? {
                // It may have printed them right before.
                if !self.out().contains(words) {
                    bail!("it ended ({status}): {:?} {:?}", self.out(), self.err());
                }
            }
            if begin.elapsed() > LIMIT {
                bail!("no {words:?} in {:?} {:?}", self.out(), self.err());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits for its end; gives the exit code.
    pub fn wait(&mut self, limit: Duration) -> Result<i32> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(proc::code_of(status));
            }
            if begin.elapsed() > limit {
                bail!("it still runs after {limit:?}: {:?}", self.out());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // After an error; the runner removes the container.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::remove_file(&self.out);
        let _ = fs::remove_file(&self.err);
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Waits until `check` holds.
pub fn until(limit: Duration, what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    while !check()? {
        if begin.elapsed() > limit {
            bail!("waited {limit:?} for {what}");
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Fails with both values unless they are equal.
pub fn same<A: PartialEq<B> + fmt::Debug, B: fmt::Debug>(got: A, want: B) -> Result<()> {
    if got != want {
        bail!("got {got:?}, want {want:?}");
    }
    Ok(())
}

/// Fails unless `text` contains one of `words`.
pub fn mentions(text: &str, words: &[&str]) -> Result<()> {
    let low = text.to_lowercase();
    if !words.iter().any(|w| low.contains(&w.to_lowercase())) {
        bail!("none of {words:?} in {text:?}");
    }
    Ok(())
}
