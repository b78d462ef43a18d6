// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-box`: the KVM host in a box, from the command line.
#![forbid(unsafe_code)]

use std::env;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{self, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use bulkhead_tests::boxed::daemon::{self, DEFAULT_NAME};
use bulkhead_tests::boxed::{
    fetch_kernel, BoxError, Command, Event, Flavour, KvmBox, Mux, Options,
};
use bulkhead_tests::{kvm_create_vm, window_size};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg, Termios};

const USAGE: &str = "\
The KVM host in a box: an emulated machine with SVM that shares this machine's files.

  bulkhead-box run [OPTIONS] -- CMD...     boot, run CMD, end
  bulkhead-box shell [OPTIONS]             a shell; in a fresh box unless NAME is up
  bulkhead-box up [OPTIONS]                boot and stay
  bulkhead-box exec [OPTIONS] -- CMD...    run CMD in a box that is up
  bulkhead-box status [--name NAME]        whether it is up
  bulkhead-box down [--name NAME]          end it
  bulkhead-box fetch                       only fetch the box's kernel
  bulkhead-box kvm                         make a VM here, in a box or not

  --name NAME        which box (default: default)
  --timeout SECONDS  kill CMD after so long and exit with 124
  --tty              run CMD on a terminal
  --env NAME=VALUE   set in CMD's environment (repeatable)
  --cwd DIR          CMD's working directory (default: the present one)
  --hot PATH         read PATH from a disk image, not over 9p (repeatable)
  --tmpfs DIR        put a tmpfs on DIR (repeatable)
  --memory MIB       the box's memory (default 6144, at most half of the host's)
  --cpus N           its processors (default 1; with more, VMs side by side break)
  --virtual-time     one processor whose clock counts instructions
";

#[derive(Default)]
struct Arguments {
    verb: String,
    name: String,
    timeout: Option<Duration>,
    tty: bool,
    env: Vec<(String, String)>,
    cwd: Option<String>,
    options: Options,
    /// The options for the box as they were given, for `up` to pass on.
    raw: Vec<String>,
    command: Vec<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let mut args = Arguments {
        verb: words.next().unwrap_or_default(),
        name: DEFAULT_NAME.into(),
        ..Arguments::default()
    };
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--name" => args.name = value()?,
            "--timeout" => {
                let seconds: f64 = value()?.parse().context("--timeout wants seconds")?;
                let limit = Duration::try_from_secs_f64(seconds).context("--timeout")?;
                args.timeout = Some(limit);
            }
            "--tty" => args.tty = true,
            "--env" => {
                let pair = value()?;
                let (name, value) = pair.split_once('=').context("--env wants NAME=VALUE")?;
                args.env.push((name.into(), value.into()));
            }
            "--cwd" => args.cwd = Some(value()?),
            "--hot" | "--tmpfs" | "--memory" | "--cpus" => {
                let value = value()?;
                let options = &mut args.options;
                match word.as_str() {
                    "--hot" => options.hot.push(PathBuf::from(&value)),
                    "--tmpfs" => options.tmpfs.push(PathBuf::from(&value)),
                    "--memory" => {
                        options.memory_mib = value.parse().context("--memory wants MiB")?
                    }
                    _ => options.cpus = value.parse().context("--cpus wants a number")?,
                }
                args.raw.extend([word, value]);
            }
            "--virtual-time" => {
                args.options.virtual_time = true;
                args.raw.push(word);
            }
            "--" => {
                args.command = words.collect();
                break;
            }
            _ => bail!("what is {word}?\n\n{USAGE}"),
        }
    }
    Ok(args)
}

fn main() {
    match parse(env::args().skip(1)).and_then(dispatch) {
        Ok(status) => process::exit(status),
        Err(error) => {
            eprintln!("bulkhead-box: {error:#}");
            process::exit(125);
        }
    }
}

fn dispatch(mut args: Arguments) -> Result<i32> {
    match args.verb.as_str() {
        "up" => up(&args),
        "serve" => serve(args),
        "fetch" => {
            let kernel = fetch_kernel(Flavour::Generic)?;
            println!("{} {}", kernel.release, kernel.image.display());
            Ok(0)
        }
        "status" => match daemon::connect(&args.name) {
            Ok((_, ready)) => {
                println!("{}: up, kernel {}", args.name, ready.release);
                Ok(0)
            }
            Err(BoxError::NotUp(name)) => {
                println!("{name}: not up");
                Ok(1)
            }
            Err(error) => Err(error.into()),
        },
        "down" => {
            let (mux, _) = daemon::connect(&args.name)?;
            mux.power_off()?;
            while daemon::connect(&args.name).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
            Ok(0)
        }
        "exec" => {
            let (mux, _) = daemon::connect(&args.name)?;
            attend(&mux, &args)
        }
        "shell" => {
            args.tty = io::stdin().is_terminal();
            if args.command.is_empty() {
                args.command = vec!["bash".into()];
            }
            match daemon::connect(&args.name) {
                Ok((mux, _)) => attend(&mux, &args),
                Err(BoxError::NotUp(_)) => run(args),
                Err(error) => Err(error.into()),
            }
        }
        "run" => run(args),
        "kvm" => {
            let kvm = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .context("open /dev/kvm")?;
            let version = kvm_create_vm(&kvm).context("make a VM")?;
            println!("KVM API {version}, a VM can be made");
            Ok(0)
        }
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            Ok(0)
        }
        _ => bail!("no such command\n\n{USAGE}"),
    }
}

