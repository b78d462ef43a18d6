// SPDX-License-Identifier: Apache-2.0
//! Changes of shared files that the guest has not made, for those who watch
//! them by inotify(7).
//!
//! Setting a file's time of modification is what the kernel tells watchers of
//! as a modification; both times, as a change of attributes. The VMM's file
//! server knows the time that is set here, and leaves the file as it is.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use bulkhead_agent_protocol::{agent, ANNOUNCED};
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{utimensat, UtimensatFlags};
use nix::sys::time::TimeSpec;

use crate::error::{AgentError, Context, Result};
use crate::sys::mount::open_in_root;

/// Most changes of one call.
const MOST: usize = 1024;

/// Announces changes below `shared`. What is not there any more, or cannot be
/// touched, is left out.
///
/// # Errors
/// Too many, a path that leads elsewhere, or no such directory.
pub fn announce(request: &agent::AnnounceRequest, shared: &Path) -> Result<()> {
    if request.changes.len() > MOST {
        return Err(AgentError::Invalid(format!(
            "changes: {}, at most {MOST} are possible",
            request.changes.len()
        )));
    }
    let root = File::open(shared).step(|| format!("open {}", shared.display()))?;
    for change in &request.changes {
        let path = Path::new(OsStr::from_bytes(&change.path));
        let normal = |part| matches!(part, Component::Normal(_));
        if change.path.is_empty() || !path.components().all(normal) {
            return Err(AgentError::Invalid(format!(
                "changes.path: {path:?} is not one below the shared directory"
            )));
        }
        // It has gone since, or is nothing that can be watched.
        let _ = touch(&root, path, change.attributes);
    }
    Ok(())
}

fn touch(root: &File, path: &Path, attributes: bool) -> nix::Result<()> {
    let file = open_in_root(root.as_fd(), path, libc::O_PATH | libc::O_NOFOLLOW, 0)?;
    let time = TimeSpec::new(ANNOUNCED.0, ANNOUNCED.1);
    let access = if attributes {
        time
    } else {
        TimeSpec::UTIME_OMIT
    };
    // A descriptor's link leads to the file itself, also to a symbolic link.
    let place = format!("/proc/self/fd/{}", file.as_raw_fd());
    utimensat(
        AT_FDCWD,
        place.as_str(),
        &access,
        &time,
        UtimensatFlags::FollowSymlink,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

    fn request(paths: &[(&[u8], bool)]) -> agent::AnnounceRequest {
        let change = |(path, attributes): &(&[u8], bool)| agent::Change {
            path: path.to_vec(),
            attributes: *attributes,
            ..Default::default()
        };
        agent::AnnounceRequest {
            changes: paths.iter().map(change).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn those_who_watch_are_told() {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("file"), "").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", volume.join("link")).unwrap();
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        let wanted = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB;
        inotify.add_watch(&volume, wanted).unwrap();
        let paths: [(&[u8], bool); 5] = [
            (b"volume/file", false),
            (b"volume/gone", false),
            (b"volume/file", true),
            (b"volume/link", true),
            (b"volume", false),
        ];
        announce(&request(&paths), root.path()).unwrap();
        let seen: Vec<_> = inotify
            .read_events()
            .unwrap()
            .into_iter()
            .map(|event| (event.mask & wanted, event.name))
            .collect();
        let wanted = [
            (AddWatchFlags::IN_MODIFY, Some("file".into())),
            (AddWatchFlags::IN_ATTRIB, Some("file".into())),
            (AddWatchFlags::IN_ATTRIB, Some("link".into())),
            (AddWatchFlags::IN_MODIFY, None),
        ];
        assert_eq!(seen, wanted);
    }

    #[test]
    fn paths_lead_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        for path in [&b"../x"[..], b"/etc/passwd", b"", b"a/../../b", b"./x"] {
            let error = announce(&request(&[(path, false)]), root.path()).unwrap_err();
            assert!(error.to_string().contains("changes.path"), "{error}");
        }
        let many = vec![(&b"x"[..], false); MOST + 1];
        let error = announce(&request(&many), root.path()).unwrap_err();
        assert!(error.to_string().contains("at most 1024"), "{error}");
    }
}
