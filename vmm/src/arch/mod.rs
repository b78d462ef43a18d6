// SPDX-License-Identifier: Apache-2.0
//! What depends on the processor's architecture.

pub mod x86_64;
