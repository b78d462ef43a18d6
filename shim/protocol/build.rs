// SPDX-License-Identifier: Apache-2.0
//! Generates the protocol's Rust from `proto/` (pure Rust: no protoc needed).

use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 12] = [
    "proto/types.proto",
    "proto/task.proto",
    "proto/shim.proto",
    "proto/shim_v3.proto",
    "proto/events.proto",
    "proto/forward.proto",
    "proto/metrics.proto",
    "proto/runtimeoptions.proto",
    "proto/runc.proto",
    "proto/bootstrap.proto",
    "proto/sandbox.proto",
    "proto/cri.proto",
];

fn main() {
    for proto in PROTOS {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .inputs(PROTOS)
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        // Nothing here is reflected on; descriptors would only make the shim
        // larger.
        .rust_protobuf_customize(
            ProtobufCustomize::default()
                .gen_mod_rs(false)
                .lite_runtime(true),
        )
        .run()
        .expect("the protocol's .proto files compile");

    // `include!` does not accept a file that starts with inner attributes or
    // inner doc comments; the generators write both.
    for entry in fs::read_dir(&out).expect("OUT_DIR is readable") {
        let path = entry.expect("OUT_DIR is readable").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            strip(&path);
        }
    }
}

fn strip(path: &Path) {
    let text = fs::read_to_string(path).expect("the generator wrote its output");
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(path, kept.join("\n")).expect("OUT_DIR is writable");
}
