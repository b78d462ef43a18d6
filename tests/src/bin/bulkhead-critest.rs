// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-critest [FOCUS [SKIP]]`: runs the validation tests of cri-tools
//! through containerd with Bulkhead, in a box where needed, and lists every
//! case. The arguments are regular expressions over the names of cases; without
//! them all are run that need no registry of images.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use bulkhead_tests::containerd::BULKHEAD;
use bulkhead_tests::cri::Cri;
use bulkhead_tests::critest_images;
use bulkhead_tests::image;
use bulkhead_tests::inside;
use bulkhead_tests::install::Products;
use serde_json::Value;

/// How long all of it may take in a box.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// Cases that are left out unless asked for: those that pull images from a
/// registry; benchmarks, which are no tests; and one that cannot apply and
/// wants an image of the registry's.
const REGISTRY: &str = "Image Manager|benchmark|portforward in host network";

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-critest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<i32> {
    let products = Products::find()?;
    if inside::is_here() {
        return validate(&products);
    }
    products.check()?;
    products.cri_tool("critest")?;
    println!("starting the KVM host in a box; all cases take an hour or more there");
    inside::in_a_box(LIMIT, |_| {})
}

/// Runs critest here.
fn validate(products: &Products) -> Result<i32> {
    let runtime = env::var("BULKHEAD_TEST_RUNTIME").unwrap_or_else(|_| BULKHEAD.into());
    let dir = inside::work_dir("bh-critest");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let config = dir.join("config.toml");
    products.config(&dir.join("state")).write(&config)?;
    let cri = Cri::start(&dir.join("k"), products, &config, &runtime)?;
    let report = dir.join("report.json");
    let archive = dir.join("images.tar");
    critest_images::write(&archive)?;
    cri.containerd().import(&archive)?;
    cri.wait_for_images(&critest_images::NAMES)?;
    let outcome = critest(products, &cri, &dir, &report);
    let told = outcome.and_then(|()| tell(&report));
    if told.is_err() {
        eprintln!("{}", cri.containerd().log_tail(40));
    }
    cri.stop()?;
    bulkhead_tests::containerd::remove_tree(&dir)?;
    told
}

fn critest(products: &Products, cri: &Cri, dir: &Path, report: &Path) -> Result<()> {
    let images = dir.join("images.yaml");
    let text = format!(
        "defaultTestContainerImage: {}\nwebServerTestImage: {}\n",
        image::ROOT_IMAGE,
        image::WEB_IMAGE
    );
    fs::write(&images, text).context("write the list of images")?;
    let socket = format!("unix://{}", cri.containerd().socket().display());
    let mut words = env::args().skip(1);
    let focus = words.next().unwrap_or_default();
    let skip = words.next().unwrap_or_else(|| REGISTRY.into());
    let mut command = Command::new(products.cri_tool("critest")?);
    command
        .args(["--runtime-endpoint", &socket, "--image-endpoint", &socket])
        .args(["--runtime-handler", cri.handler()])
        .arg("--test-images-file")
        .arg(&images)
        .args(["--ginkgo.focus", &focus, "--ginkgo.skip", &skip])
        .arg("--ginkgo.json-report")
        .arg(report)
        .args([
            "--ginkgo.no-color",
            "--ginkgo.timeout",
            "4h",
            "--test.timeout",
            "0",
        ])
        .current_dir(dir)
        .stdin(Stdio::null());
    // Whether cases fail is in the report.
    let status = command.status().context("run critest")?;
    if !report.exists() {
        bail!("critest ended early: {status}");
    }
    Ok(())
}

/// Lists what is in the report; gives the exit status.
fn tell(report: &Path) -> Result<i32> {
    let text = fs::read(report).context("read the report")?;
    let suites: Vec<Value> = serde_json::from_slice(&text).context("understand the report")?;
    let mut counts = [0_u32; 3];
    let mut lines = Vec::new();
    for case in suites
        .iter()
        .filter_map(|suite| suite["SpecReports"].as_array())
        .flatten()
        .filter(|case| case["LeafNodeType"] == "It")
    {
        let state = case["State"].as_str().unwrap_or("unknown");
        let why = case["Failure"]["Message"].as_str().unwrap_or_default();
        // Those outside of what was asked for are skipped without a word.
        let (index, word) = match state {
            "passed" => (0, "passed"),
            "skipped" if why.is_empty() => continue,
            "skipped" | "pending" => (1, "skipped"),
            _ => (2, "FAILED"),
        };
        counts[index] += 1;
        let parents = case["ContainerHierarchyTexts"].as_array();
        let name: Vec<&str> = parents
            .into_iter()
            .flatten()
            .chain([&case["LeafNodeText"]])
            .filter_map(Value::as_str)
            .collect();
        let seconds = case["RunTime"].as_f64().unwrap_or_default() / 1e9;
        let why = why.lines().next().unwrap_or_default();
        lines.push(format!("{word:8}{} ({seconds:.0} s) {why}", name.join(" ")));
    }
    lines.sort();
    println!("\n{}", lines.join("\n"));
    let [passed, skipped, failed] = counts;
    println!("critest: {passed} passed, {failed} failed, {skipped} skipped");
    if passed + failed == 0 {
        bail!("no case was run");
    }
    Ok(i32::from(failed > 0))
}
