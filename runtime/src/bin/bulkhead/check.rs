// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check`.

use std::process::ExitCode;

use bulkhead_runtime::{
    check::{self, Subject},
    config::{Config, Loaded},
};

/// Prints the report; success when microVMs can run.
pub fn check(config: &Config) -> ExitCode {
    let report = check::run(&Subject {
        vmm: config.hypervisor.path.clone(),
        kernel: config.hypervisor.kernel.clone(),
        image: config.hypervisor.image.clone(),
        state_dir: config.runtime.state_dir.clone(),
    });
    print!("{report}");
    if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Tells whether the configuration can be used.
pub fn configuration(loaded: &Result<Loaded, String>) -> ExitCode {
    match loaded {
        Ok(loaded) if loaded.files.is_empty() => {
            println!("ok    configuration: no file, every key has its default");
        }
        Ok(loaded) => {
            for file in &loaded.files {
                println!("ok    configuration: {}", file.display());
            }
        }
        Err(why) => {
            println!("FAIL  configuration: {why}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
