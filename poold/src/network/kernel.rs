//! Links and addresses of this network namespace, by rtnetlink.

use super::plan::{Link, Step};
use futures::TryStreamExt as _;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVlan, new_connection};
use std::{collections::HashMap, io, net::IpAddr};
use tokio::task::JoinHandle;

/// The kernel can't be asked, or refuses.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No socket.
    #[error("rtnetlink can't be reached: {0}")]
    Connect(#[from] io::Error),
    /// A request.
    #[error("the kernel does not {action}: {source}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// Its answer.
        source: Box<rtnetlink::Error>,
    },
}

fn refused(action: &'static str) -> impl FnOnce(rtnetlink::Error) -> KernelError {
    move |source| KernelError::Refused { action, source: Box::new(source) }
}

/// A connection to the kernel, for a few passes.
pub struct Kernel {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Kernel {
    /// Connects in the network namespace of this process.
    ///
    /// # Errors
    /// No socket.
    pub fn connect() -> Result<Self, KernelError> {
        let (connection, handle, _) = new_connection()?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// All links.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn links(&self) -> Result<Vec<Link>, KernelError> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(refused("list its links"))?;
        let mut addresses: HashMap<u32, Vec<_>> = HashMap::new();
        let mut found = std::pin::pin!(self.handle.address().get().execute());
        while let Some(message) = found.try_next().await.map_err(refused("list its addresses"))? {
            for attribute in &message.attributes {
                if let AddressAttribute::Local(IpAddr::V4(address)) = attribute {
                    let of_link = addresses.entry(message.header.index).or_default();
                    of_link.push((*address, message.header.prefix_len));
                }
            }
        }
        let mut links: Vec<Link> = messages.iter().map(link).collect();
        for link in &mut links {
            link.addresses = addresses.remove(&link.index).unwrap_or_default();
        }
        Ok(links)
    }

    /// Does one step.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn carry_out(&self, step: &Step) -> Result<(), KernelError> {
        let links = self.handle.link();
        match step {
            Step::AddBridge { name, .. } => {
                let bridge = LinkBridge::new(name).build();
                links.add(bridge).execute().await.map_err(refused("make a bridge"))
            }
            Step::AddVlan { name, uplink, vlan, .. } => {
                let vlan = LinkVlan::new(name, *uplink, *vlan).build();
                links.add(vlan).execute().await.map_err(refused("make a VLAN"))
            }
            Step::Mark { link, alias } => {
                let marked = LinkUnspec::new_with_index(*link).alias(alias.clone()).build();
                links.set(marked).execute().await.map_err(refused("mark a link"))
            }
            Step::Enslave { link, bridge, .. } => {
                let port = LinkUnspec::new_with_index(*link).controller(*bridge).build();
                links.set(port).execute().await.map_err(refused("put a link on its bridge"))
            }
            Step::Up { link } => {
                let up = LinkUnspec::new_with_index(*link).up().build();
                links.set(up).execute().await.map_err(refused("switch a link on"))
            }
            Step::AddAddress { link, address, prefix_len, .. } => {
                let add = self.handle.address().add(*link, IpAddr::V4(*address), *prefix_len);
                add.execute().await.map_err(refused("give a bridge its address"))
            }
            Step::Remove { link } => links.del(*link).execute().await.map_err(refused("remove a link")),
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        is_up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Controller(master) => link.master = Some(*master),
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
            }
            _ => {}
        }
    }
    link
}
