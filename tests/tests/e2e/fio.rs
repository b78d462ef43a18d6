// SPDX-License-Identifier: Apache-2.0
//! fio in a guest, which checks what it reads by the checksums that it wrote:
//! on disks of both engines and on a shared directory, while the machine is
//! paused and saved, within a disk's limits, and on a disk that goes. The
//! programs are on a disk that `tests/io/build` makes (`make test-io`); without
//! it these are skipped.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::{Empty, WaitProcessRequest};
use bulkhead_tests::guest::Guest;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Size;
use bulkhead_vmm_api::{BlkConfig, BlkEngine, Call, Rate, RateLimits};

use crate::context::{mentions, same, until, Context, LIMIT};
use crate::disks::{
    begin, exec, metrics, moved, named, plug, plug_programs, programs, sized, take_out,
    wait_for_bytes, Disk,
};
use crate::guest::process;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice     fio_verifies_a_disk_that_is_saved_again_and_again,
    fio_verifies_a_disk_by_io_uring_that_is_saved_again_and_again,
    fio_verifies_a_shared_directory_while_it_stops_and_goes,
    fio_keeps_within_a_disks_limits,
    fio_fails_on_a_disk_that_goes_and_what_it_wrote_stays
];

/// How often a machine is paused.
const ROUNDS: usize = 5;
/// What must have been read and written before it is paused again.
const BETWEEN: u64 = 2 << 20;

/// Checksums of everything that is written, read back in the end.
const VERIFY: &str = "--verify=crc32c --verify_fatal=1 --output=/tmp/out";
/// Many requests at a time.
const DISK: &str =
    "--name=io --filename=/dev/disk --direct=1 --rw=randwrite --ioengine=libaio --iodepth=8";

/// fio again and again, until it is to stop, with other bytes each time; what
/// does not succeed is told. In a clone nobody hears it.
fn again_and_again(arguments: &str) -> String {
    format!(
        "trap '' PIPE; rounds=0; until [ -e /tmp/stop ]; do \
             fio {VERIFY} --randseed=$((rounds + 1)) {arguments} || {{ cat /tmp/out >&2; exit 9; }}; \
             rounds=$((rounds + 1)); \
         done; echo $rounds; exit 0"
    )
}

/// A guest without its shared directory, which can be saved.
fn to_save(context: &Context, start: Start, name: &str) -> Result<Guest> {
    let guest = context.guest_to_save(start, name, Size::default())?;
    guest.set_up("")?;
    Ok(guest)
}

fn stop(guest: &Guest, id: &str) -> Result<()> {
    let touch = process(&["touch", "/tmp/stop"])?;
    exec(guest, id, touch)?.ok().map(drop)
}

fn fio_verifies_a_disk_that_is_saved_again_and_again(
    context: &Context,
    start: Start,
) -> Result<()> {
    verifies_what_is_saved(context, start, "fio-sync", BlkEngine::Sync)
}

fn fio_verifies_a_disk_by_io_uring_that_is_saved_again_and_again(
    context: &Context,
    start: Start,
) -> Result<()> {
    verifies_what_is_saved(context, start, "fio-ring", BlkEngine::IoUring)
}

fn verifies_what_is_saved(
    context: &Context,
    start: Start,
    name: &str,
    engine: BlkEngine,
) -> Result<()> {
    const SIZE: u64 = 24 << 20;
    context.only_bulkhead()?;
    let image = File::open(programs()?.join("root.erofs"))?;
    let mut guest = to_save(context, start, name)?;
    let dir = guest.dir().to_owned();
    let programs = plug_programs(&mut guest)?;
    let file = sized(&dir.join("disk"), SIZE)?;
    let disk = plug(&mut guest, named("data", engine), &file)?;
    let script = again_and_again(&format!("{DISK} --bs=16k"));
    let running = begin(&guest, "fio", &programs, Some(&disk), &script)?;

    let (state, memory) = (dir.join("state"), dir.join("memory"));
    let copy = dir.join("copy");
    for round in 1..=ROUNDS {
        wait_for_bytes(&mut guest, disk.slot, BETWEEN).with_context(|| guest.console())?;
        // The last one is kept, with the disk as it was.
        guest.vmm().snapshot(&state, &memory)?;
        if round == ROUNDS {
            fs::copy(dir.join("disk"), &copy)?;
        }
        guest.vmm().call(Call::Resume, &[])?;
    }
    wait_for_bytes(&mut guest, disk.slot, BETWEEN)?;
    stop(&guest, "fio")?;
    let done = guest.end(running)?.ok().context("fio")?;
    let rounds: u32 = String::from_utf8(done)?.trim().parse()?;
    ensure!(rounds > 0, "fio has never come to its end");
    same(metrics(&mut guest, disk.slot)?.errors, 0)?;
    drop(guest);

    // What was saved goes on by itself, amid fio's work.
    let copy = File::options().read(true).write(true).open(&copy)?;
    let passed = [image.into(), copy.try_clone()?.into()];
    let place = context.dir.join(context.id(&format!("{name}-clone")));
    let mut clone = Guest::clone_with(
        &context.products,
        &place,
        (&state, &memory),
        LIMIT,
        |devices, fds| {
            let first = fds.len() as u32;
            fds.extend::<[OwnedFd; 2]>(passed);
            devices.blk = vec![
                BlkConfig {
                    file: first,
                    read_only: true,
                    ..named("programs", BlkEngine::Sync)
                },
                BlkConfig {
                    file: first + 1,
                    ..named("data", engine)
                },
            ];
        },
    )?;
    wait_for_bytes(&mut clone, disk.slot, BETWEEN).with_context(|| clone.console())?;
    stop(&clone, "fio").context("stop the clone's")?;
    let wait = WaitProcessRequest {
        container_id: "fio".into(),
        ..Default::default()
    };
    let ended = clone.block_on(async {
        let ended = tokio::time::timeout(LIMIT, clone.agent().wait_process(wait)).await;
        anyhow::Ok(ended.context("fio does not end in the clone")??)
    })?;
    same(ended.exit_status, 0).context("fio in the clone")?;
    same(metrics(&mut clone, disk.slot)?.errors, 0)?;
    drop(clone);
    for dir in [dir, place] {
        fs::remove_dir_all(dir)?;
    }
    Ok(())
}

