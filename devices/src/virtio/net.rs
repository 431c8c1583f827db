//! The network card (virtio 1.2, section 5.1).
//!
//! A [`Net`] moves frames between its queues and the host's end of the card, which has [`Frames`]:
//! a TAP, a socket. Of a [`RingNet`] the host's end works on the queues by itself ([`Rings`]:
//! vhost-net), and only the control queue comes here.

use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use self::card::Card;
use self::receive::Receiver;
use self::send::Transmitter;
use super::queue::{Segment, parts};
use super::{
    ConfigSpace, DeviceState, Driver, Positions, RestoreError, Source, StartError, VirtioDevice,
    Virtqueue,
};

mod card;
mod receive;
mod rings;
mod send;
#[cfg(test)]
mod tests;

pub use card::NetSession;
pub use receive::Room;
pub use rings::{RingNet, Rings};

/// Feature bits of a network card (virtio 1.2, section 5.1.3).
pub mod feature {
    /// The device takes frames whose checksum is to be completed.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames whose checksum is to be completed.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may change what it takes while it runs.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// The configuration space has an MTU.
    pub const MTU: u64 = 1 << 3;
    /// The configuration space has a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP over IPv4 in frames longer than the MTU.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes TCP over IPv6 in frames longer than the MTU.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes such frames with congestion marks.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TCP over IPv4 in frames longer than the MTU.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes TCP over IPv6 in frames longer than the MTU.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes such frames with congestion marks.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A frame may lie in several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The configuration space says whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There may be several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The driver may set the MAC address by the control queue.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// The driver takes UDP over IPv4 in frames longer than the MTU.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes UDP over IPv6 in frames longer than the MTU.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP in frames longer than the MTU.
    pub const HOST_USO: u64 = 1 << 56;

    /// What the driver takes over from the host.
    pub const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
    /// What the host takes over from the driver.
    pub const HOST_OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
}

/// Device ID.
const ID: u32 = 1;
/// Entries of a queue of frames. A frame of 64 KiB takes 16 of the guest's buffers. Where fewer are
/// left than the next one needs, vhost-net looks again and again until the guest brings more
/// (drivers/vhost/net.c, handle_rx): with 256, bulk data cost its thread twice the work.
const ENTRIES: u16 = 512;
/// Entries of the control queue.
const CONTROL_ENTRIES: u16 = 16;
/// Bytes of struct virtio_net_hdr before each frame (virtio 1.2, section 5.1.6).
pub const HEADER: usize = 12;
/// Bytes of the longest frame with its header: 64 KiB behind an Ethernet header with a VLAN tag.
pub const MOST_BYTES: usize = HEADER + 14 + 4 + (64 << 10);
/// Bytes of an Ethernet header, and so of the shortest frame.
const LEAST_FRAME: usize = 14;
/// Bytes of an Ethernet header with a VLAN tag: a frame may have as many beyond the MTU.
const LONGEST_HEADER: usize = LEAST_FRAME + 4;
/// The smallest MTU that a card may tell of (virtio 1.2, section 5.1.4.1), that of IPv4 (RFC 791).
const LEAST_MTU: u16 = 68;
/// The most frames that a queue moves in one go: then the driver hears of them, and the other
/// queues get their turn.
const BATCH: usize = 64;

/// The host's end of a network card.
pub trait Network: Send {
    /// Which of [`feature::GUEST_OFFLOADS`] and [`feature::HOST_OFFLOADS`] it can do.
    fn offloads(&self) -> u64;

    /// How many pairs of queues it can serve, from 1.
    fn pairs(&self) -> u16 {
        1
    }

    /// The MTU in bytes that the driver should use, where it is not Ethernet's 1500; it is told once.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Whether frames can go through at present.
    fn is_up(&self) -> bool {
        true
    }

    /// What it waits for; frames by edges.
    fn sources(&self) -> Vec<Source>;

    /// A source is ready: what that means.
    fn woken(&mut self, source: usize) -> Woken;

    /// Uses the first `pairs` pairs of queues from now on, with frames that ask of the driver no
    /// more than the features `offloads`.
    ///
    /// # Errors
    /// What the host refuses, in words.
    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String>;
}

/// A [`Network`] that takes and gives frames.
pub trait Frames: Network {
    /// Whether its frames have virtio's header of [`HEADER`] bytes; otherwise it gets and gives
    /// bare ones.
    fn has_header(&self) -> bool;

