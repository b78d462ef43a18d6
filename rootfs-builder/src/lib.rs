// SPDX-License-Identifier: Apache-2.0
//! The guest image: the agent as `/sbin/init` and the few directories and
//! files around it, as an EROFS image for virtio-pmem and as an initrd. Equal
//! inputs give equal bytes.

#![forbid(unsafe_code)]

pub mod cpio;
pub mod erofs;
pub mod tree;