fn fio_verifies_a_shared_directory_while_it_stops_and_goes(
    context: &Context,
    start: Start,
) -> Result<()> {
    context.only_bulkhead()?;
    programs()?;
    let mut guest = context.guest(start, "fio-shared", Size::default())?;
    let dir = guest.dir().to_owned();
    let data = guest.shared().join("data");
    fs::create_dir(&data)?;
    let programs = plug_programs(&mut guest)?;
    let devices = guest.vmm().status()?.devices;
    let shared = devices.iter().find(|device| device.id == "shared");
    let slot = shared.context("no shared directory")?.slot;
    // By way of the guest's cache, and past it.
    let script = again_and_again(
        "--directory=/data --nrfiles=4 --size=8m --bs=16k \
         --name=cached --rw=write --ioengine=psync --fsync=16 --invalidate=1 \
         --name=direct --rw=randwrite --direct=1 --ioengine=libaio --iodepth=8",
    );
    let running = begin(&guest, "fio", &programs, None, &script)?;
    for _ in 0..ROUNDS {
        wait_for_bytes(&mut guest, slot, BETWEEN).with_context(|| guest.console())?;
        let saved = guest
            .vmm()
            .snapshot(&dir.join("state"), &dir.join("memory"));
        let Err(error) = saved else {
            bail!("a guest with a mounted share was saved");
        };
        mentions(&error.to_string(), &["mounted"])?;
        // It is paused all the same.
        std::thread::sleep(Duration::from_millis(200));
        guest.vmm().call(Call::Resume, &[])?;
    }
    stop(&guest, "fio")?;
    let done = guest.end(running)?.ok().context("fio")?;
    let rounds: u32 = String::from_utf8(done)?.trim().parse()?;
    ensure!(rounds > 0, "fio has never come to its end");
    let sizes = fs::read_dir(&data)?.map(|entry| anyhow::Ok(entry?.metadata()?.len()));
    let sizes = sizes.collect::<Result<Vec<_>>>()?;
    same(sizes.iter().sum::<u64>(), 16 << 20).with_context(|| format!("{sizes:?}"))?;
    drop(guest);
    fs::remove_dir_all(dir)?;
    Ok(())
}

/// A run's bytes, and how long it took from the first to the last of them.
fn measured(guest: &mut Guest, id: &str, programs: &Disk, disk: &Disk) -> Result<(u64, f64)> {
    let script = format!("fio {VERIFY} {DISK} --bs=16k >&2");
    let running = begin(guest, id, programs, Some(disk), &script)?;
    let before = moved(guest, disk.slot)?;
    until(LIMIT, "the first byte", || {
        Ok(moved(guest, disk.slot)? > before)
    })?;
    let begin = Instant::now();
    let first = moved(guest, disk.slot)?;
    let mut last = (first, begin);
    let wanted = 2 * LIMITED;
    until(LIMIT, "the last byte", || {
        let now = moved(guest, disk.slot)?;
        if now > last.0 {
            last = (now, Instant::now());
        }
        Ok(now >= before + wanted)
    })?;
    guest.end(running)?.ok().with_context(|| id.to_owned())?;
    guest.delete(id)?;
    Ok((last.0 - first, (last.1 - begin).as_secs_f64()))
}

/// What is written, and then read, within limits.
const LIMITED: u64 = 6 << 20;

