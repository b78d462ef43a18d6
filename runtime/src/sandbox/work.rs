// SPDX-License-Identifier: Apache-2.0
//! What a further process of a container does, as its description says. A
//! description that containerd passes on has a type; those of this project are
//! JSON with a type of their own.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use bulkhead_agent_protocol::{agent, oci, CAPABILITIES, SHARED_MOUNT};
use oci_spec::runtime::Process;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Step},
    oci as specification,
};

/// Type of a [`GuestCommand`].
pub const GUEST_COMMAND: &str = "io.bulkhead.v1.GuestCommand";

/// Type of a [`FileCopy`].
pub const FILE_COPY: &str = "io.bulkhead.v1.FileCopy";

/// The program of `agent.debug_shell` in the shared directory. No container's
/// directory begins with a dot; busybox goes by the name that it is called by.
pub const DEBUG_SHELL: &str = ".debug/busybox";

/// What a further process does.
#[derive(Debug)]
pub enum Work {
    /// Runs a program in the container.
    Program(Box<Process>),
    /// Runs a command in the guest itself.
    Guest(GuestCommand),
    /// Copies a file of the container.
    Copy(FileCopy),
}

/// A command in the guest itself, by the program of `agent.debug_shell`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCommand {
    /// Arguments of that program.
    pub args: Vec<String>,
    /// Environment, besides PATH and HOME.
    #[serde(default)]
    pub env: Vec<String>,
    /// Columns and rows of its terminal.
    #[serde(default)]
    pub size: Option<(u16, u16)>,
}

/// One file on its way out of a container, or into it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileCopy {
    /// In the container, absolute.
    pub path: String,
    /// None: out of it.
    #[serde(default)]
    pub arriving: Option<Arriving>,
}

/// A file that goes into a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arriving {
    /// Its name, where the path is a directory.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner, in the container.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: i64,
}

/// Puts the program of `agent.debug_shell` into the shared directory: now, for
/// later that is the guest's to change.
///
/// # Errors
/// It cannot be copied.
pub fn give_debug_shell(program: &Path, shared: &Path) -> Result<(), Error> {
    if program.as_os_str().is_empty() {
        return Ok(());
    }
    let to = shared.join(DEBUG_SHELL);
    fs::create_dir_all(to.parent().unwrap_or(shared))
        .and_then(|()| fs::copy(program, &to))
        .and_then(|_| fs::set_permissions(&to, fs::Permissions::from_mode(0o700)))
        .step(|| format!("copy {} (agent.debug_shell)", program.display()))
}

/// The same in the agent's terms.
#[derive(Debug)]
pub enum Translated {
    Program(oci::Process),
    Guest(oci::Process),
    Copy(agent::CopyFileRequest),
}

impl Translated {
    /// Sets the size of its terminal.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        if let Self::Program(process) | Self::Guest(process) = self {
            let size = process.console_size.mut_or_insert_default();
            (size.width, size.height) = (columns.into(), rows.into());
        }
    }

    /// Translates. `debug_shell`: whether the guest has that program.
    ///
    /// # Errors
    /// What cannot be had, naming the field or the key.
    pub fn new(work: Work, terminal: bool, debug_shell: bool) -> Result<Self, Error> {
        Ok(match work {
            Work::Program(process) => {
                let mut process = specification::process(&process)?;
                process.terminal = terminal;
                Self::Program(process)
            }
            Work::Guest(_) if !debug_shell => {
                return Err(Error::Precondition(
                    "commands in the guest itself are not configured: set agent.debug_shell to a \
                     static program of the host (busybox) and start the pod again"
                        .into(),
                ))
            }
            Work::Guest(command) => Self::Guest(in_guest(command, terminal)),
            Work::Copy(_) if terminal => {
                return Err(Error::Precondition(
                    "a file cannot be copied by a terminal".into(),
                ))
            }
            Work::Copy(copy) => {
                let arriving = copy.arriving.map(|file| agent::ArrivingFile {
                    name: file.name,
                    size: file.size,
                    mode: file.mode,
                    uid: file.uid,
                    gid: file.gid,
                    modified_ns: file.modified_ns,
                    ..Default::default()
                });
                Self::Copy(agent::CopyFileRequest {
                    path: copy.path,
                    arriving: arriving.into(),
                    ..Default::default()
                })
            }
        })
    }
}

/// As the guest's root, with everything.
fn in_guest(command: GuestCommand, terminal: bool) -> oci::Process {
    let program = format!("{SHARED_MOUNT}/{DEBUG_SHELL}");
    let all = CAPABILITIES.map(String::from).to_vec();
    let usual = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/"].map(String::from);
    let size = command.size.map(|(columns, rows)| oci::Box {
        height: rows.into(),
        width: columns.into(),
        ..Default::default()
    });
    oci::Process {
        terminal,
        console_size: size.into(),
        args: [program].into_iter().chain(command.args).collect(),
        env: usual.into_iter().chain(command.env).collect(),
        cwd: "/".into(),
        capabilities: Some(oci::Capabilities {
            bounding: all.clone(),
            effective: all.clone(),
            permitted: all,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_in_the_guest_must_be_configured() {
        let command = GuestCommand {
            args: vec!["sh".into()],
            ..Default::default()
        };
        let error = Translated::new(Work::Guest(command.clone()), false, false).unwrap_err();
        assert!(error.to_string().contains("agent.debug_shell"), "{error}");
        let Translated::Guest(process) = Translated::new(Work::Guest(command), true, true).unwrap()
        else {
            panic!("not the guest's");
        };
        assert_eq!(process.args, ["/run/bulkhead/shared/.debug/busybox", "sh"]);
        assert!(process.terminal);
    }

    #[test]
    fn descriptions_are_strict() {
        let copy = r#"{"path":"/a","arriving":{"name":"b","size":1,"mode":420,"uid":0,"gid":0,"modified_ns":0}}"#;
        let copy: FileCopy = serde_json::from_str(copy).unwrap();
        assert_eq!(copy.arriving.unwrap().size, 1);
        assert!(serde_json::from_str::<FileCopy>(r#"{"path":"/a","x":1}"#).is_err());
    }
}