fn run(mut args: Arguments) -> Result<i32> {
    if args.command.is_empty() {
        bail!("nothing to run\n\n{USAGE}");
    }
    let machine = KvmBox::start(std::mem::take(&mut args.options))?;
    attend(machine.mux(), &args).map_err(|error| match error.downcast::<BoxError>() {
        Ok(error) => machine.explain(error).into(),
        Err(other) => other,
    })
}

/// Starts a process that holds the box, and waits until it is up.
fn up(args: &Arguments) -> Result<i32> {
    let mut child = process::Command::new(env::current_exe()?)
        .args(["serve", "--name", &args.name])
        .args(&args.raw)
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the box's process")?;
    let mut line = String::new();
    let mut stdout = child.stdout.take().context("its output is missing")?;
    stdout
        .read_to_string(&mut line)
        .context("wait for the box")?;
    if line.is_empty() {
        // It has said why on standard error.
        child.wait()?;
        return Ok(125);
    }
    print!("{line}");
    Ok(0)
}

/// The process that holds the box.
fn serve(args: Arguments) -> Result<i32> {
    let name = args.name.clone();
    daemon::serve(&args.name, args.options, |machine| {
        println!(
            "{name}: up after {:.1} s, kernel {}",
            machine.boot_time().as_secs_f64(),
            machine.ready().release
        );
        // Whoever waits for the line waits for its end; from here on nobody
        // may hear this process.
        if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
            let _ = io::stdout().flush();
            let _ = nix::unistd::dup2_stdout(&null);
            let _ = nix::unistd::dup2_stderr(&null);
        }
    })?;
    Ok(0)
}

/// Keeps the terminal raw until dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may have gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

fn environment(args: &Arguments) -> Vec<(String, String)> {
    let passed = |name: &str| {
        ["PATH", "HOME", "TERM", "LANG", "RUST_BACKTRACE"].contains(&name)
            || name.starts_with("BULKHEAD_")
    };
    let mut env: Vec<_> = env::vars().filter(|(name, _)| passed(name)).collect();
    env.extend(args.env.iter().cloned());
    env
}

/// The present directory, unless the box has memory there.
fn present_dir() -> String {
    let dir = env::current_dir().map_or_else(|_| "/".into(), |d| d.to_string_lossy().into_owned());
    let hidden = ["/tmp", "/run", "/proc", "/sys", "/dev"];
    if hidden.iter().any(|h| dir.starts_with(h)) {
        return "/".into();
    }
    dir
}

/// Runs the command with this process's standard streams.
fn attend(mux: &Mux, args: &Arguments) -> Result<i32> {
    if args.command.is_empty() {
        bail!("nothing to run\n\n{USAGE}");
    }
    let mut command = Command::new(args.command.clone())
        .envs(environment(args))
        .cwd(args.cwd.clone().unwrap_or_else(present_dir))
        .piped();
    if let Some(limit) = args.timeout {
        command = command.timeout(limit);
    }
    let mut winch = SigSet::empty();
    winch.add(Signal::SIGWINCH);
    let raw = if args.tty {
        winch.thread_block().context("block SIGWINCH")?;
        let (rows, cols) = window_size(io::stdin().as_fd()).unwrap_or((24, 80));
        command = command.tty(rows, cols);
        Raw::enter()
    } else {
        None
    };
    let mut session = command.spawn(mux)?;
    let input = session.input();
    thread::spawn(move || {
        let mut buf = [0; 16 << 10];
        let mut stdin = io::stdin().lock();
        while let Ok(n @ 1..) = stdin.read(&mut buf) {
            if input.write(&buf[..n]).is_err() {
                return;
            }
        }
        // The command may have ended first.
        let _ = input.close();
    });
    if raw.is_some() {
        let input = session.input();
        thread::spawn(move || {
            while winch.wait().is_ok() {
                if let Some((rows, cols)) = window_size(io::stdin().as_fd()) {
                    let _ = input.resize(rows, cols);
                }
            }
        });
    }
    let exit = loop {
        match session.next_event()? {
            Event::Stdout(data) => put(&mut io::stdout().lock(), &data)?,
            Event::Stderr(data) => put(&mut io::stderr().lock(), &data)?,
            Event::Exit(exit) => break exit,
        }
    };
    drop(raw);
    if let (true, Some(limit)) = (exit.timed_out, args.timeout) {
        eprintln!("bulkhead-box: killed after its time limit of {limit:?}");
    }
    Ok(exit.status())
}

fn put(stream: &mut impl Write, data: &[u8]) -> Result<()> {
    stream
        .write_all(data)
        .and_then(|()| stream.flush())
        .context("pass the output on")
}
