// SPDX-License-Identifier: Apache-2.0
//! `bulkhead exec`: a further process in a container that containerd runs, as
//! a client of its shim's task service.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_runtime::{
    clock,
    config::Config,
    error::chain,
    sandbox::{GuestCommand, GUEST_COMMAND},
};
use bulkhead_shim_protocol::{
    shim::{
        CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest,
        StartRequest, WaitRequest, WaitResponse,
    },
    shim_ttrpc::TaskClient,
};
use clap::Args;
use protobuf::{well_known_types::any::Any, MessageField};
use serde_json::{json, Value};
use tokio::{
    net::UnixStream,
    sync::mpsc::{channel, Receiver},
    time::timeout,
};
use ttrpc::{
    asynchronous::{transport::Socket, Client},
    context::{self, Context},
};

use crate::{
    exec_io::{ours, Copied, Fifos, Sink},
    find, terminal, Failure,
};

/// How long the shim may take to answer a call.
const CALL: Duration = Duration::from_secs(10);

/// How long it may take to run the process, and to deliver what it has
/// written.
const LONG: Duration = Duration::from_secs(60);

/// Type of the process's description.
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// Arguments of `bulkhead exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// Give the command a terminal, and standard input
    #[arg(short, long)]
    tty: bool,
    /// Give the command standard input
    #[arg(short, long)]
    interactive: bool,
    /// Set an environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory [default: the container's]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Run the command in the guest itself, outside of its containers: by the
    /// program of agent.debug_shell, with CMD as its arguments
    #[arg(long, conflicts_with_all = ["cwd", "user"])]
    guest: bool,
    /// User and group ids [default: the container's]
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    user: Option<(u32, u32)>,
    /// Name of the container, or of a sandbox with one; a beginning will do
    #[arg(value_name = "NAME")]
    name: String,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub fn user(text: &str) -> Result<(u32, u32), String> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let number = |text: &str| {
        text.parse()
            .map_err(|_| format!("{text:?} is not a number"))
    };
    Ok((number(uid)?, number(gid)?))
}

fn limit(limit: Duration) -> Context {
    context::with_timeout(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX))
}

/// A call with a deadline of our own, for a shim that does not even read.
async fn call<T>(
    what: &str,
    patience: Duration,
    request: impl std::future::Future<Output = ttrpc::Result<T>>,
) -> Result<T, String> {
    match timeout(patience + Duration::from_secs(1), request).await {
        Ok(answer) => answer.map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => status.message,
            other => format!("{what}: {}", chain(&other)),
        }),
        Err(_) => Err(format!(
            "{what}: the shim did not answer within {} s",
            patience.as_secs()
        )),
    }
}

impl Exec {
    /// Runs it; returns the command's exit status.
    pub fn execute(&self, config: &Config) -> Result<u32, Failure> {
        if let Some(bad) = self.env.iter().find(|entry| !entry.contains('=')) {
            return Err(Failure::from(format!("--env {bad}: write NAME=VALUE")));
        }
        let session = Session::with(config, &self.name, self.tty)?;
        let (kind, text) = match self.guest {
            true => (GUEST_COMMAND, json!(self.guest_command()).to_string()),
            false => (PROCESS, self.process(&session.bundle)?.to_string()),
        };
        let input = (self.tty || self.interactive).then(|| Input(Box::new(stdin)));
        Ok(session.run(described(kind, text), input, ours())?)
    }

    fn guest_command(&self) -> GuestCommand {
        GuestCommand {
            args: self.command.clone(),
            env: self.environment(),
            size: match self.tty {
                true => terminal::size(),
                false => None,
            },
        }
    }

    /// What is added to the environment.
    fn environment(&self) -> Vec<String> {
        let term = std::env::var("TERM").ok().filter(|_| self.tty);
        let term = term.map(|term| format!("TERM={term}"));
        term.into_iter().chain(self.env.clone()).collect()
    }

