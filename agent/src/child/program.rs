// SPDX-License-Identifier: Apache-2.0
//! The last steps before the program runs: user, capabilities, working
//! directory, environment, and finding the program itself.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::sched_setaffinity;
use nix::sys::stat::{umask, Mode};
use nix::unistd::{chdir, faccessat, getcwd, setresgid, setresuid, AccessFlags, Gid, Pid, Uid};

use super::report::{send_listener, At, Done, Failure};
use crate::container::limits;
use crate::container::plan::{Capabilities, ProcessPlan};
use crate::seccomp::Filter;
use crate::sys::fd::cloexec_from_three;
use crate::sys::process::{self, CapSets};

/// Where programs are looked for when the environment does not say it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Linux's last capability is far below this.
const MOST_CAPABILITIES: u64 = 64;

/// The program as execve(2) takes it.
pub struct Program {
    path: CString,
    env: Vec<CString>,
}

/// Scheduling, limits and the like: what needs privileges the program may not
/// have. In a user namespace the agent does the most of it.
pub fn limit(plan: &ProcessPlan, own_user_namespace: bool) -> Done<()> {
    if let Some(set) = &plan.affinity {
        match sched_setaffinity(Pid::from_raw(0), set) {
            Err(Errno::EINVAL) => {
                return Err(Failure::invalid(
                    "process.execCPUAffinity: the container has none of these processors",
                ))
            }
            other => other.at("set CPU affinity", "")?,
        }
    }
    if let Some(persona) = plan.personality {
        process::personality(persona).at("set personality", "")?;
    }
    if own_user_namespace {
        return Ok(());
    }
    limits::apply(plan, 0).map_err(|(step, errno)| Failure::step(&step, Path::new(""), errno))
}

/// Becomes root of a user namespace, who is nobody in particular outside.
pub fn become_its_root() -> Done<()> {
    let (gid, uid) = (Gid::from_raw(0), Uid::from_raw(0));
    setresgid(gid, gid, gid).at("become root of the user namespace", "")?;
    process::setgroups(&[]).at("become root of the user namespace", "")?;
    setresuid(uid, uid, uid).at("become root of the user namespace", "")
}

/// Becomes the program's user with its capabilities, in its directory, and
/// finds the program. The seccomp filter goes in on the way: before the
/// privileges that installing it needs are gone, or last of all.
pub fn become_user(
    plan: &ProcessPlan,
    seccomp: Option<&Filter>,
    channel: BorrowedFd<'_>,
) -> Done<Program> {
    // Now: the profile need not allow it later.
    cloexec_from_three().at("close descriptors", "")?;
    if plan.no_new_privileges {
        process::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).at("set no_new_privs", "")?;
    } else if let Some(filter) = seccomp {
        install(filter, channel)?;
    }
    // Only the user may be let into the directory, or only root.
    let early = chdir(&plan.cwd);
    if !matches!(early, Ok(()) | Err(Errno::EACCES | Errno::EPERM)) {
        early.at("change directory to", &plan.cwd)?;
    }
    // A kernel may have fewer than the specification names.
    let available = process::permitted_capabilities().at("read capabilities", "")?;
    drop_bounding(plan.capabilities.bounding)?;
    process::prctl(libc::PR_SET_KEEPCAPS, 1).at("keep capabilities", "")?;
    process::setgroups(&plan.groups).at("set supplementary groups", "")?;
    let gid = Gid::from_raw(plan.gid);
    setresgid(gid, gid, gid).at("set group", "")?;
    let uid = Uid::from_raw(plan.uid);
    setresuid(uid, uid, uid).at("set user", "")?;
    if early.is_err() {
        chdir(&plan.cwd).at("change directory to", &plan.cwd)?;
    }
    check_cwd(&plan.cwd)?;
    process::prctl(libc::PR_SET_KEEPCAPS, 0).at("keep capabilities", "")?;
    set_capabilities(&plan.capabilities, available)?;
    umask(Mode::from_bits_retain(plan.umask));
    let env = environment(plan);
    let path = find(plan, &env)?;
    if plan.no_new_privileges {
        if let Some(filter) = seccomp {
            install(filter, channel)?;
        }
    }
    Ok(Program { path, env })
}

