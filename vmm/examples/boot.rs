// SPDX-License-Identifier: Apache-2.0
//! Boots a kernel and shows its console: for debugging a guest by hand.
//!
//!     boot --kernel vmlinux [--initrd FILE] [--image FILE] [--share DIR] [--vsock PATH] [--memory MIB] [--vcpus N] -- CMDLINE
//!
//! Runs the `bulkhead-vmm` beside it (in `..`), prints the events, and exits
//! with the VMM's code.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use anyhow::{bail, Context, Result};
use bulkhead_vmm_api::{
    Call, Channel, ChannelError, DeviceConfigs, FromVmm, FsCache, FsConfig, KernelConfig, Outcome,
    Pages, PmemConfig, Request, VmConfig, VsockConfig,
};

fn main() -> Result<()> {
    let mut fds: Vec<OwnedFd> = vec![std::io::stdout().as_fd().try_clone_to_owned()?];
    let mut config = VmConfig {
        vcpus: 1,
        memory_mib: 256,
        pages: Pages::Small,
        merge_group: None,
        kernel: KernelConfig {
            image: 0,
            cmdline: String::new(),
            initrd: None,
        },
        serial: Some(0),
        devices: DeviceConfigs::default(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--" {
            config.kernel.cmdline = words.by_ref().collect::<Vec<_>>().join(" ");
            break;
        }
        let value = words
            .next()
            .with_context(|| format!("{word} needs a value"))?;
        let open = |path: &str| -> Result<OwnedFd> {
            Ok(File::open(path).with_context(|| path.to_owned())?.into())
        };
        let index = fds.len() as u32;
        match word.as_str() {
            "--kernel" => {
                fds.push(open(&value)?);
                config.kernel.image = index;
            }
            "--initrd" => {
                fds.push(open(&value)?);
                config.kernel.initrd = Some(index);
            }
            "--image" => {
                fds.push(open(&value)?);
                config.devices.pmem.push(PmemConfig {
                    id: "image".into(),
                    file: index,
                    read_only: true,
                });
            }
            "--share" => {
                fds.push(open(&value)?);
                config.devices.fs.push(FsConfig {
                    tag: "shared".into(),
                    directory: index,
                    cache: FsCache::Auto,
                    dax_mib: 0,
                    host_locks: false,
                });
            }
            "--vsock" => {
                let listener = std::os::unix::net::UnixListener::bind(&value)?;
                fds.push(listener.into());
                config.devices.vsock = Some(VsockConfig {
                    cid: 3,
                    listener: Some(index),
                    uds_path: value,
                    ready_port: Some(1024),
                });
            }
            "--memory" => config.memory_mib = value.parse()?,
            "--vcpus" => config.vcpus = value.parse()?,
            _ => bail!("{word} is not known"),
        }
    }
    let (ours, theirs) = Channel::pair()?;
    let vmm = std::env::current_exe()?
        .parent()
        .and_then(|dir| dir.parent())
        .context("where is the VMM?")?
        .join("bulkhead-vmm");
    let number = theirs.as_raw_fd();
    let mut command = Command::new(&vmm);
    command.args(["--control-fd", &number.to_string()]);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // The descriptor must survive the exec.
            if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().with_context(|| vmm.display().to_string())?;
    drop(theirs);
    let passed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    ours.send(
        &Request {
            id: 1,
            call: Call::Configure(Box::new(config)),
        },
        &passed,
    )?;
    ours.send(
        &Request {
            id: 2,
            call: Call::Boot,
        },
        &[],
    )?;
    loop {
        match ours.receive::<FromVmm>() {
            Ok((FromVmm::Reply(reply), _)) => {
                if let Outcome::Failed(failure) = reply.outcome {
                    bail!("{}", failure.message);
                }
            }
            Ok((FromVmm::Event(event), _)) => eprintln!("event: {event:?}"),
            Err(ChannelError::Closed) => break,
            Err(error) => return Err(error.into()),
        }
    }
    std::process::exit(child.wait()?.code().unwrap_or(255));
}
