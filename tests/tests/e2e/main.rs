// SPDX-License-Identifier: Apache-2.0
//! End-to-end tests: containers through a real containerd, where microVMs run.
//!
//! This program boots a box if it must, starts itself in it, and there runs
//! every test against one containerd. Arguments select tests by parts of their
//! names. `BULKHEAD_TEST_RUNTIME=io.containerd.runc.v2` checks the tests
//! themselves with runc.
#![forbid(unsafe_code)]

mod announce;
mod balloon;
mod basic;
mod blocks;
mod boxed;
mod cgroups;
mod cli;
mod conformance;
mod console;
mod context;
mod cri;
mod devices;
mod disks;
mod docker;
mod exhaustion;
mod failure;
mod fio;
mod guest;
mod host;
mod hotplug;
mod idmap;
mod interfaces;
mod iperf;
mod jail;
mod kill;
mod ksm;
mod lifecycle;
mod listener;
mod locks;
mod logger;
mod memory;
mod merging;
mod network;
mod oci;
mod pages;
mod plugged;
mod pod;
mod pods;
mod ports;
mod posix;
mod programs;
mod recovery;
mod resize;
mod runner;
mod sandbox_api;
mod soak;
mod spans;
mod stdio;
mod unplug;
mod vmm;
mod volumes;
mod vsock;

use std::process::exit;
use std::time::Duration;

use anyhow::Result;
use bulkhead_tests::inside::is_here;
use bulkhead_tests::install::Products;

use runner::{Selection, Test};

/// How long all of it may take in a box.
const LIMIT: Duration = Duration::from_secs(60 * 60);

fn all() -> Vec<Test> {
    [
        basic::TESTS,
        stdio::TESTS,
        logger::TESTS,
        lifecycle::TESTS,
        memory::TESTS,
        pages::TESTS,
        merging::TESTS,
        network::TESTS,
        oci::TESTS,
        failure::TESTS,
        kill::TESTS,
        host::TESTS,
        jail::TESTS,
        cgroups::TESTS,
        vmm::TESTS,
        volumes::TESTS,
        locks::TESTS,
        programs::TESTS,
        posix::TESTS,
        cri::TESTS,
        soak::TESTS,
        pods::TESTS,
        ports::TESTS,
        hotplug::TESTS,
        unplug::TESTS,
        blocks::TESTS,
        balloon::TESTS,
        devices::TESTS,
        announce::TESTS,
        interfaces::TESTS,
        guest::TESTS,
        vsock::TESTS,
        fio::TESTS,
        iperf::TESTS,
        conformance::TESTS,
        console::TESTS,
        listener::TESTS,
        resize::TESTS,
        ksm::TESTS,
        cli::TESTS,
        recovery::TESTS,
        exhaustion::TESTS,
        spans::TESTS,
        sandbox_api::TESTS,
        idmap::TESTS,
        docker::TESTS,
    ]
    .concat()
}

fn main() {
    match run() {
        Ok(status) => exit(status),
        Err(error) => {
            eprintln!("e2e: {error:#}");
            exit(1);
        }
    }
}

fn run() -> Result<i32> {
    let selection = Selection::from_arguments()?;
    let tests: Vec<Test> = selection.of(all());
    if selection.list {
        for test in tests {
            println!("{}: test", test.name);
        }
        return Ok(0);
    }
    if context::runtime() == bulkhead_tests::containerd::BULKHEAD {
        Products::find()?.check()?;
    }
    // To the program in the box, no names would mean all tests.
    if tests.is_empty() {
        return runner::run(&tests);
    }
    if is_here() {
        boxed::tell_alive();
        return runner::run(&tests);
    }
    boxed::run(
        tests.iter().map(|test| test.name.to_owned()).collect(),
        LIMIT,
    )
}
