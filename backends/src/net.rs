//! Network cards (`--net`): a TAP interface of the host, or a network that needs no privileges.

use crate::backend::{Backend, Flow};
use crate::broker::Broker;
use crate::timer;
use anyhow::{Context, Result};
use armlet_devices::counts::{Counts, Tally};
use armlet_devices::rate::Throttle;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::net::{Frames, Net, RingNet};
use armlet_system::eintr::uninterrupted;
use mmds::OpenMetadata;
use options::FLAG;
use passt::{Passt, PasstFrames};
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};
use tap::{Tap, TapFrames};
use vhost::VhostNet;

pub mod mmds;
mod options;
pub mod passt;
mod sys;
pub mod tap;
#[cfg(test)]
mod tests;
pub mod vhost;

pub use options::{KIND, NetOptions, Network, VhostChoice};

impl NetOptions {
    /// Connects the card to its network. It is the machine's card `number`, from 0; `changes` says whether
    /// limits may come.
    ///
    /// # Errors
    /// What does not work, and what would.
    pub fn open(
        &self,
        number: usize,
        broker: Option<&Arc<Broker>>,
        changes: bool,
    ) -> Result<NetworkCard> {
        self.check().with_context(|| format!("{FLAG} {self}"))?;
        let open = || match &self.network {
            Network::Tap {
                name,
                queues,
                vhost,
            } => self.connect(Tap::open(name, *queues)?, *vhost),
            Network::Inherited { descriptors, vhost } => {
                self.connect(Tap::inherit(descriptors)?, *vhost)
            }
            Network::User { forwards } => {
                let broker = broker.context("nobody starts passt")?;
                let passt = Passt::start(broker, forwards, self.address(number)?)?;
                Ok(Connection::User(PasstFrames::new(passt)))
            }
        };
        let metadata = || self.mmds.as_ref().map(OpenMetadata::open).transpose();
        let metadata = metadata().with_context(|| format!("{FLAG} {self}"))?;
        let connection = open().with_context(|| format!("{FLAG} {self}"))?;
        let by_kernel = matches!(connection, Connection::Vhost(_));
        let throttle = |limits| match by_kernel {
            true => Ok(None),
            false => timer::throttle(limits, changes),
        };
        let throttles = throttle(&self.receive).and_then(|it| Ok([it, throttle(&self.transmit)?]));
        let name = format!("net{number}");
        let throttles = throttles.with_context(|| format!("cannot make the timer of {name}"))?;
        Ok(NetworkCard {
            name,
            mac: self.address(number)?,
            metadata,
            connection,
            throttles,
            counts: Arc::default(),
        })
    }

    fn connect(&self, mut tap: Tap, vhost: VhostChoice) -> Result<Connection> {
        if let Some(mtu) = self.mtu {
            tap.tell_mtu(mtu);
        }
        let tap = Arc::new(tap);
        // The kernel would move as many frames as come, and those to metadata too.
        if vhost != VhostChoice::Off && !self.is_limited() && self.mmds.is_none() {
            match VhostNet::open(&tap) {
                Ok(vhost) => return Ok(Connection::Vhost(vhost)),
                Err(error) if vhost == VhostChoice::On => return Err(error),
                Err(error) => log::info!("without vhost-net: {error:#}"),
            }
        }
        Ok(Connection::Tap(TapFrames(tap)))
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
    metadata: Option<OpenMetadata>,
    connection: Connection,
    /// Of what is received, and of what is sent.
    throttles: [Option<Arc<Throttle>>; 2],
    counts: Arc<Counts>,
}

enum Connection {
    Tap(TapFrames),
    Vhost(VhostNet),
    User(PasstFrames),
}

impl Connection {
    /// Its frames, where they come through this process.
    fn frames(&self) -> Option<Box<dyn Frames>> {
        match self {
            Connection::Tap(tap) => Some(Box::new(tap.clone())),
            Connection::User(passt) => Some(Box::new(passt.clone())),
            Connection::Vhost(_) => None,
        }
    }
}

impl NetworkCard {
    fn card<N: Frames + 'static>(&self, network: N) -> Arc<Mutex<dyn VirtioDevice>> {
        let card = Net::new(network, self.mac)
            .held_to(self.throttles.clone())
            .counted_by(Arc::clone(&self.counts));
        Arc::new(Mutex::new(card))
    }
}

impl Backend for NetworkCard {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        if let (Some(metadata), Some(frames)) = (&self.metadata, self.connection.frames()) {
            return metadata.device(frames, self.mac, self.throttles.clone());
        }
        Ok(match &self.connection {
            Connection::Tap(tap) => self.card(tap.clone()),
            Connection::User(passt) => self.card(passt.clone()),
            Connection::Vhost(vhost) => {
                let card = RingNet::new(vhost.clone(), self.mac);
                Arc::new(Mutex::new(card.context("cannot make an epoll instance")?))
            }
        })
    }

    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        let [receive, transmit] = &self.throttles;
        match flow {
            Flow::Receive => receive.as_deref(),
            Flow::Transmit => transmit.as_deref(),
            Flow::All => None,
        }
    }

    /// What the kernel carries is not counted here.
    fn tally(&self) -> Option<Tally> {
        let is_ours = !matches!(self.connection, Connection::Vhost(_));
        is_ours.then(|| self.counts.tally())
    }

    fn is_busy(&self) -> bool {
        !matches!(self.connection, Connection::Vhost(_))
    }
}
