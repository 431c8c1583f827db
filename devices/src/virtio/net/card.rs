//! What every network card has: its configuration space, its features and the control queue.

use std::sync::Arc;

use super::feature;
use super::network::{CONTROL_ENTRIES, ENTRIES, LEAST_MTU, LONGEST_HEADER, Network};
use crate::virtio::quiesced;
use crate::virtio::state::{NetSession, NetState};
use crate::virtio::{
    ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, StartError, Virtqueue,
};

/// VIRTIO_NET_S_LINK_UP (virtio 1.2, section 5.1.4).
const LINK_UP: u16 = 1;
/// Offset of the status in the configuration space, in bytes.
const STATUS: usize = 6;

/// VIRTIO_NET_CTRL_MAC and its command to set the address (virtio 1.2, section 5.1.6.5.2).
const MAC_SET: [u8; 2] = [1, 1];
/// VIRTIO_NET_CTRL_MQ: the number of pairs in use (section 5.1.6.5.6).
const PAIRS_SET: [u8; 2] = [4, 0];
/// VIRTIO_NET_CTRL_GUEST_OFFLOADS (section 5.1.6.5.8).
const OFFLOADS_SET: [u8; 2] = [5, 0];
/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
const ANSWERS: [u8; 2] = [0, 1];

/// A card without its queues of frames.
pub(super) struct Card {
    mac: [u8; 6],
    pairs: u16,
    /// In bytes, where the driver is told of it.
    mtu: Option<u16>,
    features: u64,
    config: Arc<ConfigSpace>,
    is_up: bool,
    running: Option<Running>,
    /// What the driver asked for, while the machine is held.
    paused: Option<NetSession>,
}

/// What a driver that runs has asked for.
struct Running {
    features: u64,
    link: Arc<Link>,
    control: Option<Virtqueue>,
    /// Pairs of queues in use.
    active: u16,
    /// Of the offloads, those that the driver wants now.
    offloads: u64,
}

impl Card {
    pub(super) fn new(network: &impl Network, mac: [u8; 6]) -> Card {
        let pairs = network.pairs();
        let offloads = network.offloads() & (feature::GUEST_OFFLOADS | feature::HOST_OFFLOADS);
        let mut features = offloads
            | feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_MAC_ADDR;
        if offloads & feature::GUEST_OFFLOADS != 0 {
            features |= feature::CTRL_GUEST_OFFLOADS;
        }
        if pairs > 1 {
            features |= feature::MQ;
        }
        let mtu = network.mtu().filter(|mtu| *mtu >= LEAST_MTU);
        if mtu.is_some() {
            features |= feature::MTU;
        }
        // struct virtio_net_config (virtio 1.2, section 5.1.4).
        let status = if network.is_up() { LINK_UP } else { 0 };
        let mut config = mac.to_vec();
        for field in [status, pairs, mtu.unwrap_or(0)] {
            config.extend(field.to_le_bytes());
        }
        Card {
            mac,
            pairs,
            mtu,
            features,
            config: ConfigSpace::new(config),
            is_up: network.is_up(),
            running: None,
            paused: None,
        }
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    pub(super) fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    pub(super) fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![ENTRIES; 2 * usize::from(self.pairs)];
        sizes.push(CONTROL_ENTRIES);
        sizes
    }

    /// A driver starts, with one pair in use, or goes on with what it asked for before. Returns the
    /// pairs of queues that it may have.
    pub(super) fn start(
        &mut self,
        driver: &mut Driver,
        network: &mut impl Network,
    ) -> Result<usize, StartError> {
        let features = driver.features;
        let NetSession { pairs, offloads } = self.paused.take().unwrap_or(NetSession {
            pairs: 1,
            offloads: features & feature::GUEST_OFFLOADS,
        });
        let others = features & !feature::GUEST_OFFLOADS;
        network
            .configure(pairs, offloads | others)
            .map_err(StartError)?;
        let control = match features & feature::CTRL_VQ != 0 {
            true => driver.take(self.control_index(features)),
            false => None,
        };
        self.running = Some(Running {
            features,
            link: Arc::clone(&driver.link),
            control,
            active: pairs,
            offloads,
        });
        Ok(match features & feature::MQ != 0 {
            true => usize::from(self.pairs),
            false => 1,
        })
    }

