// SPDX-License-Identifier: Apache-2.0
//! Which of the host's pages guests' memory is in.

use std::fs;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_tests::listing::by_program;
use bulkhead_tests::vmm::Vmm;
use bulkhead_vmm_api::{
    BalloonConfig, BalloonTarget, Call, MemConfig, MemoryTarget, Pages, VmConfig,
};

use crate::cli::with_config;
use crate::context::{mentions, same, until, Context, Skip, LIMIT};
use crate::resize::ask;
use crate::runner::{tests, Test};
use crate::vmm::Host;

pub const TESTS: &[Test] = tests![
    a_guests_memory_is_in_reserved_huge_pages,
    a_pods_memory_is_in_reserved_huge_pages,
    a_guests_memory_is_in_transparent_huge_pages
];

/// How many huge pages the host keeps.
const COUNT: &str = "/proc/sys/vm/nr_hugepages";
/// Pages of a guest with 256 MiB, and of a part that it may get more.
const GUEST: u64 = 128;
const PART: u64 = 64;

/// So many huge pages of the host's, as long as it lives.
struct Reserved(String);

impl Reserved {
    fn new(count: u64) -> Result<Self> {
        let skip = |why: String| Skip(format!("this host keeps no huge pages: {why}"));
        let before = fs::read_to_string(COUNT).map_err(|error| skip(error.to_string()))?;
        let this = Self(before);
        fs::write(COUNT, count.to_string())?;
        let found: u64 = fs::read_to_string(COUNT)?.trim().parse()?;
        if found < count {
            return Err(skip(format!("{found} of {count} could be had")).into());
        }
        Ok(this)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = fs::write(COUNT, &self.0) {
            eprintln!("{COUNT}: {error}");
        }
    }
}

/// Huge pages that nobody has, or has a right to.
fn left() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.trim().parse::<u64>().ok());
        number.with_context(|| format!("{name} in {text}"))
    };
    Ok(field("HugePages_Free:")? - field("HugePages_Rsvd:")?)
}

/// KiB of a process by a field of smaps.
fn kib(pid: u32, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let fields = text.lines().filter_map(|line| line.strip_prefix(name));
    Ok(fields
        .filter_map(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .sum())
}

fn huge(config: &mut VmConfig) {
    config.pages = Pages::Huge;
    config.devices.balloon = Some(BalloonConfig {
        free_page_reporting: false,
        ..BalloonConfig::default()
    });
    config.devices.mem = Some(MemConfig { max_mib: 256 });
    config.kernel.cmdline += " memhp_default_state=online_movable";
}

fn refused(result: Result<impl Sized>, words: &[&str]) -> Result<()> {
    match result {
        Ok(_) => bail!("not refused: {words:?}"),
        Err(error) => mentions(&error.to_string(), words),
    }
}

fn a_guests_memory_is_in_reserved_huge_pages(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let reserved = Reserved::new(GUEST + PART)?;
    let all = left()?;
    let host = Host::new(context, "huge")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    vmm.boot_changed(&context.products, &host.dir, |config, _| huge(config))?;
    vmm.wait_ready().with_context(|| host.console())?;
    same(left()?, all - GUEST)?;
    let held = kib(vmm.pid(), "Private_Hugetlb:")?;
    ensure!(held >= 32 << 10, "{held} KiB in huge pages");
    println!(
        "    {held} KiB in huge pages, and {} pages are left",
        left()?
    );

    // What comes and goes is in such pages, too, as long as there are some.
    ask(&mut vmm, 128, || host.console())?;
    same(left()?, all - GUEST - PART)?;
    let words = ["64 huge pages", COUNT];
    refused(
        vmm.call(Call::Memory(MemoryTarget { mib: 256 }), &[]),
        &words,
    )?;
    ask(&mut vmm, 0, || host.console())?;
    same(left()?, all - GUEST)?;
    let target = Call::Balloon(BalloonTarget { mib: 16 });
    refused(vmm.call(target, &[]), &["reserved huge pages"])?;

    // Not enough for another one.
    let other = Host::new(context, "huge-other")?;
    let mut second = Vmm::start(&context.products, LIMIT)?;
    let booted = second.boot_changed(&context.products, &other.dir, |config, _| huge(config));
    refused(booted, &["128 huge pages", COUNT])?;
    drop(second);
    vmm.status()?;
    drop(vmm);
    until(LIMIT, "all pages are the host's", || Ok(left()? == all))?;
    drop(reserved);
    Ok(())
}

fn a_pods_memory_is_in_reserved_huge_pages(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let reserved = Reserved::new(GUEST)?;
    let all = left()?;
    let mut config = context.config.clone();
    config.pages = Pages::Huge;
    with_config(context, &config.toml(), || {
        let container = context.detached(&[], &["sleep", "600"])?;
        same(left()?, all - GUEST)?;
        let vmms = by_program("bulkhead-vmm");
        let [vmm] = &vmms[..] else {
            bail!("{} VMMs", vmms.len());
        };
        let held = kib(vmm.pid, "Private_Hugetlb:")?;
        ensure!(held >= 32 << 10, "{held} KiB in huge pages");
        // There are none for a second pod, which is told so.
        let second = context.run(&[], &["true"])?;
        ensure!(second.code != 0, "a pod without memory");
        mentions(&second.err(), &["128 huge pages", COUNT])?;
        container.remove()
    })?;
    until(LIMIT, "all pages are the host's", || Ok(left()? == all))?;
    drop(reserved);
    Ok(())
}

fn a_guests_memory_is_in_transparent_huge_pages(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let enabled = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let enabled = enabled.unwrap_or_default();
    if !enabled.contains("[madvise]") && !enabled.contains("[always]") {
        return Err(Skip(format!("no transparent huge pages here: {enabled:?}")).into());
    }
    let mut held = Vec::new();
    for (name, pages) in [("small", Pages::Small), ("transparent", Pages::Transparent)] {
        let host = Host::new(context, name)?;
        let mut vmm = Vmm::start(&context.products, LIMIT)?;
        vmm.boot_changed(&context.products, &host.dir, |config, _| {
            config.pages = pages
        })?;
        vmm.wait_ready().with_context(|| host.console())?;
        held.push(kib(vmm.pid(), "AnonHugePages:")?);
    }
    println!("    AnonHugePages of a guest in small pages and in huge ones: {held:?} KiB");
    // The kernel's image may be in some in any case.
    ensure!(held[1] > held[0] + (8 << 10), "{held:?}");
    Ok(())
}
