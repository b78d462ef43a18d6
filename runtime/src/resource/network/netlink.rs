// SPDX-License-Identifier: Apache-2.0
//! The netlink requests that attaching a network takes, by name.

use futures_util::TryStreamExt;
use rtnetlink::{
    packet_route::link::{LinkAttribute, LinkFlags, LinkMessage},
    Handle, LinkUnspec,
};

use super::NetworkError;

/// Parent of ingress filters (`ffff:`).
const INGRESS: u32 = 0xffff_0000;

/// `ETH_P_ALL` in network byte order, as tc wants its protocol.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

/// A netlink connection in the namespace of the thread that made it.
#[derive(Clone)]
pub struct Netlink {
    pub(super) handle: Handle,
}

/// For `map_err`: names the step.
pub(super) fn failed(step: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let step = step.into();
    move |source| NetworkError::Netlink { step, source }
}

impl Netlink {
    /// Connects; the runtime's thread drives the connection.
    pub fn connect() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetworkError::System {
                step: "netlink socket could not be opened".into(),
                source,
            })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Every link of the namespace.
    pub async fn links(&self) -> Result<Vec<LinkMessage>, NetworkError> {
        self.handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("interfaces could not be listed"))
    }

    async fn find(&self, name: &str) -> Result<Option<u32>, NetworkError> {
        Ok(self
            .links()
            .await?
            .into_iter()
            .find(|link| {
                link.attributes
                    .iter()
                    .any(|a| matches!(a, LinkAttribute::IfName(n) if n == name))
            })
            .map(|link| link.header.index))
    }

    /// Index of the interface called `name`.
    pub async fn index_of(&self, name: &str) -> Result<u32, NetworkError> {
        self.find(name).await?.ok_or_else(|| NetworkError::System {
            step: format!("interface {name} not found"),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }

    /// Sets the MTU and brings the interface up.
    pub async fn bring_up(&self, index: u32, name: &str, mtu: u32) -> Result<(), NetworkError> {
        let mut message = LinkUnspec::new_with_index(index).up().mtu(mtu).build();
        message.header.change_mask |= LinkFlags::Up;
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(failed(format!("{name} could not be brought up")))
    }

    /// Redirects everything that arrives at `from` out of `to`.
    pub async fn redirect(&self, from: u32, name: &str, to: u32) -> Result<(), NetworkError> {
        let index = from as i32;
        self.handle
            .qdisc()
            .add(index)
            .ingress()
            .execute()
            .await
            .map_err(failed(format!(
                "ingress qdisc could not be added to {name}"
            )))?;
        self.handle
            .traffic_filter(index)
            .add()
            .parent(INGRESS)
            // In this order: `priority` overwrites the protocol.
            .priority(1)
            .protocol(ALL_PROTOCOLS)
            .redirect(to)
            .map_err(failed(format!("redirect from {name} could not be built")))?
            .execute()
            .await
            .map_err(failed(format!(
                "redirect from {name} could not be added (does the host have cls_u32 and act_mirred?)"
            )))
    }

    /// Removes an interface; nothing when there is none of that name.
    pub async fn remove_link(&self, name: &str) -> Result<(), NetworkError> {
        match self.find(name).await? {
            Some(index) => self
                .handle
                .link()
                .del(index)
                .execute()
                .await
                .map_err(failed(format!("{name} could not be removed"))),
            None => Ok(()),
        }
    }

    /// Removes the ingress qdisc; nothing when there is none.
    pub async fn remove_ingress(&self, name: &str) -> Result<(), NetworkError> {
        let Some(index) = self.find(name).await? else {
            return Ok(());
        };
        let mut request = self.handle.qdisc().del(index as i32);
        let message = request.message_mut();
        message.header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
        message.header.handle = INGRESS.into();
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) if matches!(error.raw_code(), e if e == -libc::ENOENT || e == -libc::EINVAL) => {
                Ok(())
            }
            other => other.map_err(failed(format!(
                "ingress qdisc could not be removed from {name}"
            ))),
        }
    }
}
