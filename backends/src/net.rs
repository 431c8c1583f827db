//! Network cards (`--net`): a TAP interface of the host, or a network that needs no privileges.

use crate::backend::Backend;
use crate::broker::Broker;
use anyhow::{Context, Result};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::net::{Net, RingNet};
use armlet_system::eintr::uninterrupted;
use options::FLAG;
use passt::{Passt, PasstFrames};
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};
use tap::{Tap, TapFrames};
use vhost::VhostNet;

mod options;
pub mod passt;
mod sys;
pub mod tap;
#[cfg(test)]
mod tests;
pub mod vhost;

pub use options::{KIND, NetOptions, Network, VhostChoice};

impl NetOptions {
    /// Connects the card to its network. It is the machine's card `number`, from 0.
    ///
    /// # Errors
    /// What does not work, and what would.
    pub fn open(&self, number: usize, broker: Option<&Arc<Broker>>) -> Result<NetworkCard> {
        self.check().with_context(|| format!("{FLAG} {self}"))?;
        let open = || match &self.network {
            Network::Tap {
                name,
                queues,
                vhost,
            } => connect(Tap::open(name, *queues)?, *vhost),
            Network::Inherited { descriptors, vhost } => {
                connect(Tap::inherit(descriptors)?, *vhost)
            }
            Network::User { forwards } => {
                let broker = broker.context("nobody starts passt")?;
                let passt = Passt::start(broker, forwards, self.address(number)?)?;
                Ok(Connection::User(PasstFrames::new(passt)))
            }
        };
        Ok(NetworkCard {
            name: format!("net{number}"),
            mac: self.address(number)?,
            connection: open().with_context(|| format!("{FLAG} {self}"))?,
        })
    }

    /// The card's address. On a TAP other machines may hear it, so it is a random one; passt has
    /// one guest, which finds the same card each time.
    fn address(&self, number: usize) -> Result<[u8; 6]> {
        if let Some(mac) = self.mac {
            return Ok(mac);
        }
        let mut mac = [0x02, b'a', b'r', b'm', 0, number as u8];
        if !matches!(self.network, Network::User { .. }) {
            let count = uninterrupted(|| getrandom(&mut mac[..], GetRandomFlags::empty()));
            count.context("cannot choose a MAC address")?;
            // Of one machine, and administered locally (IEEE 802).
            mac[0] = mac[0] & 0xfc | 0x02;
        }
        Ok(mac)
    }
}

/// A network card's connection to the host.
pub struct NetworkCard {
    name: String,
    mac: [u8; 6],
    connection: Connection,
}

enum Connection {
    Tap(TapFrames),
    Vhost(VhostNet),
    User(PasstFrames),
}

fn connect(tap: Tap, vhost: VhostChoice) -> Result<Connection> {
    let tap = Arc::new(tap);
    if vhost != VhostChoice::Off {
        match VhostNet::open(&tap) {
            Ok(vhost) => return Ok(Connection::Vhost(vhost)),
            Err(error) if vhost == VhostChoice::On => return Err(error),
            Err(error) => log::info!("without vhost-net: {error:#}"),
        }
    }
    Ok(Connection::Tap(TapFrames(tap)))
}

impl Backend for NetworkCard {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        Ok(match &self.connection {
            Connection::Tap(tap) => Arc::new(Mutex::new(Net::new(tap.clone(), self.mac))),
            Connection::User(passt) => Arc::new(Mutex::new(Net::new(passt.clone(), self.mac))),
            Connection::Vhost(vhost) => {
                let card = RingNet::new(vhost.clone(), self.mac);
                Arc::new(Mutex::new(card.context("cannot make an epoll instance")?))
            }
        })
    }

    fn is_busy(&self) -> bool {
        !matches!(self.connection, Connection::Vhost(_))
    }
}
