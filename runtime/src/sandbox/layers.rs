// SPDX-License-Identifier: Apache-2.0
//! Root file systems with other ids than are stored. A snapshotter may say that
//! a container with a user namespace is to see its files as its own (options
//! `uidmap` and `gidmap`, containerd 2). The layers of an overlay have those ids
//! then, which the kernel takes from mounts of theirs:
//!
//! ```text
//! <sandbox>/layers/<container>/<n>         while the overlay is being mounted
//! ```

use std::{fs, path::Path};

use super::rootfs;
use crate::{
    error::{Error, Step},
    resource::{
        idmap::{IdMapping, IdRange, Mapped},
        journal::{Journal, Resource},
        mount as mounts,
    },
};

/// Where mounts of a container's layers are, for a moment; not below what the
/// guest sees.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// The directory, which is made when it is needed.
    pub directory: &'a Path,
    /// Where that is written down.
    pub journal: &'a Journal,
}

impl Layers<'_> {
    /// Mounts an overlay over mounts of its lower directories that have the ids.
    /// The upper one is the container's, and has them on the disk.
    pub fn overlay(
        self,
        options: &[String],
        mapped: &Mapped,
        call: impl Fn(&str) -> std::io::Result<()> + Sync,
        failed: impl Fn(std::io::Error) -> Error,
    ) -> Result<(), Error> {
        const KEY: &str = "lowerdir=";
        let Some(lower) = options.iter().find_map(|option| option.strip_prefix(KEY)) else {
            return Err(Error::Invalid(
                "rootfs: uidmap of an overlay without a lowerdir".into(),
            ));
        };
        let Layers { directory, journal } = self;
        let path = directory.to_path_buf();
        let entry = journal
            .record(Resource::Directory { path })
            .step(|| "write the journal")?;
        let mounted = || -> Result<(), Error> {
            let made = fs::create_dir_all(directory);
            made.step(|| format!("create {}", directory.display()))?;
            let mut names = Vec::new();
            for (number, layer) in lower.split(':').enumerate() {
                let name = number.to_string();
                let target = directory.join(&name);
                rootfs::make_directory(&target)?;
                let kind = mounts::Kind {
                    read_only: true,
                    mapped: Some(mapped),
                    ..mounts::Kind::default()
                };
                mounts::again(Path::new(layer), &target, kind).map_err(&failed)?;
                names.push(name);
            }
            // From their directory they have short names, however many they are.
            let lower = format!("{KEY}{}", names.join(":"));
            let data: Vec<&str> = options
                .iter()
                .map(|option| match option.starts_with(KEY) {
                    true => lower.as_str(),
                    false => option.as_str(),
                })
                .collect();
            let data = data.join(",");
            if data.len() >= rootfs::OPTIONS_MAX {
                return Err(failed(std::io::ErrorKind::ArgumentListTooLong.into()));
            }
            rootfs::in_directory(directory, || call(&data)).map_err(&failed)
        };
        let outcome = mounted();
        // The overlay has mounts of its own, nowhere to be seen.
        mounts::remove_tree(directory)
            .step(|| format!("remove {}", directory.display()))
            .and_then(|()| journal.forget(entry).step(|| "write the journal"))
            .and(outcome)
    }
}

/// Takes the mapping out of a mount's options: `uidmap=` and `gidmap=`, each a
/// list of ranges `container:host:size` with commas between.
pub fn mapped(options: &mut Vec<String>) -> Result<Option<Mapped>, Error> {
    let mut take = |key: &str| {
        let place = options.iter().position(|option| option.starts_with(key))?;
        Some(options.remove(place).split_off(key.len()))
    };
    let (users, groups) = (take("uidmap="), take("gidmap="));
    let invalid = |why: String| Error::Invalid(format!("rootfs: {why}"));
    let (users, groups) = match (users, groups) {
        (None, None) => return Ok(None),
        (Some(users), Some(groups)) => (users, groups),
        _ => {
            return Err(invalid(
                "one of the options uidmap and gidmap is missing: give both".into(),
            ))
        }
    };
    let ranges = |key: &str, text: &str| {
        let list: Option<Vec<IdRange>> = text.split(',').map(range).collect();
        list.ok_or_else(|| {
            invalid(format!(
                "option {key}={text}: it should be like 0:100000:65536"
            ))
        })
    };
    let ids = IdMapping::new(ranges("uidmap", &users)?, ranges("gidmap", &groups)?)
        .map_err(|why| invalid(format!("options uidmap, gidmap: {why}")))?;
    Ok(Some(Mapped {
        ids,
        recursive: false,
    }))
}

fn range(text: &str) -> Option<IdRange> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let mut next = || numbers.next().flatten();
    let range = IdRange {
        stored: next()?,
        shown: next()?,
        size: next()?,
    };
    numbers.next().is_none().then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_among_the_options() {
        let taken = |options: &[&str]| {
            let mut options: Vec<String> = options.iter().map(|option| (*option).into()).collect();
            let mapped = mapped(&mut options).map_err(|error| error.to_string())?;
            Ok::<_, String>((options, mapped.map(|mapped| mapped.ids)))
        };
        let (left, ids) = taken(&[
            "index=off",
            "uidmap=0:7000:10,10:9:1",
            "gidmap=0:8000:10",
            "lowerdir=/a",
        ])
        .unwrap();
        assert_eq!(left, ["index=off", "lowerdir=/a"]);
        let ids = ids.unwrap();
        assert_eq!((ids.user(1), ids.user(10), ids.group(2)), (7001, 9, 8002));
        assert_eq!(taken(&["ro"]).unwrap(), (vec!["ro".into()], None));
        for (options, word) in [
            (&["uidmap=0:1:1"][..], "give both"),
            (&["uidmap=0:1", "gidmap=0:1:1"], "uidmap=0:1: it should"),
            (&["uidmap=0:1:1:1", "gidmap=0:1:1"], "uidmap=0:1:1:1"),
            (&["uidmap=0:1:1", "gidmap=0:-1:1"], "gidmap=0:-1:1"),
            (&["uidmap=0:1:0", "gidmap=0:1:1"], "users: a range"),
        ] {
            let why = taken(options).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }
}
