// SPDX-License-Identifier: Apache-2.0
//! x86-64: memory layout, PVH boot, ACPI tables, CPUID and registers.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod features;
pub mod image;
pub mod layout;
pub mod regs;
