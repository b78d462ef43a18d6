// SPDX-License-Identifier: Apache-2.0
//! What the guest knows and has opened.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::fs::{statx, AtFlags, Statx, StatxFlags};

use super::{locks::Held, Handle, ROOT};

/// What a file of the host is told apart by: its file system, its number there, and
/// by which mount it is seen. What lies below a mount can differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    device: u64,
    number: u64,
    mount: u64,
}

/// A file that the guest knows.
pub struct Inode {
    /// `O_PATH`, but for the root, which is as it was given.
    pub fd: Arc<OwnedFd>,
    identity: Identity,
    /// S_IFMT of its mode.
    pub kind: u32,
}

impl Inode {
    /// The file system that it lies in.
    pub fn device(&self) -> u64 {
        self.identity.device
    }
}

/// With how often the guest was told of it.
struct Known {
    inode: Arc<Inode>,
    lookups: u64,
}

/// All inodes and handles.
pub struct Table {
    inodes: HashMap<u64, Known>,
    numbers: HashMap<Identity, u64>,
    handles: HashMap<u64, Handle>,
    /// Record locks, by inode and owner.
    pub locks: HashMap<(u64, u64), Held>,
    next_inode: u64,
    next_handle: u64,
    /// Most of all of these together.
    room: usize,
}

/// All that there is to know of a descriptor's file.
pub fn status(fd: impl AsFd) -> io::Result<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    Ok(statx(fd, c"", flags, wanted)?)
}

/// The inode of a descriptor.
pub fn inode(fd: Arc<OwnedFd>) -> io::Result<Inode> {
    let status = status(&fd)?;
    Ok(inode_with(fd, &status))
}

/// As [`inode`], of which the status is known.
pub fn inode_with(fd: Arc<OwnedFd>, status: &Statx) -> Inode {
    Inode {
        fd,
        identity: identity(status),
        kind: u32::from(status.stx_mode) & libc::S_IFMT,
    }
}

fn identity(status: &Statx) -> Identity {
    Identity {
        device: libc::makedev(status.stx_dev_major, status.stx_dev_minor),
        number: status.stx_ino,
        mount: status.stx_mnt_id,
    }
}

fn unknown() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

impl Table {
    /// Nothing but the root.
    pub fn new(root: Inode, room: usize) -> Self {
        let mut this = Self {
            inodes: HashMap::new(),
            numbers: HashMap::new(),
            handles: HashMap::new(),
            locks: HashMap::new(),
            next_inode: ROOT + 1,
            next_handle: 1,
            room,
        };
        this.put_root(root);
        this
    }

    /// Leaves nothing but the root. Numbers are not used again.
    pub fn clear(&mut self, root: Inode) {
        self.inodes = HashMap::new();
        self.numbers = HashMap::new();
        self.handles = HashMap::new();
        self.locks = HashMap::new();
        self.put_root(root);
    }

    fn put_root(&mut self, root: Inode) {
        self.numbers.insert(root.identity, ROOT);
        let inode = Arc::new(root);
        self.inodes.insert(ROOT, Known { inode, lookups: 1 });
    }

    /// Whether one more descriptor is let in.
    pub fn check_room(&self) -> io::Result<()> {
        if self.inodes.len() + self.handles.len() + self.locks.len() < self.room {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::ENFILE))
    }

    /// An inode that the guest knows.
    ///
    /// # Errors
    /// It does not (EBADF).
    pub fn inode(&self, number: u64) -> io::Result<Arc<Inode>> {
        let known = self.inodes.get(&number).ok_or_else(unknown)?;
        Ok(Arc::clone(&known.inode))
    }

    /// The number under which the guest is told of a file once more.
    ///
    /// # Errors
    /// It does not know it yet, and knows too many.
    pub fn tell(&mut self, fd: OwnedFd, status: &Statx) -> io::Result<u64> {
        if let Some(number) = self.numbers.get(&identity(status)) {
            if let Some(known) = self.inodes.get_mut(number) {
                known.lookups = known.lookups.saturating_add(1);
                return Ok(*number);
            }
        }
        self.check_room()?;
        let inode = Arc::new(inode_with(Arc::new(fd), status));
        let number = self.next_inode;
        self.next_inode += 1;
        self.numbers.insert(inode.identity, number);
        self.inodes.insert(number, Known { inode, lookups: 1 });
        Ok(number)
    }

    /// The guest forgets that it was told so often.
    pub fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        let Some(known) = self.inodes.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            self.numbers.remove(&known.inode.identity);
            self.inodes.remove(&number);
        }
    }

    /// Adds a handle; its number.
    ///
    /// # Errors
    /// There are too many.
    pub fn open(&mut self, handle: Handle) -> io::Result<u64> {
        self.check_room()?;
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, handle);
        Ok(number)
    }

    /// An inode's handle.
    ///
    /// # Errors
    /// There is none, or it is another's (EBADF).
    pub fn handle(&mut self, number: u64, inode: u64) -> io::Result<&mut Handle> {
        let handle = self.handles.get_mut(&number);
        handle
            .filter(|handle| handle.inode == inode)
            .ok_or_else(unknown)
    }

    /// Closes an inode's handle, with the locks that came by it.
    ///
    /// # Errors
    /// As of [`Self::handle`].
    pub fn close(&mut self, number: u64, inode: u64) -> io::Result<()> {
        self.handle(number, inode)?;
        self.handles.remove(&number);
        self.locks.retain(|_, held| held.via != number);
        Ok(())
    }
}
