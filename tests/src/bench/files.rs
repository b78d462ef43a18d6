// SPDX-License-Identifier: Apache-2.0
//! How fast a program in a guest opens and reads files of a shared directory.
//! `fs-open` is of files whose names the guest knows from a moment before: it
//! still asks the host to open and to close each. `fs-read-cached` is the second
//! read of a file: nothing of it comes through the device any more, so what is
//! left are two kernels that copy from their memory, the guest's and the host's,
//! in their own ways. In virtual time an instruction that copies many bytes
//! takes as long as if each word had one of its own.

use std::fs;

use anyhow::{bail, Context, Result};
use bulkhead_vmm_api::{DeviceKind, DeviceMetrics};

use super::devices::{mib_per_second, with_guest, Loads};
use super::{Bench, Figure};
use crate::load;

/// How many files are opened.
const FILES: usize = 1000;
/// Bytes of the file that is read.
const SIZE: u64 = 32 << 20;
const PEER: &str = "the host";

/// `fs-open` and `fs-read-cached`.
///
/// # Errors
/// When the guest does not come up, or a file cannot be had.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    with_guest(bench, "files", take)
}

fn take(loads: &mut Loads) -> Result<Vec<Figure>> {
    let data = loads.data();
    for number in 0..FILES {
        fs::write(data.join(load::file_name(number)), "x").context("make files")?;
    }
    fs::write(data.join("large"), vec![7; usize::try_from(SIZE)?]).context("make a file")?;
    let host = data.to_string_lossy().into_owned();
    Ok(vec![
        opened(loads, &host)?,
        read(loads, &format!("{host}/large"))?,
    ])
}

fn opened(loads: &mut Loads, host: &str) -> Result<Figure> {
    let count = FILES.to_string();
    let before = metrics(loads)?;
    let guest = both(loads.in_guest(None, &["open", "/data", &count])?)?;
    let after = metrics(loads)?;
    let host = both(loads.on_host(&["open", host, &count])?)?;
    let each = |took: u64| took as f64 / 1000.0 / FILES as f64;
    let how = format!(
        "open and close of a file that was looked up within a second before, of {FILES} in a directory of the host that is a container's root; for the first time {:.1} (host {:.1}); {:.2} requests for a file and both times, with the program's start; beside the same program on the host, in the same directory in memory; no target",
        each(guest[0]),
        each(host[0]),
        (after.requests - before.requests) as f64 / FILES as f64
    );
    let figure = Figure::new("fs-open", each(guest[1]), "us", &how);
    Ok(figure.beside(PEER, each(host[1])))
}

fn read(loads: &mut Loads, host: &str) -> Result<Figure> {
    let before = metrics(loads)?;
    let guest = both(loads.in_guest(None, &["cached", "/data/large"])?)?;
    let after = metrics(loads)?;
    let host = both(loads.on_host(&["cached", host])?)?;
    let rate = |took: u64| mib_per_second(SIZE, took);
    let how = format!(
        "second read of an open file of {} MiB, by 1 MiB; the first {:.0} (host {:.0}); {} MiB came through the device in both; beside the same program on the host, of the same file in memory; target: ratio at least 0.90",
        SIZE >> 20,
        rate(guest[0]),
        rate(host[0]),
        (after.bytes_to_guest - before.bytes_to_guest) >> 20
    );
    let figure = Figure::new("fs-read-cached", rate(guest[1]), "MiB/s", &how);
    Ok(figure.beside(PEER, rate(host[1])))
}

/// What the shared directory has done.
fn metrics(loads: &mut Loads) -> Result<DeviceMetrics> {
    let devices = loads.guest.vmm().status()?.devices;
    let shared = devices.iter().find(|device| device.kind == DeviceKind::Fs);
    Ok(shared.context("no shared directory")?.metrics)
}

fn both(took: Vec<u64>) -> Result<[u64; 2]> {
    match took[..] {
        [first, second] => Ok([first, second]),
        ref other => bail!("not two times: {other:?}"),
    }
}
