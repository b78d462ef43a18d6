// SPDX-License-Identifier: Apache-2.0
//! `bulkhead cp`: one file, out of a container or into it. What comes out is
//! what a guest says it is: its size is compared, and set-uid bits are left.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use bulkhead_runtime::{
    config::Config,
    sandbox::{Arriving, FileCopy, FILE_COPY},
};
use clap::Args;

use crate::{
    exec::{described, Input, Session},
    exec_io::Sink,
    Failure,
};

/// Bytes before the contents of a file that comes out of a container.
const HEADER: usize = 24;

/// How much of what the guest says of a failure is told, in bytes.
const SAID: usize = 1024;

/// Arguments of `bulkhead cp`.
#[derive(Debug, Args)]
pub struct Copy {
    /// NAME:PATH of a file in a container, or a file here (written with / or ./
    /// in front where it has a colon)
    #[arg(value_name = "FROM")]
    from: String,
    /// Where it goes: a file or a directory here, or NAME:PATH
    #[arg(value_name = "TO")]
    to: String,
    /// Owner and group that it gets in the container
    #[arg(short, long, value_name = "UID[:GID]", value_parser = crate::exec::user, default_value = "0:0")]
    owner: (u32, u32),
}

/// The container and the path of `NAME:PATH`; none: a file here.
fn remote(text: &str) -> Option<(&str, &str)> {
    match text.starts_with(['/', '.']) {
        true => None,
        false => text.split_once(':'),
    }
}

impl Copy {
    /// Copies it.
    pub fn execute(&self, config: &Config) -> Result<(), Failure> {
        match (remote(&self.from), remote(&self.to)) {
            (Some((name, path)), None) => out(config, name, path, Path::new(&self.to)),
            (None, Some((name, path))) => self.into(config, Path::new(&self.from), name, path),
            (None, None) => Err(Failure::from(
                "one of FROM and TO must be NAME:PATH, a file in a container".to_owned(),
            )),
            (Some(_), Some(_)) => Err(Failure::from(
                "a file is not copied from container to container: copy it here first".to_owned(),
            )),
        }
    }

    fn into(&self, config: &Config, from: &Path, name: &str, path: &str) -> Result<(), Failure> {
        let opened = File::open(from).and_then(|file| Ok((file.metadata()?, file)));
        let (meta, file) = opened.map_err(|error| format!("open {}: {error}", from.display()))?;
        let own_name = from.file_name().and_then(|name| name.to_str());
        let (true, Some(own_name)) = (meta.is_file(), own_name) else {
            let why = "is no regular file with a name that is text";
            return Err(Failure::from(format!("{} {why}", from.display())));
        };
        let what = FileCopy {
            path: path.into(),
            arriving: Some(Arriving {
                name: own_name.into(),
                size: meta.len(),
                mode: meta.mode() & 0o7777,
                uid: self.owner.0,
                gid: self.owner.1,
                modified_ns: meta
                    .mtime()
                    .saturating_mul(1_000_000_000)
                    .saturating_add(meta.mtime_nsec()),
            }),
        };
        let limited = file.take(meta.len());
        let input = Input(Box::new(move || Box::new(limited)));
        run(config, name, &what, Some(input), Box::new(|_| Ok(())))
    }
}

fn out(config: &Config, name: &str, path: &str, to: &Path) -> Result<(), Failure> {
    let own_name = Path::new(path).file_name();
    let place = match (to.is_dir(), own_name) {
        (true, Some(name)) => to.join(name),
        (true, None) => return Err(Failure::from(format!("{path:?} is no file's name"))),
        (false, _) => to.to_owned(),
    };
    let parent = place
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let partial = Partial(parent.join(format!(".bulkhead-cp-{}", std::process::id())));
    let failed = |error: io::Error| format!("write {}: {error}", place.display());
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial.0)
        .map_err(failed)?;
    let taken = Arc::new(Mutex::new(Taken::to(file)));
    let sink = taken.clone();
    let what = FileCopy {
        path: path.into(),
        arriving: None,
    };
    let done = run(
        config,
        name,
        &what,
        None,
        Box::new(move |bytes| lock(&sink).take(bytes)),
    );
    let mut taken = lock(&taken);
    // A full disk here is why the guest could not go on.
    if let Some(error) = taken.failed.take() {
        return Err(Failure::from(failed(error)));
    }
    done?;
    taken.finish().map_err(failed)?;
    fs::rename(&partial.0, &place).map_err(failed)?;
    Ok(())
}

/// A file that is removed unless it was put in its place.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // It has its own name by now.
        let _ = fs::remove_file(&self.0);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has come of a file.