    /// Sends a frame. It never waits.
    ///
    /// # Errors
    /// What became of the frame instead.
    fn send(&mut self, pair: usize, frame: Frame<'_>) -> Result<(), Trouble>;

    /// Puts the frame that came next into `room`, which is large enough for any, and returns its
    /// bytes. It never waits.
    ///
    /// # Errors
    /// Why there is none.
    fn receive(&mut self, pair: usize, room: Room<'_>) -> Result<usize, Trouble>;
}

/// What a source that is ready means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Woken {
    /// For the card nothing.
    Nothing,
    /// Frames may have come for this pair of queues, or can be sent again.
    Frames(usize),
    /// The link came up or went down.
    Link(bool),
    /// The driver broke a ring that the host's end works on, in words.
    Broken(String),
    /// The network is gone for good, and why.
    Gone(String),
}

/// Why a frame was not moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Not now: a source will be ready when it can be tried again.
    Wait,
    /// This one is lost, and why; the next may fare better.
    Lost(String),
    /// The network is gone for good, and why.
    Gone(String),
}

/// A frame to send, in guest memory; never empty.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    skip: usize,
}

impl<'a> Frame<'a> {
    /// Its bytes, counted.
    #[must_use]
    pub fn size(&self) -> usize {
        let all: usize = self.segments.iter().map(|segment| segment.len).sum();
        all - self.skip
    }

    /// Its bytes, piece by piece.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        slices(self.memory, self.segments, self.skip)
    }
}

/// The bytes of `segments` from `skip`. All of them are in memory, as their queue has checked.
fn slices<'a>(
    memory: &'a GuestMemoryMmap,
    segments: &'a [Segment],
    skip: usize,
) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
    parts(segments, skip, usize::MAX)
        .flat_map(move |part| memory.get_slices(part.address, part.len))
        .map_while(Result::ok)
}

/// What a network card has of its own beside its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetState {
    /// The MAC address that the driver sees.
    pub mac: [u8; 6],
    /// What the driver asked for, where one uses the card.
    pub session: Option<NetSession>,
    /// Frames that came and wait for the driver's buffers, with virtio's header: at most one a pair
    /// of queues, by the pair's number.
    pub frames: Vec<(u16, Vec<u8>)>,
}

/// A network card of which this process moves each frame.
pub struct Net<N: Frames> {
    card: Card,
    network: N,
    pairs: Vec<Pair>,
    /// Whether the network is gone: then what is sent is thrown away.
    gone: bool,
    /// Frames that wait for the driver's buffers while the machine is held, by pair.
    frames: Vec<(u16, Vec<u8>)>,
}

/// A pair of queues, as far as the driver has them.
struct Pair {
    receiver: Option<Receiver>,
    transmitter: Option<Transmitter>,
}

impl<N: Frames> Net<N> {
    /// A card with this MAC address at `network`.
    #[must_use]
    pub fn new(network: N, mac: [u8; 6]) -> Net<N> {
        Net {
            card: Card::new(&network, mac),
            network,
            pairs: Vec::new(),
            gone: false,
            frames: Vec::new(),
        }
    }

    /// Moves what can be moved through a pair of queues.
    fn move_frames(&mut self, pair: usize) {
        self.receive(pair);
        self.send(pair);
    }

    fn receive(&mut self, pair: usize) {
        let is_used = pair < self.card.active();
        let offloads = self.card.offloads();
        let Some(receiver) = self.pairs.get_mut(pair).map(|pair| &mut pair.receiver) else {
            return;
        };
        if let Some(receiver) = receiver
            && is_used
            && !self.gone
            && let Err(why) = receiver.run(&mut self.network, pair, offloads)
        {
            self.lose(&why);
        }
    }

    fn send(&mut self, pair: usize) {
        // What a driver sends by a pair that it said it does not use goes nowhere.
        let is_used = pair < self.card.active() && !self.gone;
        let Some(transmitter) = self.pairs.get_mut(pair).map(|pair| &mut pair.transmitter) else {
            return;
        };
        let Some(transmitter) = transmitter else {
            return;
        };
        let network = is_used.then_some(&mut self.network);
        if let Err(why) = transmitter.run(network, pair) {
            self.lose(&why);
        }
    }

