// SPDX-License-Identifier: Apache-2.0
//! Standard input and output of the program: pipes, or a terminal from the
//! container's own devpts.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{fchown, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::path::make_file;
use super::report::{send_terminal, At, Done, Failure};
use crate::container::plan::ProcessPlan;
use crate::stdio::ChildEnds;
use crate::sys::fd::dup_onto;
use crate::sys::mount::{attach, clone_tree};
use crate::sys::tty;

/// Puts the program's descriptors 0, 1 and 2 in place. `console`: show the
/// terminal as /dev/console (a container's first process only).
pub fn set_up(
    plan: &ProcessPlan,
    ends: &ChildEnds,
    channel: BorrowedFd<'_>,
    console: bool,
) -> Done<()> {
    match ends {
        ChildEnds::Terminal => terminal(plan, channel, console)?,
        ChildEnds::Pipes(_) => pipes(ends)?,
    }
    give_to_user(plan)
}

/// Puts pipes in the places of descriptors 0, 1 and 2; /dev/null where there
/// is none.
pub fn pipes(ends: &ChildEnds) -> Done<()> {
    let ChildEnds::Pipes(ends) = ends else {
        return Err(Failure::invalid("there is a terminal instead of pipes"));
    };
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .at("open", "/dev/null")?;
    for (number, end) in ends.iter().enumerate() {
        let from = end.as_ref().map_or(null.as_raw_fd(), AsRawFd::as_raw_fd);
        dup_onto(from, number as i32).at("set up standard stream", "")?;
    }
    Ok(())
}

fn terminal(plan: &ProcessPlan, channel: BorrowedFd<'_>, console: bool) -> Done<()> {
    let path = Path::new("/dev/ptmx");
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .at("open", path)?;
    let (slave, _) = tty::open_slave(master.as_fd()).at("open terminal of", path)?;
    if let Some((rows, columns)) = plan.console_size {
        tty::set_size(master.as_fd(), rows, columns).at("set size of", "terminal")?;
    }
    if console {
        show_as_console(&slave)?;
    }
    send_terminal(channel, master.as_fd()).at("hand over", "terminal")?;
    tty::make_controlling(slave.as_fd()).at("take", "terminal")?;
    for number in 0..3 {
        dup_onto(slave.as_raw_fd(), number).at("set up standard stream", "")?;
    }
    Ok(())
}

fn show_as_console(slave: &OwnedFd) -> Done<()> {
    let path = Path::new("/dev/console");
    let slash = File::open("/").at("open", "/")?;
    let place = make_file(slash.as_fd(), path, 0o620)?;
    let kind = File::from(place.try_clone().at("open", path)?)
        .metadata()
        .at("inspect", path)?
        .file_type();
    if !kind.is_file() && !kind.is_char_device() {
        return Err(Failure::invalid("/dev/console of the container is no file"));
    }
    let tree = clone_tree(slave.as_fd(), Path::new(""), false).at("bind terminal to", path)?;
    attach(tree.as_fd(), place.as_fd()).at("bind terminal to", path)?;
    Ok(())
}

/// The program must be able to open /dev/stdout and its like again, so they
/// are its user's.
fn give_to_user(plan: &ProcessPlan) -> Done<()> {
    const NULL: u64 = libc::makedev(1, 3);
    for number in 0..3 {
        let stream = super::standard(number);
        let file = File::from(
            stream
                .try_clone_to_owned()
                .at("inspect", "standard stream")?,
        );
        let meta = file.metadata().at("inspect", "standard stream")?;
        if meta.rdev() == NULL || meta.uid() == plan.uid {
            continue;
        }
        // The group of a terminal is tty's and stays so.
        match fchown(&file, Some(plan.uid), None) {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::EPERM | libc::EROFS | libc::EINVAL)
                ) =>
            {
                return Err(error).at("give to user", "standard stream");
            }
            _ => {}
        }
    }
    Ok(())
}
