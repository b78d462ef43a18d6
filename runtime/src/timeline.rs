// SPDX-License-Identifier: Apache-2.0
//! The start timeline: when each step of a pod's start happened, logged as
//! one line.
