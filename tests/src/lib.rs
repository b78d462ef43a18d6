// SPDX-License-Identifier: Apache-2.0
//! What Bulkhead's whole-system tests stand on.
//!
//! * [`boxed`]: the *KVM host in a box*: an emulated machine with SVM that
//!   shares this machine's file system, for hosts that cannot run microVMs.
//! * [`host`]: which of the two a test uses.
//! * [`containerd`], [`image`], [`install`]: a private containerd, an image
//!   made without a registry, and where the build products are.
//! * [`cri`]: a containerd for pods, with crictl; [`critest_images`]: what
//!   critest runs beside the images that everything has.
//! * [`guest`]: a guest and its agent without the runtime; [`start`]: one that
//!   boots, and one that was saved; [`stamp`]: a program for it that tells when it
//!   began; [`load`]: one that uses its devices.
//! * [`timeline`]: the start timeline that the shim logs.
//! * [`init`]: PID 1 of the box.

#![deny(unsafe_code)] // sys alone talks to the kernel without a safe wrapper

pub mod bench;
pub mod boxed;
pub mod containerd;
pub mod cri;
pub mod critest_images;
pub mod guest;
pub mod host;
pub mod image;
pub mod init;
pub mod inside;
pub mod install;
pub mod listing;
pub mod load;
pub mod proc;
pub mod stamp;
pub mod start;
pub mod sys;
pub mod timeline;
pub mod tracing;
pub mod vmm;

pub use sys::{in_terminal, kvm_create_vm, set_window_size, window_size, Mergeable};
