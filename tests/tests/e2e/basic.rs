// SPDX-License-Identifier: Apache-2.0
//! Exit codes, exec, what a container sees of itself.

use std::fs;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::image::{APP_GID, APP_GROUPS, APP_IMAGE, APP_UID};
use bulkhead_tests::proc;

use crate::context::{mentions, same, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    the_guest_has_its_own_kernel,
    exit_code_0,
    exit_code_1,
    exit_code_137_by_kill,
    exec_has_its_own_exit_code,
    environment_and_directory,
    image_with_users_and_groups,
    exec_as_another_user,
    capabilities_of_the_spec,
    namespaces_and_masked_paths,
    read_only_rootfs,
    writes_survive_within_and_vanish_after,
    bind_mounts,
    tmpfs_mount,
];

fn the_guest_has_its_own_kernel(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let guest = context.run(&[], &["uname", "-r"])?.ok()?.out();
    let host = bulkhead_tests::inside::release()?;
    if guest == host || guest.is_empty() {
        bail!("the container says {guest:?}, the host {host:?}");
    }
    Ok(())
}

fn exit_code_0(context: &Context) -> Result<()> {
    let done = context.sh("echo fine; exit 0")?;
    same((done.code, done.out()), (0, "fine".to_owned()))
}

fn exit_code_1(context: &Context) -> Result<()> {
    same(context.run(&[], &["false"])?.code, 1)?;
    same(context.sh("exit 42")?.code, 42)
}

fn exit_code_137_by_kill(context: &Context) -> Result<()> {
    let mut run = context.attached(&[], &["sh", "-c", "echo up; sleep 1000"])?;
    run.wait_for("up")?;
    context
        .ctr(&["task", "kill", "-s", "SIGKILL", &run.id])?
        .ok()?;
    same(run.wait(LIMIT)?, 137)
}

fn exec_has_its_own_exit_code(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 17"])?;
    same(
        (done.code, done.out(), done.err()),
        (17, "out".to_owned(), "err".to_owned()),
    )?;
    same(container.exec(&["true"])?.code, 0)?;
    same(container.exec(&["sh", "-c", "kill -9 $$"])?.code, 137)?;
    // Both see the same processes and files.
    let done = container.exec(&["sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; echo x >/shared"])?;
    same(done.ok()?.out(), "sleep 1000")?;
    same(container.exec(&["cat", "/shared"])?.ok()?.out(), "x")?;
    same(container.status()?, "RUNNING")?;
    let pids = context.ctr(&["task", "ps", &container.id])?.ok()?.out();
    if pids.lines().count() < 2 {
        bail!("no process in {pids:?}");
    }
    container.remove()
}

fn environment_and_directory(context: &Context) -> Result<()> {
    let done = context.run(
        &["--env", "COLOUR=deep blue", "--cwd", "/var"],
        &["sh", "-c", "echo $COLOUR; pwd; echo $PATH; hostname"],
    )?;
    let out = done.ok()?.out();
    let lines: Vec<&str> = out.lines().collect();
    same(&lines[..3], &["deep blue", "/var", "/bin"][..])?;
    if lines.get(3).is_none_or(|name| name.is_empty()) {
        bail!("no host name in {out:?}");
    }
    Ok(())
}

/// `ctr run --rm` of the image with a user.
fn run_app(context: &Context, flags: &[&str], argv: &[&str]) -> Result<proc::Done> {
    let id = context.id("app");
    let mut command = context.containerd.run(&context.runtime, &["--rm"]);
    command.args(flags).args([APP_IMAGE, &id]).args(argv);
    proc::run(&mut command, LIMIT)
}

fn image_with_users_and_groups(context: &Context) -> Result<()> {
    let script = "id -u; id -g; id -G; pwd; echo $COLOUR; cat mine; cat audio; \
                  cat /root/secret 2>&1; echo x >made; stat -c '%u %g' made";
    let out = run_app(context, &[], &["sh", "-c", script])?.ok()?.out();
    let lines: Vec<&str> = out.lines().collect();
    same(lines.len(), 9).with_context(|| out.clone())?;
    same(lines[0], APP_UID.to_string())?;
    same(lines[1], APP_GID.to_string())?;
    let groups: Vec<u32> = lines[2].split(' ').filter_map(|g| g.parse().ok()).collect();
    for group in [APP_GID, APP_GROUPS[0], APP_GROUPS[1]] {
        if !groups.contains(&group) {
            bail!("group {group} is not in {groups:?}");
        }
    }
    same(
        &lines[3..7],
        &["/home/app", "green and blue", "mine", "audio"][..],
    )?;
    mentions(lines[7], &["permission denied"])?;
    same(lines[8], format!("{APP_UID} {APP_GID}"))?;
    // The command of the image itself.
    let out = run_app(context, &[], &[])?.ok()?.out();
    mentions(&out, &["uid=1000(app) gid=1000(app)"])
}

fn exec_as_another_user(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let args = [
        "task",
        "exec",
        "--exec-id",
        "u",
        "--user",
        "1000:2001",
        "--cwd",
        "/tmp",
    ];
    let mut args = args.to_vec();
    args.extend([container.id.as_str(), "sh", "-c", "id -u; id -g; pwd"]);
    same(context.ctr(&args)?.ok()?.out(), "1000\n2001\n/tmp")?;
    container.remove()
}

