// SPDX-License-Identifier: Apache-2.0
//! The socket: one message a packet, descriptors beside it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        recvmsg, sendmsg, socketpair, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags,
        SockFlag, SockType,
    },
};
use serde::{de::DeserializeOwned, Serialize};

use crate::{MAX_FDS, MAX_MESSAGE};

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed; `WouldBlock` on a non-blocking one.
    #[error("control socket")]
    Socket(#[source] io::Error),
    /// The other side is gone.
    #[error("control connection ended")]
    Closed,
    /// The message is not one of the protocol's. The connection stays usable.
    #[error("control message is not understood")]
    Malformed(#[source] serde_json::Error),
    /// Longer than [`MAX_MESSAGE`], or with more than [`MAX_FDS`] descriptors.
    #[error("control message is too large")]
    TooLarge,
}

impl ChannelError {
    /// Whether a non-blocking socket has nothing to give, or no room, now.
    pub fn would_block(&self) -> bool {
        matches!(self, Self::Socket(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// One end of the control connection.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Both ends of a new connection, close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        Ok((Self { socket: ours }, Self { socket: theirs }))
    }

    /// Takes an inherited socket.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one message, with descriptors.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Malformed)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(error) => return Err(ChannelError::Socket(error.into())),
            }
        }
    }

    /// Receives one message, with descriptors, which are close-on-exec.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        // As long as it is: the largest would be 16 pages to be cleared, for each.
        let mut buffer = vec![0; self.next_length()?.min(MAX_MESSAGE)];
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        let (length, truncated, fds) = loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let message = match recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut slices,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Ok(message) => message,
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(error) => return Err(ChannelError::Socket(error.into())),
            };
            let mut fds = Vec::new();
            if let Ok(messages) = message.cmsgs() {
                for control in messages {
                    if let ControlMessageOwned::ScmRights(received) = control {
                        fds.extend(received.into_iter().map(sys::own));
                    }
                }
            }
            let cut = MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC;
            break (message.bytes, message.flags.intersects(cut), fds);
        };
        if length == 0 {
            return Err(ChannelError::Closed);
        }
        if truncated {
            return Err(ChannelError::TooLarge);
        }
        let message = serde_json::from_slice(&buffer[..length]).map_err(ChannelError::Malformed)?;
        Ok((message, fds))
    }

    /// Bytes of the next message, which stays where it is.
    fn next_length(&self) -> Result<usize, ChannelError> {
        let look = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        loop {
            match recvmsg::<()>(self.socket.as_raw_fd(), &mut [], None, look) {
                Ok(message) => return Ok(message.bytes),
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(error) => return Err(ChannelError::Socket(error.into())),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The one thing here that the compiler cannot check.
mod sys {
    #![allow(unsafe_code)]

    use super::{FromRawFd, OwnedFd, RawFd};

    /// Takes a descriptor that the kernel has just installed for us.
    pub fn own(fd: RawFd) -> OwnedFd {
        // SAFETY: SCM_RIGHTS installed it in this process for this message,
        // and the caller passes each once.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use super::*;
    use crate::{Call, Request};

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let (ours, theirs) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let request = Request {
            id: 1,
            call: Call::Boot,
        };
        ours.send(&request, &[writer.as_fd()]).unwrap();
        drop(writer);
        let (received, fds) = theirs.receive::<Request>().unwrap();
        assert_eq!(received, request);
        let mut file = File::from(fds.into_iter().next().unwrap());
        file.write_all(b"through").unwrap();
        drop(file);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn the_end_and_nonsense_are_told_apart() {
        let (ours, theirs) = Channel::pair().unwrap();
        ours.send(&serde_json::json!({"id": 1, "call": "dance"}), &[])
            .unwrap();
        assert!(matches!(
            theirs.receive::<Request>(),
            Err(ChannelError::Malformed(_))
        ));
        drop(ours);
        assert!(matches!(
            theirs.receive::<Request>(),
            Err(ChannelError::Closed)
        ));
    }

    #[test]
    fn too_much_is_refused() {
        let (ours, _theirs) = Channel::pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert!(matches!(ours.send(&long, &[]), Err(ChannelError::TooLarge)));
    }

    #[test]
    fn what_another_sends_that_is_too_long_is_gone_with_its_descriptors() {
        let (ours, theirs) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let long = vec![b' '; MAX_MESSAGE + 1];
        let raw = [writer.as_raw_fd()];
        sendmsg::<()>(
            ours.as_raw_fd(),
            &[IoSlice::new(&long)],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(writer);
        ours.send(&"next", &[]).unwrap();
        assert!(matches!(
            theirs.receive::<String>(),
            Err(ChannelError::TooLarge)
        ));
        // Nobody holds the other end.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        assert_eq!(theirs.receive::<String>().unwrap().0, "next");
    }
}
