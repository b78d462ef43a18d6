// SPDX-License-Identifier: Apache-2.0
//! PID 1 of the KVM host in a box.

fn main() {
    bulkhead_tests::init::main();
}