fn fio_keeps_within_a_disks_limits(context: &Context, start: Start) -> Result<()> {
    context.only_bulkhead()?;
    programs()?;
    let mut guest = to_save(context, start, "fio-limits")?;
    let dir = guest.dir().to_owned();
    let programs = plug_programs(&mut guest)?;
    let file = sized(&dir.join("disk"), LIMITED)?;
    for (name, engine) in [("sync", BlkEngine::Sync), ("ring", BlkEngine::IoUring)] {
        let disk = plug(&mut guest, named("free", engine), &file)?;
        let (bytes, seconds) = measured(&mut guest, &format!("{name}-free"), &programs, &disk)?;
        take_out(&mut guest, disk.slot)?;
        let free = bytes as f64 / seconds;

        // Far less than what it can do here.
        let per_second = (free / 4.0) as u64;
        let burst = 256 << 10;
        let limits = RateLimits {
            bytes: Some(Rate { per_second, burst }),
            ..RateLimits::default()
        };
        let config = BlkConfig {
            rate: Some(limits),
            ..named("limited", engine)
        };
        let disk = plug(&mut guest, config, &file)?;
        let id = format!("{name}-limited");
        let (bytes, seconds) = measured(&mut guest, &id, &programs, &disk)?;
        let metrics = metrics(&mut guest, disk.slot)?;
        take_out(&mut guest, disk.slot)?;
        println!(
            "    {name}: {:.1} MB/s, and {:.1} of {:.1} MB/s with a limit",
            free / 1e6,
            bytes as f64 / seconds / 1e6,
            per_second as f64 / 1e6
        );
        ensure!(metrics.throttled > 0, "nothing has waited: {metrics:?}");
        // What is asked for at once is let through whole.
        let most = per_second as f64 * seconds + (burst + 8 * (16 << 10)) as f64;
        ensure!(
            bytes as f64 <= most * 1.02,
            "{bytes} bytes in {seconds} s are more than {most}"
        );
        ensure!(
            bytes as f64 >= per_second as f64 * seconds / 3.0,
            "{bytes} bytes in {seconds} s are far less than {per_second} a second"
        );
    }
    drop(guest);
    fs::remove_dir_all(dir)?;
    Ok(())
}

fn fio_fails_on_a_disk_that_goes_and_what_it_wrote_stays(
    context: &Context,
    start: Start,
) -> Result<()> {
    // More than is written before it goes.
    const SIZE: u64 = 512 << 20;
    context.only_bulkhead()?;
    programs()?;
    let mut guest = to_save(context, start, "fio-goes")?;
    let dir = guest.dir().to_owned();
    let programs = plug_programs(&mut guest)?;
    let file = sized(&dir.join("disk"), SIZE)?;
    for (name, engine) in [("sync", BlkEngine::Sync), ("ring", BlkEngine::IoUring)] {
        // Nothing of the last round, which would do.
        file.set_len(0)?;
        file.set_len(SIZE)?;
        let disk = plug(&mut guest, named("goes", engine), &file)?;
        // One request at a time: fio's record of what was written is exact then.
        let writes = format!(
            "fio {VERIFY} --name=io --filename=/dev/disk --direct=1 --rw=write --ioengine=psync --bs=16k"
        );
        let script = format!(
            "{writes} 2>&1; echo wrote $?; touch /tmp/ended; \
             until [ -e /tmp/again ]; do sleep 0.2; done; \
             {writes} --verify_only --verify_state_load=1 2>&1; echo read $?; \
             grep -o 'READ:.*io=[^ ]*' /tmp/out"
        );
        let running = begin(&guest, name, &programs, Some(&disk), &script)?;
        wait_for_bytes(&mut guest, disk.slot, BETWEEN)?;
        take_out(&mut guest, disk.slot)?;
        until(LIMIT, "the end of fio", || {
            let look = process(&["test", "-e", "/tmp/ended"])?;
            Ok(exec(&guest, name, look)?.status == 0)
        })?;
        guest.wait_for(guest.agent().check(Empty::new()))?;
        let again = plug(&mut guest, named("goes", engine), &file)?;
        let numbers = |disk: &Disk| (disk.slot, disk.node.major, disk.node.minor);
        same(numbers(&again), numbers(&disk))?;
        exec(&guest, name, process(&["touch", "/tmp/again"])?)?.ok()?;
        let told = String::from_utf8(guest.end(running)?.ok()?)?;
        // A disk that goes has no space left at once; what is on its way fails.
        let words = ["Input/output error", "No space left", "No such device"];
        mentions(&told, &words)?;
        mentions(&told, &["wrote 1"])?;
        mentions(&told, &["read 0"]).with_context(|| told.clone())?;
        // All that was written is read again, and that is not nothing.
        let read = metrics(&mut guest, again.slot)?.bytes_to_guest;
        ensure!(read >= BETWEEN, "{read} bytes read: {told}");
        println!("    {name}: {} MiB verified", read >> 20);
        guest.delete(name)?;
        take_out(&mut guest, again.slot)?;
    }
    drop(guest);
    fs::remove_dir_all(dir)?;
    Ok(())
}