/// Installs a filter, and tells the agent of its listener: from here on calls
/// may wait for that one's word.
fn install(filter: &Filter, channel: BorrowedFd<'_>) -> Done<()> {
    let listener = filter.install().at("install seccomp filter", "")?;
    match listener {
        // It stays open until the program is executed: the agent takes it before.
        Some(fd) => send_listener(channel, fd.into_raw_fd()).at("tell of seccomp listener", ""),
        None => Ok(()),
    }
}

impl Program {
    /// Its environment.
    pub fn env(&self) -> &[CString] {
        &self.env
    }

    /// Runs the program; returns only to say why it cannot.
    pub fn execute(&self, plan: &ProcessPlan) -> Failure {
        let errno = process::execve(&self.path, &plan.args, &self.env);
        Failure::invalid(format!(
            "exec {}: {}",
            self.path.to_string_lossy(),
            message(errno)
        ))
    }
}

/// The usual lower-case words for what can be wrong with a program: clients
/// look for them.
fn message(errno: Errno) -> String {
    match errno {
        Errno::ENOENT => "no such file or directory".into(),
        Errno::EACCES => "permission denied".into(),
        Errno::ENOEXEC => "exec format error".into(),
        Errno::EISDIR => "is a directory".into(),
        other => other.desc().to_lowercase(),
    }
}

/// A working directory outside the root (of a descriptor that leaked in)
/// must never be entered.
fn check_cwd(cwd: &Path) -> Done<()> {
    let now = getcwd().at("check directory", cwd)?;
    if now.is_absolute() {
        Ok(())
    } else {
        Err(Failure::invalid(format!(
            "process.cwd: {} is outside of the container",
            cwd.display()
        )))
    }
}

fn drop_bounding(keep: u64) -> Done<()> {
    for number in 0..MOST_CAPABILITIES {
        if keep & 1 << number != 0 {
            continue;
        }
        match process::prctl(libc::PR_CAPBSET_DROP, number) {
            Ok(_) => {}
            // Beyond the kernel's last.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno).at("drop bounding capability", ""),
        }
    }
    Ok(())
}

fn set_capabilities(wanted: &Capabilities, available: u64) -> Done<()> {
    let sets = CapSets {
        effective: wanted.effective & wanted.permitted & available,
        permitted: wanted.permitted & available,
        inheritable: wanted.inheritable & available,
    };
    process::capset(sets).at("set capabilities", "")?;
    process::prctl_ambient(libc::PR_CAP_AMBIENT_CLEAR_ALL, 0).at("clear ambient set", "")?;
    let ambient = wanted.ambient & sets.permitted & sets.inheritable;
    for number in (0..MOST_CAPABILITIES).filter(|number| ambient & 1 << number != 0) {
        process::prctl_ambient(libc::PR_CAP_AMBIENT_RAISE, number).at("raise ambient set", "")?;
    }
    Ok(())
}

/// The program's environment, with HOME as /etc/passwd has it if it is not
/// given.
fn environment(plan: &ProcessPlan) -> Vec<CString> {
    let mut env = plan.env.clone();
    if variable(&env, "HOME").is_none() {
        let passwd = fs::read("/etc/passwd").unwrap_or_default();
        let mut home = b"HOME=".to_vec();
        home.extend(home_of(&passwd, plan.uid).unwrap_or(b"/"));
        // A NUL cannot be part of a line that was split at ":" by a sane
        // file; an insane one gives no HOME.
        env.extend(CString::new(home));
    }
    env
}