    /// The machine is held: returns where the control queue stands.
    pub(super) fn quiesce(&mut self) -> Positions {
        let Some(mut running) = self.running.take() else {
            return Positions::new();
        };
        self.paused = Some(NetSession {
            pairs: running.active,
            offloads: running.offloads,
        });
        quiesced(running.control.as_mut())
    }

    /// The card's state with these frames, while the machine is held.
    pub(super) fn save(&self, frames: Vec<(u16, Vec<u8>)>) -> DeviceState {
        let mut mac = [0; 6];
        self.config.read(0, &mut mac);
        DeviceState::Net(NetState {
            mac,
            session: self.paused,
            frames,
        })
    }

    /// Takes over what was saved.
    ///
    /// # Errors
    /// What this card cannot be.
    pub(super) fn restore(
        &mut self,
        mac: [u8; 6],
        session: Option<NetSession>,
    ) -> Result<(), RestoreError> {
        if !is_unicast(mac) {
            return Err(RestoreError(format!(
                "no card can have the MAC address {mac:02x?}"
            )));
        }
        if let Some(NetSession { pairs, offloads }) = session {
            if !(1..=self.pairs).contains(&pairs) {
                let most = self.pairs;
                return Err(RestoreError(format!(
                    "{pairs} pairs of queues were in use, and the network has 1 to {most}"
                )));
            }
            let lacking = offloads & !(self.features & feature::GUEST_OFFLOADS);
            if lacking != 0 {
                return Err(RestoreError(format!(
                    "the driver has offloads {lacking:#x}, which the network does not have here"
                )));
            }
        }
        self.config
            .change(|config| config[..6].copy_from_slice(&mac));
        self.paused = session;
        Ok(())
    }

    /// Forgets what the driver asked for, and configures the network as for none.
    pub(super) fn reset(&mut self, network: &mut impl Network) {
        let (running, paused) = (self.running.take(), self.paused.take());
        if running.is_none() && paused.is_none() {
            return;
        }
        // Whoever comes next configures it anew; what goes wrong here is heard of then.
        let _ = network.configure(1, 0);
        let mac = self.mac;
        self.config
            .change(|config| config[..6].copy_from_slice(&mac));
    }

    /// Where the control queue is (virtio 1.2, section 5.1.2).
    fn control_index(&self, features: u64) -> usize {
        match features & feature::MQ != 0 {
            true => 2 * usize::from(self.pairs),
            false => 2,
        }
    }

    /// Whether the queue of this index is the control queue.
    pub(super) fn is_control(&self, queue: usize) -> bool {
        let running = self.running.as_ref();
        running.is_some_and(|running| queue == self.control_index(running.features))
    }

    /// The control queue, if there is one.
    pub(super) fn control(&self) -> Option<&Virtqueue> {
        self.running.as_ref()?.control.as_ref()
    }

    /// Sets the control queue, or none.
    pub(super) fn set_control(&mut self, control: Option<Virtqueue>) {
        if let Some(running) = &mut self.running {
            running.control = control;
        }
    }

    /// The features that the driver that runs agreed to.
    pub(super) fn agreed(&self) -> u64 {
        self.running.as_ref().map_or(0, |running| running.features)
    }

    /// Which of the offloads the driver wants now.
    pub(super) fn offloads(&self) -> u64 {
        self.running.as_ref().map_or(0, |running| running.offloads)
    }

    /// The most bytes of a frame that is not to be segmented, where the driver was told of an MTU.
    pub(super) fn longest_frame(&self) -> Option<usize> {
        let mtu = self.mtu.filter(|_| self.agreed() & feature::MTU != 0)?;
        Some(usize::from(mtu) + LONGEST_HEADER)
    }

    /// Pairs of queues in use.
    pub(super) fn active(&self) -> usize {
        let running = self.running.as_ref();
        running.map_or(0, |running| usize::from(running.active))
    }

