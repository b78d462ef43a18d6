// SPDX-License-Identifier: Apache-2.0
//! This process's own standard streams and terminal.

use std::{
    io::{stdin, stdout, IsTerminal},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{fstat, open, FileType, Mode, OFlags},
    termios::{tcgetattr, tcgetwinsize, tcsetattr, OptionalActions, Termios},
};

/// A standard stream for the runtime. Pipes and terminals are opened anew:
/// what the runtime sets on a descriptor (non-blocking) would be set for
/// whoever else has it too, the shell for one.
///
/// # Errors
/// When there are no descriptors left.
pub fn stream(fd: BorrowedFd<'_>, write: bool) -> std::io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
    if matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        let access = if write {
            OFlags::WRONLY
        } else {
            OFlags::RDONLY
        };
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(opened) = open(path, flags, Mode::empty()) {
            return Ok(opened);
        }
    }
    // Sockets cannot be; files need not.
    fd.try_clone_to_owned()
}

/// The terminal in raw mode, until dropped.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// None: standard input is no terminal.
    ///
    /// # Errors
    /// When the mode cannot be set.
    pub fn enter() -> std::io::Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Columns and rows of the terminal, if there is one.
pub fn size() -> Option<(u16, u16)> {
    let out = stdout();
    let input = stdin();
    let size = tcgetwinsize(out.as_fd())
        .or_else(|_| tcgetwinsize(input.as_fd()))
        .ok()?;
    (size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}
