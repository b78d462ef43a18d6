// SPDX-License-Identifier: Apache-2.0
//! Generates the protocol's Rust from `proto/` (pure Rust: no protoc needed).

use std::{env, fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 2] = ["proto/oci.proto", "proto/agent.proto"];

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
        .rust_protobuf_customize(
            // No reflection: nobody prints or walks messages, and its tables
            // would be guest memory.
            ProtobufCustomize::default()
                .gen_mod_rs(false)
                .lite_runtime(true),
        )
        .run()
        .expect("the protocol's .proto files compile");

    // `include!` does not accept a file that starts with inner attributes or
    // inner doc comments; the generators write both.
    for name in ["oci.rs", "agent.rs", "agent_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text = fs::read_to_string(&path).expect("the generator wrote its output");
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
