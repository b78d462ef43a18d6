// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-bench`: prints the figures, and writes them to
//! `target/bench.json`.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use bulkhead_tests::bench::{self, devices, peer, Figure};
use bulkhead_tests::boxed::{fetch_kernel, Event, Flavour, Options};
use bulkhead_tests::inside::{self, again, pass_on, start_box_with};
use bulkhead_tests::install::Products;

/// How long all of it may take in a box.
const LIMIT: Duration = Duration::from_secs(40 * 60);
const USAGE: &str = "\
bulkhead-bench: prints the figures of Bulkhead and its peers, and writes them to
target/bench.json. They are measured in virtual time, in a KVM host in a box.

BULKHEAD_BENCH=NAMEPART takes only groups of figures with that in their name.";

/// Begins a line that holds a figure, from the program in the box.
const FIGURE: &str = "FIGURE ";

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<i32> {
    if let Some(argument) = std::env::args().nth(1) {
        if argument == "--help" {
            println!("{USAGE}");
            return Ok(0);
        }
        bail!("{argument:?}: there is only --help");
    }
    if inside::release_outside().is_some() {
        return measure();
    }
    let products = Products::find()?;
    products.check()?;
    let begin = Instant::now();
    println!("starting the KVM host in a box, in virtual time");
    let stock = fetch_kernel(Flavour::Cloud)?.image;
    let mut hot = peer::hot()?;
    hot.extend([
        products.program("bulkhead-agent"),
        products.program(devices::PROGRAM),
        stock.clone(),
    ]);
    let machine = start_box_with(Options {
        virtual_time: true,
        cpus: 1,
        hot,
        ..Options::default()
    })?;
    println!("measuring; this takes some minutes");
    let mut session = again(std::iter::empty(), LIMIT)?
        .env(peer::STOCK_KERNEL, stock.display().to_string())
        .spawn(machine.mux())?;
    let mut text = Vec::new();
    let mut told = 0;
    let mut figures: Vec<Figure> = Vec::new();
    let status = loop {
        match session
            .next_event()
            .map_err(|error| machine.explain(error))?
        {
            Event::Stdout(data) => {
                text.extend(data);
                let lines = String::from_utf8_lossy(&text).into_owned();
                let Some(end) = lines.rfind('\n') else {
                    continue;
                };
                for line in lines[..end].lines().skip(told) {
                    told += 1;
                    match line.strip_prefix(FIGURE) {
                        Some(json) => {
                            let figure: Figure =
                                serde_json::from_str(json).context(json.to_owned())?;
                            println!("{}", figure.line());
                            figures.push(figure);
                        }
                        None => println!("{line}"),
                    }
                }
            }
            Event::Stderr(data) => pass_on(&mut std::io::stderr().lock(), &data),
            Event::Exit(exit) => break exit.status(),
        }
    };
    let path = products.target().join("bench.json");
    bench::write(&path, &figures)?;
    println!(
        "{} figures in {} after {:.0} s",
        figures.len(),
        path.display(),
        begin.elapsed().as_secs_f64()
    );
    Ok(status)
}

/// Takes the figures here.
fn measure() -> Result<i32> {
    let mut failed = 0;
    bench::run(
        &mut |figure| match figure.and_then(|f| Ok(serde_json::to_string(&f)?)) {
            Ok(json) => println!("{FIGURE}{json}"),
            Err(error) => {
                failed = 1;
                println!("not measured: {error:#}");
            }
        },
    )?;
    Ok(failed)
}
