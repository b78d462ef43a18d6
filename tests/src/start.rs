// SPDX-License-Identifier: Apache-2.0
//! The two ways in which a test's machine comes to be: it boots, or it goes on
//! where another one, of another VMM, was saved.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_agent_protocol::agent::Empty;

use crate::guest::Guest;
use crate::install::Products;
use crate::vmm::{Size, Vmm};

/// How a machine comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It boots.
    Cold,
    /// It is made of a snapshot.
    Restored,
}

/// Guests that were booted and saved for others to go on with, one of each size
/// that is asked for.
pub struct Saved {
    dir: PathBuf,
    limit: Duration,
    sizes: RefCell<Vec<Size>>,
}

impl Saved {
    /// None yet; they are kept below `dir`. No step of saving one may take
    /// longer than `limit`.
    pub fn new(dir: PathBuf, limit: Duration) -> Self {
        Self {
            dir,
            limit,
            sizes: RefCell::default(),
        }
    }

    /// The files with the state and the memory of one.
    fn of(&self, products: &Products, size: Size) -> Result<(PathBuf, PathBuf)> {
        let mut sizes = self.sizes.borrow_mut();
        let known = sizes.iter().position(|other| *other == size);
        let number = known.unwrap_or(sizes.len());
        let place = self.dir.join(number.to_string());
        let files = (place.join("state"), place.join("memory"));
        if known.is_none() {
            save(products, size, &place, &files, self.limit).context("save a guest")?;
            sizes.push(size);
        }
        Ok(files)
    }
}

fn save(
    products: &Products,
    size: Size,
    place: &Path,
    (state, memory): &(PathBuf, PathBuf),
    limit: Duration,
) -> Result<()> {
    if place.exists() {
        // Of a test that has failed here.
        fs::remove_dir_all(place)?;
    }
    let mut guest = Guest::up(products, place, limit, |vmm| {
        vmm.boot_sized(products, place, size)?;
        vmm.wait_ready()
    })?;
    // Only then does it know that its call has arrived.
    guest.wait_for(guest.agent().check(Empty::new()))?;
    guest.vmm().snapshot(state, memory)
}

impl Start {
    /// Brings up a machine of this size, whose directory is `dir`, until its
    /// agent has called.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn bring_up(
        self,
        vmm: &mut Vmm,
        saved: &Saved,
        products: &Products,
        dir: &Path,
        size: Size,
    ) -> Result<()> {
        match self {
            Self::Cold => {
                vmm.boot_sized(products, dir, size)?;
                vmm.wait_ready()
            }
            Self::Restored => {
                let (state, memory) = saved.of(products, size)?;
                vmm.clone_with(&state, &memory, products, dir, |devices, _| {
                    size.apply(devices);
                })?;
                vmm.wait_clone()
            }
        }
    }
}