    /// The way to the driver that runs.
    pub(super) fn link(&self) -> Option<&Link> {
        self.running.as_ref().map(|running| &*running.link)
    }

    /// Shows the driver whether the link is up.
    pub(super) fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.is_up, up) == up {
            return;
        }
        let status = if up { LINK_UP } else { 0 };
        self.config
            .change(|config| config[STATUS..STATUS + 2].copy_from_slice(&status.to_le_bytes()));
        if let Some(running) = &self.running
            && running.features & feature::STATUS != 0
        {
            running.link.config_changed();
        }
    }

    /// Asks the driver for a reset, as it broke a ring.
    pub(super) fn broken(&self, what: &str) {
        if let Some(link) = self.link() {
            link.broken(format_args!("{what}"));
        }
    }

    /// Shows the link as down from here on, as the network is gone for good.
    pub(super) fn lose(&mut self, why: &str) {
        let name = self.link().map_or("the network", Link::name);
        log::warn!("{name}: {why}; the guest's link is down from here on");
        self.set_link(false);
    }

    /// Answers the requests in the control queue.
    pub(super) fn serve(&mut self, network: &mut impl Network) {
        let (config, pairs) = (&self.config, self.pairs);
        let Some(running) = &mut self.running else {
            return;
        };
        let Some(mut control) = running.control.take() else {
            return;
        };
        control.serve(|queue, chain| {
            if !chain.is_whole() {
                let written = chain.write(queue.memory(), 0, &ANSWERS[1..]);
                queue.complete(chain, written as u32);
                return;
            }
            let mut request = [0; 10];
            let size = chain.read(queue.memory(), 0, &mut request);
            if size < 2 || chain.writable_len() == 0 {
                queue.break_ring(format_args!(
                    "a control request has no command or no room for an answer"
                ));
                return;
            }
            let taken = running.command(&request[..size], pairs, config, network);
            let answer = match taken {
                Ok(()) => ANSWERS[0],
                Err(what) => {
                    running.link.fault(format_args!("{what}"));
                    ANSWERS[1]
                }
            };
            let written = chain.write(queue.memory(), 0, &[answer]);
            queue.complete(chain, written as u32);
        });
        running.control = Some(control);
    }
}

impl Running {
    /// Does what a control request asks for.
    fn command(
        &mut self,
        request: &[u8],
        pairs: u16,
        config: &ConfigSpace,
        network: &mut impl Network,
    ) -> Result<(), String> {
        let (command, data) = request.split_at(2);
        let has = |feature: u64| self.features & feature != 0;
        if command == MAC_SET && has(feature::CTRL_MAC_ADDR) {
            let mac = data.first_chunk::<6>().filter(|mac| is_unicast(**mac));
            let mac = mac.ok_or("the driver sets a MAC address that no card can have")?;
            config.change(|config| config[..6].copy_from_slice(mac));
            return Ok(());
        }
        if command == PAIRS_SET && has(feature::MQ) {
            let wanted = data.first_chunk().map(|bytes| u16::from_le_bytes(*bytes));
            let wanted = wanted.filter(|wanted| (1..=pairs).contains(wanted));
            let wanted = wanted.ok_or("the driver sets a number of queues that cannot be")?;
            network.configure(wanted, self.offloads)?;
            self.active = wanted;
            return Ok(());
        }
        if command == OFFLOADS_SET && has(feature::CTRL_GUEST_OFFLOADS) {
            let wanted = data.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
            let possible = self.features & feature::GUEST_OFFLOADS;
            let wanted = wanted.filter(|wanted| wanted & !possible == 0);
            let wanted = wanted.ok_or("the driver sets offloads that were not negotiated")?;
            network.configure(self.active, wanted)?;
            self.offloads = wanted;
            return Ok(());
        }
        Err(format!(
            "the driver sends a control request that it was not offered: class {}, command {}",
            command[0], command[1]
        ))
    }
}

/// Whether a card can have this address: of one machine, and not all zero.
#[must_use]
pub(super) fn is_unicast(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}