struct Taken {
    header: Vec<u8>,
    file: File,
    contents: u64,
    failed: Option<io::Error>,
}

impl Taken {
    fn to(file: File) -> Self {
        Self {
            header: Vec::with_capacity(HEADER),
            file,
            contents: 0,
            failed: None,
        }
    }

    fn number<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.header.get(at..at + N)?.try_into().ok()
    }

    fn size(&self) -> Option<u64> {
        self.number(0).map(u64::from_le_bytes)
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let done = self.put(bytes);
        if let Err(error) = &done {
            self.failed
                .get_or_insert_with(|| io::Error::new(error.kind(), error.to_string()));
        }
        done
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (head, rest) = bytes.split_at(bytes.len().min(HEADER - self.header.len()));
        self.header.extend(head);
        self.contents = self.contents.saturating_add(rest.len() as u64);
        if self.size().is_some_and(|size| self.contents > size) {
            return Err(io::Error::other(
                "the guest sent more than it had announced",
            ));
        }
        self.file.write_all(rest)
    }

    /// Gives the file its time and permissions, when it is whole.
    fn finish(&mut self) -> io::Result<()> {
        if self.size() != Some(self.contents) {
            return Err(io::Error::other(
                "the guest sent less than it had announced",
            ));
        }
        let mode = self.number(8).map_or(0, u32::from_le_bytes);
        let permissions = fs::Permissions::from_mode(mode & 0o777);
        self.file.set_permissions(permissions)?;
        let modified = self.number(16).map_or(0, i64::from_le_bytes);
        let since = Duration::from_nanos(u64::try_from(modified).unwrap_or(0));
        match UNIX_EPOCH.checked_add(since) {
            Some(modified) => self.file.set_modified(modified),
            None => Ok(()),
        }
    }
}

/// Has the container copy, and tells what it says went wrong.
fn run(
    config: &Config,
    name: &str,
    what: &FileCopy,
    input: Option<Input>,
    output: Sink,
) -> Result<(), Failure> {
    let session = Session::with(config, name, false)?;
    let text = serde_json::to_string(what).map_err(|error| error.to_string())?;
    let said = Arc::new(Mutex::new(Vec::new()));
    let errors = said.clone();
    let sink: Sink = Box::new(move |bytes| {
        let mut said = lock(&errors);
        let room = SAID.saturating_sub(said.len());
        said.extend(&bytes[..bytes.len().min(room)]);
        Ok(())
    });
    match session.run(described(FILE_COPY, text), input, [output, sink])? {
        0 => Ok(()),
        status => {
            let said = String::from_utf8_lossy(&lock(&said)).into_owned();
            // A terminal does not obey what a guest says.
            let said: String = said
                .trim_end()
                .chars()
                .filter(|c| !c.is_control())
                .collect();
            Err(Failure::from(match said.is_empty() {
                true => format!("the copying process in {name} ended with status {status}"),
                false => format!("{name}: {said}"),
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_from_files() {
        assert_eq!(remote("web:/etc/hosts"), Some(("web", "/etc/hosts")));
        assert_eq!(remote("k8s.io/web:/a:b"), Some(("k8s.io/web", "/a:b")));
        for here in ["/a:b", "./a:b", "../x", "name"] {
            assert_eq!(remote(here), None, "{here}");
        }
    }

    fn taken(parts: &[&[u8]]) -> (io::Result<()>, tempfile::NamedTempFile) {
        let place = tempfile::NamedTempFile::new().unwrap();
        let mut taken = Taken::to(place.reopen().unwrap());
        let done = parts.iter().try_for_each(|part| taken.take(part));
        (done.and_then(|()| taken.finish()), place)
    }

    fn header(size: u64, mode: u32) -> Vec<u8> {
        let mut header = size.to_le_bytes().to_vec();
        header.extend(mode.to_le_bytes());
        header.extend(0u32.to_le_bytes());
        header.extend(1_500_000_000_000_000_000i64.to_le_bytes());
        header
    }

    #[test]
    fn a_guest_sends_what_it_announces() {
        let head = header(5, 0o106755);
        let (done, place) = taken(&[&head[..7], &head[7..], b"he", b"llo"]);
        done.unwrap();
        assert_eq!(fs::read(place.path()).unwrap(), b"hello");
        let meta = place.path().metadata().unwrap();
        // Neither set-uid nor anything but permissions.
        assert_eq!(meta.mode() & 0o7777, 0o755);
        assert_eq!(meta.mtime(), 1_500_000_000);
        for parts in [
            &[&head[..], b"hell"][..],
            &[&head[..], b"hello!"],
            &[&head[..5]],
            &[],
        ] {
            assert!(taken(parts).0.is_err(), "{parts:?}");
        }
    }
}