    /// The container's own process, with this command.
    fn process(&self, bundle: &Path) -> Result<Value, String> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(|error| format!("read {}: {error}", path.display()))?;
        let spec: Value = serde_json::from_slice(&text)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(self.changed(spec["process"].clone()))
    }

    fn changed(&self, mut process: Value) -> Value {
        process["args"] = json!(self.command);
        process["terminal"] = json!(self.tty);
        if let Some(cwd) = &self.cwd {
            process["cwd"] = json!(cwd);
        }
        if let Some((uid, gid)) = self.user {
            process["user"] = json!({"uid": uid, "gid": gid});
        }
        let env = self.environment();
        let mut all: Vec<Value> = process["env"].as_array().cloned().unwrap_or_default();
        for entry in env {
            let name = entry.split('=').next().unwrap_or_default();
            let begin = format!("{name}=");
            all.retain(|old| !old.as_str().is_some_and(|old| old.starts_with(&begin)));
            all.push(Value::String(entry));
        }
        process["env"] = Value::Array(all);
        if let (true, Some((width, height))) = (self.tty, terminal::size()) {
            process["consoleSize"] = json!({"width": width, "height": height});
        }
        process
    }
}

/// The description of a further process.
pub fn described(kind: &str, text: String) -> Any {
    Any {
        type_url: kind.into(),
        value: text.into_bytes(),
        ..Default::default()
    }
}

/// What opens a process's standard input, on a thread of its own.
pub struct Input(pub Box<dyn FnOnce() -> Box<dyn Read + Send> + Send>);

/// One process, from the description of it to its end.
pub struct Session {
    id: String,
    exec_id: String,
    tty: bool,
    socket: PathBuf,
    directory: PathBuf,
    bundle: PathBuf,
}

impl Session {
    /// With the container that `name` means.
    ///
    /// # Errors
    /// There is none, or it takes no further processes.
    pub fn with(config: &Config, name: &str, tty: bool) -> Result<Self, Failure> {
        let (found, container) = find::container(config, name)?;
        let Some(socket) = found.task_socket else {
            return Err(Failure::from(format!(
                "{} was started by bulkhead run, which takes no further commands",
                container.id
            )));
        };
        let exec_id = format!("bulkhead-{}-{}", std::process::id(), clock::monotonic_us());
        Ok(Self {
            directory: config.runtime.state_dir.join(&exec_id),
            id: container.id,
            exec_id,
            tty,
            socket,
            bundle: container.bundle,
        })
    }

    /// Runs what is described to its end. Gives its exit status.
    ///
    /// # Errors
    /// It cannot be run, or its end is not known.
    pub fn run(self, what: Any, input: Option<Input>, sinks: [Sink; 2]) -> Result<u32, String> {
        let fifos = Fifos::create(&self.directory, self.tty)
            .map_err(|error| format!("make FIFOs in {}: {error}", self.directory.display()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("start the event loop: {error}"))?;
        let result = runtime.block_on(self.go(what, input, fifos, sinks));
        // Reading standard input may still block a thread.
        runtime.shutdown_background();
        result
    }

    async fn go(
        self,
        what: Any,
        given: Option<Input>,
        fifos: Fifos,
        sinks: [Sink; 2],
    ) -> Result<u32, String> {
        let socket = &self.socket;
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| format!("connect to the shim at {}: {error}", socket.display()))?;
        let client = TaskClient::new(Client::new(Socket::new(stream)));
        let name = |path: &Option<PathBuf>| {
            path.as_ref()
                .map_or_else(String::new, |path| path.to_string_lossy().into_owned())
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            terminal: self.tty,
            stdin: match given {
                Some(_) => name(&Some(fifos.stdin.clone())),
                None => String::new(),
            },
            stdout: name(&Some(fifos.stdout.clone())),
            stderr: name(&fifos.stderr),
            spec: MessageField::some(what),
            ..Default::default()
        };
        // Read ends first: whoever writes is not kept waiting.
        let copied =
            Copied::begin(&fifos, sinks).map_err(|error| format!("open FIFOs: {error}"))?;
        call(
            "describe the process",
            CALL,
            client.exec(limit(CALL), &request),
        )
        .await?;
        let status = self.follow(&client, &fifos, given, copied).await;
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        };
        let deleted = call(
            "forget the process",
            LONG,
            client.delete(limit(LONG), &request),
        );
        if let Err(error) = deleted.await {
            tracing::error!(error, "process");
        }
        status
    }

    async fn follow(
        &self,
        client: &TaskClient,
        fifos: &Fifos,
        given: Option<Input>,
        copied: Copied,
    ) -> Result<u32, String> {
        let mut input = match given {
            Some(_) => Some(
                fifos
                    .input()
                    .map_err(|error| format!("open standard input: {error}"))?,
            ),
            None => None,
        };
        let raw = match self.tty {
            true => {
                terminal::Raw::enter().map_err(|error| format!("set the terminal up: {error}"))?
            }
            false => None,
        };
        let mut signals =
            super::signals::Signals::take().map_err(|error| format!("watch signals: {error}"))?;
        let start = StartRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        };
        call("run the process", LONG, client.start(limit(LONG), &start)).await?;
        let wait = WaitRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            ..Default::default()
        };
        // As long as it runs; a shim that dies closes the connection.
        let ended = client.wait(Context::default(), &wait);
        tokio::pin!(ended);
        let mut typed = given.map(read_input);
        let status = loop {
            tokio::select! {
                answer = &mut ended => break end_of(answer),
                bytes = next(&mut typed), if input.is_some() => match bytes {
                    Some(bytes) => {
                        if let Some(input) = &mut input {
                            tokio::select! {
                                _ = input.write(&bytes) => {}
                                // It reads no more, and the FIFO is full.
                                answer = &mut ended => break end_of(answer),
                            }
                        }
                    }
                    None => {
                        input = None;
                        self.close_input(client).await;
                    }
                },
                number = signals.next() => self.signal(client, number).await,
            }
        };
        drop(raw);
        // All of it is in the FIFOs now, or about to be.
        copied.end(LONG).await;
        status
    }

    async fn close_input(&self, client: &TaskClient) {
        let request = CloseIORequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            stdin: true,
            ..Default::default()
        };
        // It may just have ended.
        let _ = call(
            "close its input",
            CALL,
            client.close_io(limit(CALL), &request),
        )
        .await;
    }

    /// Passes a signal on; none: the terminal has another size.
    async fn signal(&self, client: &TaskClient, number: Option<u32>) {
        // It may just have ended, in either case.
        let Some(signal) = number else {
            if let (true, Some((width, height))) = (self.tty, terminal::size()) {
                let request = ResizePtyRequest {
                    id: self.id.clone(),
                    exec_id: self.exec_id.clone(),
                    width: width.into(),
                    height: height.into(),
                    ..Default::default()
                };
                let _ = call("resize", CALL, client.resize_pty(limit(CALL), &request)).await;
            }
            return;
        };
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            signal,
            ..Default::default()
        };
        let _ = call("signal it", CALL, client.kill(limit(CALL), &request)).await;
    }
}