fn variable<'a>(env: &'a [CString], name: &str) -> Option<&'a [u8]> {
    // The last one counts, as it does for getenv in what is started.
    env.iter().rev().find_map(|entry| {
        entry
            .to_bytes()
            .strip_prefix(name.as_bytes())?
            .strip_prefix(b"=")
    })
}

/// The home directory of `uid` in the text of /etc/passwd (passwd(5)).
fn home_of(passwd: &[u8], uid: u32) -> Option<&[u8]> {
    let wanted = uid.to_string();
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b':').collect();
        (fields.len() >= 6 && fields[2] == wanted.as_bytes() && !fields[5].is_empty())
            .then(|| fields[5])
    })
}

/// Finds the program as its user sees the container.
fn find(plan: &ProcessPlan, env: &[CString]) -> Done<CString> {
    let name = plan.args[0].as_bytes();
    let shown = plan.args[0].to_string_lossy().into_owned();
    if name.is_empty() {
        return Err(Failure::invalid("exec: no command"));
    }
    if name.contains(&b'/') {
        let path = Path::new(OsStr::from_bytes(name));
        return match check(path) {
            Ok(()) => Ok(plan.args[0].clone()),
            Err(Errno::ENOENT) => Err(Failure::invalid(format!(
                "exec: {shown:?}: stat {shown}: no such file or directory"
            ))),
            Err(errno) => Err(Failure::invalid(format!(
                "exec: {shown:?}: {}",
                message(errno)
            ))),
        };
    }
    let search = variable(env, "PATH").unwrap_or(DEFAULT_PATH.as_bytes());
    for directory in search.split(|byte| *byte == b':') {
        let directory = if directory.is_empty() {
            b"."
        } else {
            directory
        };
        let path = PathBuf::from(OsStr::from_bytes(directory)).join(OsStr::from_bytes(name));
        if check(&path).is_ok() {
            if let Ok(path) = CString::new(path.into_os_string().as_bytes()) {
                return Ok(path);
            }
        }
    }
    Err(Failure::invalid(format!(
        "exec: {shown:?}: executable file not found in $PATH"
    )))
}

/// Whether this process may execute `path`.
fn check(path: &Path) -> nix::Result<()> {
    let meta = fs::metadata(path).map_err(|error| crate::error::errno_of(&error))?;
    if meta.is_dir() {
        return Err(Errno::EISDIR);
    }
    // Root may do anything with a file, but not execute one that nobody may.
    if meta.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    let access = faccessat(
        crate::sys::mount::cwd(),
        path,
        AccessFlags::X_OK,
        nix::fcntl::AtFlags::AT_EACCESS,
    );
    match access {
        // A profile that does not know faccessat2: execve will tell.
        Err(Errno::EPERM | Errno::ENOSYS) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbroken\nuser:x:1000:1000::/home/user:/bin/sh\nnohome:x:7:7:::\n";

    #[test]
    fn homes() {
        assert_eq!(home_of(PASSWD, 0), Some(&b"/root"[..]));
        assert_eq!(home_of(PASSWD, 1000), Some(&b"/home/user"[..]));
        assert_eq!(home_of(PASSWD, 7), None);
        assert_eq!(home_of(PASSWD, 10), None);
    }

    #[test]
    fn the_last_variable_counts() {
        let env = ["A=1", "AB=2", "A=3"].map(|text| CString::new(text).unwrap());
        assert_eq!(variable(&env, "A"), Some(&b"3"[..]));
        assert_eq!(variable(&env, "B"), None);
    }

    #[test]
    fn programs_are_checked() {
        assert_eq!(check(Path::new("/")), Err(Errno::EISDIR));
        assert_eq!(check(Path::new("/etc/passwd")), Err(Errno::EACCES));
        assert_eq!(check(Path::new("/nosuch")), Err(Errno::ENOENT));
        assert_eq!(check(Path::new("/bin/sh")), Ok(()));
    }
}
