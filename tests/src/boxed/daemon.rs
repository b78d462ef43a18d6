// SPDX-License-Identifier: Apache-2.0
//! A box that stays up between commands: a process that owns it and serves
//! others on a Unix socket.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::error::io_step;
use super::mux::Mux;
use super::{BoxError, KvmBox, Options, Ready};

/// Name of the box when none is given.
pub const DEFAULT_NAME: &str = "default";

/// The socket of the box `name`.
///
/// # Errors
/// When its directory cannot be made.
pub fn socket(name: &str) -> Result<PathBuf, BoxError> {
    let base = env::var_os("XDG_RUNTIME_DIR").filter(|v| !v.is_empty());
    let dir = base
        .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
        .join("bulkhead-box");
    fs::create_dir_all(&dir).map_err(io_step(format!("make {}", dir.display())))?;
    // Who can talk to a box reads all files as its owner does.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
        .map_err(io_step(format!("protect {}", dir.display())))?;
    Ok(dir.join(format!("{name}.sock")))
}

/// Connects to the box `name`.
///
/// # Errors
/// [`BoxError::NotUp`] when there is none.
pub fn connect(name: &str) -> Result<(Mux, Ready), BoxError> {
    let not_up = || BoxError::NotUp(name.to_owned());
    let stream = UnixStream::connect(socket(name)?).map_err(|_| not_up())?;
    let (mux, boot) = Mux::new(stream)?;
    let ready = boot.wait(Duration::from_secs(10)).ok_or_else(not_up)?;
    Ok((mux, ready))
}

/// Boots the box `name`, tells `up` when it is, and serves it until somebody
/// asks for its end or it ends by itself.
///
/// # Errors
/// [`BoxError::AlreadyUp`], and those of [`KvmBox::start`].
pub fn serve(name: &str, options: Options, up: impl FnOnce(&KvmBox)) -> Result<(), BoxError> {
    let path = socket(name)?;
    if UnixStream::connect(&path).is_ok() {
        return Err(BoxError::AlreadyUp(name.to_owned()));
    }
    let machine = Arc::new(KvmBox::start(options)?);
    // Nobody listens on it, so it was left behind by one that was killed.
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(io_step(format!("remove {}", path.display()))(e));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(&path).map_err(io_step(format!("listen on {}", path.display())))?;
    up(&machine);

    let (end, ended) = std::sync::mpsc::channel();
    {
        let (machine, end) = (Arc::clone(&machine), end.clone());
        thread::spawn(move || {
            while machine.ended_within(Duration::from_secs(3600)).is_none() {}
            // The receiver ends with the process.
            let _ = end.send(());
        });
    }
    {
        let machine = Arc::clone(&machine);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (machine, end) = (Arc::clone(&machine), end.clone());
                thread::spawn(move || {
                    if let Ok(true) = machine.mux().relay(stream, machine.ready()) {
                        let _ = end.send(());
                    }
                });
            }
        });
    }
    // An error would mean that all senders are gone, which is an end too.
    let _ = ended.recv();
    let _ = fs::remove_file(&path);
    machine.stop();
    Ok(())
}