fn capabilities_of_the_spec(context: &Context) -> Result<()> {
    let caps = |flags: &[&str]| -> Result<(u64, String)> {
        let script = "grep -E 'CapEff|NoNewPrivs' /proc/self/status";
        let out = context.run(flags, &["sh", "-c", script])?.ok()?.out();
        let value = |key: &str| {
            out.lines()
                .find_map(|l| l.strip_prefix(key))
                .map(|v| v.trim().to_owned())
                .with_context(|| format!("no {key} in {out:?}"))
        };
        let bits = u64::from_str_radix(&value("CapEff:")?, 16)?;
        Ok((bits, value("NoNewPrivs:")?))
    };
    // The default of containerd's specs: fourteen, without SYS_ADMIN (21).
    let (bits, no_new) = caps(&[])?;
    same(bits, 0xa804_25fb_u64)?;
    same(no_new, "1")?;
    let (bits, no_new) = caps(&[
        "--cap-add",
        "CAP_SYS_ADMIN",
        "--cap-drop",
        "CAP_CHOWN",
        "--allow-new-privs",
    ])?;
    same(bits, (0xa804_25fb_u64 | 1 << 21) & !1)?;
    same(no_new, "0")
}

fn namespaces_and_masked_paths(context: &Context) -> Result<()> {
    let script = "echo $$; ls /sys/class/net; wc -c </proc/timer_list; \
        (echo x >/proc/sys/kernel/hostname) 2>&1; ls -1 /dev/null /dev/full /dev/ptmx /dev/shm -d; \
        grep -c . /proc/self/mountinfo";
    let out = context.sh(script)?.ok()?.out();
    let lines: Vec<&str> = out.lines().collect();
    same(lines[0], "1").context("the process number")?;
    same(lines[1], "lo").context("network interfaces")?;
    same(lines[2], "0").context("bytes of /proc/timer_list, which is masked")?;
    mentions(lines[3], &["read-only"]).context("/proc/sys")?;
    same(
        &lines[4..8],
        &["/dev/full", "/dev/null", "/dev/ptmx", "/dev/shm"][..],
    )
}

fn read_only_rootfs(context: &Context) -> Result<()> {
    let done = context.run(&["--read-only"], &["touch", "/file"])?;
    same(done.code, 1)?;
    mentions(&done.err(), &["read-only file system"])?;
    let done = context.run(
        &["--read-only"],
        &["sh", "-c", "cat /etc/passwd && echo x >/dev/shm/x"],
    )?;
    mentions(&done.ok()?.out(), &["root:x:0:0"])
}

fn writes_survive_within_and_vanish_after(context: &Context) -> Result<()> {
    let script = "head -c 3000000 /pattern >/a; mkdir -p /d/e; mv /a /d/e/a; rm /etc/group; \
        ln -s /d/e/a /link; chown 7:8 /d; chmod 700 /d; dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null; \
        sync; touch /ready; sleep 1000";
    let container = context.detached(&[], &["sh", "-c", script])?;
    crate::context::until(LIMIT, "/ready", || {
        Ok(container.exec(&["test", "-e", "/ready"])?.code == 0)
    })?;
    let check =
        "cmp /link /pattern && stat -c '%u %g %a' /d && stat -c %s /big && test ! -e /etc/group";
    same(
        container.exec(&["sh", "-c", check])?.ok()?.out(),
        "7 8 700\n20971520",
    )?;
    container.remove()?;
    same(
        context
            .sh("ls /d /big /link 2>/dev/null; cat /etc/group | wc -l")?
            .ok()?
            .out(),
        "4",
    )
}

fn bind_mounts(context: &Context) -> Result<()> {
    let dir = context.dir.join("bound");
    fs::create_dir_all(dir.join("sub"))?;
    fs::write(dir.join("file"), "from the host\n")?;
    fs::write(context.dir.join("single"), "one file\n")?;
    let mount = |options: &str, dst: &str, src: &std::path::Path| {
        format!(
            "type=bind,src={},dst={dst},options={options}",
            src.display()
        )
    };
    let (rw, ro) = (
        mount("rbind:rw", "/rw", &dir),
        mount("rbind:ro", "/ro", &dir),
    );
    let single = mount("bind:ro", "/single", &context.dir.join("single"));
    let script = "cat /rw/file /single; echo 'from the guest' >/rw/sub/new; cat /ro/sub/new; \
        echo x >/ro/file; echo x >/single";
    let done = context.run(
        &["--mount", &rw, "--mount", &ro, "--mount", &single],
        &["sh", "-c", script],
    )?;
    same(done.out(), "from the host\none file\nfrom the guest")?;
    let err = done.err();
    same(err.matches("Read-only").count(), 2).with_context(|| err.clone())?;
    same(
        fs::read_to_string(dir.join("sub/new"))?.as_str(),
        "from the guest\n",
    )?;
    same(
        fs::read_to_string(dir.join("file"))?.as_str(),
        "from the host\n",
    )?;
    fs::remove_dir_all(dir)?;
    Ok(())
}

fn tmpfs_mount(context: &Context) -> Result<()> {
    let done = context.run(
        &[
            "--mount",
            "type=tmpfs,src=tmpfs,dst=/scratch,options=size=4m:mode=1750",
        ],
        &[
            "sh",
            "-c",
            "stat -f -c %T /scratch; stat -c %a /scratch; echo x >/scratch/x && cat /scratch/x",
        ],
    )?;
    same(done.ok()?.out(), "tmpfs\n1750\nx")
}
