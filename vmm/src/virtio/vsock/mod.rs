// SPDX-License-Identifier: Apache-2.0
//! virtio-vsock (virtio 1.2 §5.10) behind Unix stream sockets.
//!
//! A connection of the guest to host port P goes to the Unix socket
//! `<uds_path>_<P>`. A host program that connects to the listener, writes
//! `CONNECT <port>\n` and reads `OK <host port>\n` is connected to that port
//! of the guest. Both directions close on their own, and both are paced by
//! credit: neither side can make the other hold more than it announced.

mod connection;
mod device;
mod event;
mod handshake;
mod muxer;
mod packet;
mod state;
#[cfg(test)]
mod tests;

pub use device::Vsock;