/// The exit status in the shim's answer.
fn end_of(answer: ttrpc::Result<WaitResponse>) -> Result<u32, String> {
    answer
        .map(|answer| answer.exit_status)
        .map_err(|error| format!("wait for the process: {}", chain(&error)))
}

async fn next(typed: &mut Option<Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match typed {
        Some(typed) => typed.recv().await,
        None => None,
    }
}

/// Our own.
fn stdin() -> Box<dyn Read + Send> {
    Box::new(std::io::stdin())
}

/// Input, read by a thread: it may be anything.
fn read_input(input: Input) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel(4);
    std::thread::spawn(move || {
        let mut from = input.0();
        let mut part = vec![0; 16 * 1024];
        while let Ok(count) = from.read(&mut part) {
            if count == 0 || sender.blocking_send(part[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec() -> Exec {
        Exec {
            tty: false,
            interactive: false,
            env: vec!["A=2".into(), "B=3".into()],
            cwd: Some("/tmp".into()),
            guest: false,
            user: Some((7, 8)),
            name: "x".into(),
            command: vec!["id".into()],
        }
    }

    #[test]
    fn a_process_is_the_containers_with_another_command() {
        let own = json!({"args": ["sh"], "env": ["A=1", "AB=1"], "cwd": "/", "terminal": true,
            "user": {"uid": 0, "gid": 0, "additionalGids": [1]}, "noNewPrivileges": true});
        let process = exec().changed(own);
        assert_eq!(process["args"], json!(["id"]));
        assert_eq!(process["env"], json!(["AB=1", "A=2", "B=3"]));
        assert_eq!(process["cwd"], "/tmp");
        assert_eq!(process["user"], json!({"uid": 7, "gid": 8}));
        assert_eq!(process["terminal"], false);
        assert_eq!(process["noNewPrivileges"], true);
    }

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("5").unwrap(), (5, 0));
        assert_eq!(user("5:6").unwrap(), (5, 6));
        assert!(user("root")
            .unwrap_err()
            .contains("\"root\" is not a number"));
    }
}