    /// The network is gone: the driver sees the link go down, and what it still sends is thrown
    /// away.
    fn lose(&mut self, why: &str) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        self.card.lose(why);
        for pair in 0..self.pairs.len() {
            self.woken(pair);
        }
    }

    /// Frames may have come for a pair, or can be sent again.
    fn woken(&mut self, pair: usize) {
        if let Some(pair) = self.pairs.get_mut(pair) {
            if let Some(receiver) = &mut pair.receiver {
                receiver.woken();
            }
            if let Some(transmitter) = &mut pair.transmitter {
                transmitter.woken();
            }
        }
        self.move_frames(pair);
    }
}

impl<N: Frames> VirtioDevice for Net<N> {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        self.card.features()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.card.queue_sizes()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.card.config()
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        let pairs = self.card.start(&mut driver, &mut self.network)?;
        let (features, has_header) = (driver.features, self.network.has_header());
        let longest = self.card.longest_frame();
        let link = Arc::clone(&driver.link);
        self.pairs = (0..pairs)
            .map(|pair| Pair {
                receiver: driver
                    .take(2 * pair)
                    .map(|queue| Receiver::new(queue, &link, features, has_header, longest)),
                transmitter: driver
                    .take(2 * pair + 1)
                    .map(|queue| Transmitter::new(queue, &link, has_header)),
            })
            .collect();
        for (pair, frame) in std::mem::take(&mut self.frames) {
            let pair = self.pairs.get_mut(usize::from(pair));
            if let Some(receiver) = pair.and_then(|pair| pair.receiver.as_mut()) {
                receiver.put(&frame);
            }
        }
        self.card.serve(&mut self.network);
        for pair in 0..pairs {
            self.move_frames(pair);
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        let mut positions = self.card.quiesce();
        for (pair, number) in self.pairs.drain(..).zip(0..) {
            if let Some(receiver) = pair.receiver {
                let (position, frame) = receiver.quiesce();
                positions.push(position);
                self.frames.extend(frame.map(|frame| (number, frame)));
            }
            positions.extend(pair.transmitter.map(|mut queue| queue.quiesce()));
        }
        positions
    }

    fn reset(&mut self) {
        self.pairs.clear();
        self.frames.clear();
        self.card.reset(&mut self.network);
    }

    fn save(&self) -> DeviceState {
        let (mac, session) = self.card.save();
        DeviceState::Net(NetState {
            mac,
            session,
            frames: self.frames.clone(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(state) = state else {
            return Err(RestoreError::kind(state));
        };
        let is_frame = |(_, frame): &(u16, Vec<u8>)| (HEADER..=MOST_BYTES).contains(&frame.len());
        if state.frames.len() > usize::from(u16::MAX) || !state.frames.iter().all(is_frame) {
            let what = format!("a frame waits that has not {HEADER} to {MOST_BYTES} bytes");
            return Err(RestoreError(what));
        }
        self.card.restore(state.mac, state.session)?;
        self.frames.clone_from(&state.frames);
        Ok(())
    }

    fn stop_queue(&mut self, queue: usize) {
        if self.card.is_control(queue) {
            self.card.set_control(None);
        } else if let Some(pair) = self.pairs.get_mut(queue / 2) {
            match queue.is_multiple_of(2) {
                true => pair.receiver = None,
                false => pair.transmitter = None,
            }
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        let (features, has_header) = (self.card.agreed(), self.network.has_header());
        let longest = self.card.longest_frame();
        if self.card.is_control(index) {
            self.card.set_control(Some(queue));
        } else if let Some(pair) = self.pairs.get_mut(index / 2) {
            let link = Arc::clone(queue.link());
            match index.is_multiple_of(2) {
                true => {
                    let receiver = Receiver::new(queue, &link, features, has_header, longest);
                    pair.receiver = Some(receiver);
                }
                false => pair.transmitter = Some(Transmitter::new(queue, &link, has_header)),
            }
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        if self.card.is_control(queue) {
            let before = self.card.active();
            self.card.serve(&mut self.network);
            for pair in before..self.card.active() {
                self.woken(pair);
            }
        } else if queue.is_multiple_of(2) {
            self.receive(queue / 2);
        } else {
            self.send(queue / 2);
        }
    }

    fn sources(&self) -> Vec<Source> {
        self.network.sources()
    }

    fn ready(&mut self, source: usize) {
        match self.network.woken(source) {
            Woken::Nothing => {}
            Woken::Frames(pair) => self.woken(pair),
            Woken::Link(up) => self.card.set_link(up && !self.gone),
            Woken::Broken(what) => self.card.broken(&what),
            Woken::Gone(why) => self.lose(&why),
        }
    }
}
