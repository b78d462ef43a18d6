// SPDX-License-Identifier: Apache-2.0
//! Virtio devices (virtio 1.2) and what they share.

pub mod device;
