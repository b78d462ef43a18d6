// SPDX-License-Identifier: Apache-2.0
//! virtio-vsock (virtio 1.2 §5.10) in user space, behind Unix stream sockets:
//! no vhost-vsock module, and no context ids shared by all VMs of a host.
//!
//! Host to guest: a client connects to the listener, writes `CONNECT <port>\n`
//! and reads `OK <host port>\n`; what follows is the stream. Guest to host: a
//! connection to port P of CID 2 goes to the Unix socket `<uds_path>_<P>`.
//!
//! [`packet`] reads and writes packets in guest memory, [`connection`] decides
//! (no input, no output), [`muxer`] and [`stream`] do what was decided with
//! sockets and queues, [`handshake`] reads the clients' line.

mod connection;
mod device;
mod event;
mod handshake;
mod muxer;
mod packet;
mod rx;
mod state;
mod stream;
mod sys;
#[cfg(test)]
mod tests;

pub use device::Vsock;
