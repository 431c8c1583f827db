//! The network card (virtio 1.2, section 5.1).
//!
//! A [`Net`] moves frames between its queues and the host's end of the card, which has [`Frames`]:
//! a TAP, a socket. Of a [`RingNet`] the host's end works on the queues by itself ([`Rings`]:
//! vhost-net), and only the control queue comes here.

use std::sync::Arc;

use self::card::Card;
use self::receive::Receiver;
use self::send::Transmitter;
use super::{
    ConfigSpace, DeviceState, Driver, Positions, RestoreError, Source, StartError, VirtioDevice,
    Virtqueue,
};
use crate::counts::Counts;
use crate::rate::Throttle;

mod card;
pub mod feature;
mod network;
mod receive;
mod rings;
mod send;
#[cfg(test)]
mod tests;

pub use super::state::{NetSession, NetState};
pub use network::{
    Frame, FrameError, Frames, HEADER, MOST_BYTES, Network, Pieces, Room, SourceEvent,
};
pub use rings::{RingNet, Rings};

/// Device ID.
const ID: u32 = 1;

/// A network card of which this process moves each frame.
pub struct Net<N: Frames> {
    card: Card,
    network: N,
    pairs: Vec<Pair>,
    /// Whether the network is gone: then what is sent is thrown away.
    gone: bool,
    /// Frames that wait for the driver's buffers while the machine is held, by pair.
    frames: Vec<(u16, Vec<u8>)>,
    /// How many sources the network has, which are the first ones.
    of_network: usize,
    /// What holds back what is received, and what is sent.
    throttles: [Option<Arc<Throttle>>; 2],
    /// What it has done.
    counts: Arc<Counts>,
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
            of_network: network.sources().len(),
            throttles: [None, None],
            counts: Arc::default(),
            network,
            pairs: Vec::new(),
            gone: false,
            frames: Vec::new(),
        }
    }

    /// The card, held to the limits of `throttles` for what it receives and what it sends, if there are
    /// some.
    #[must_use]
    pub fn held_to(mut self, throttles: [Option<Arc<Throttle>>; 2]) -> Net<N> {
        self.throttles = throttles;
        self
    }

    /// The card, with what it does counted there.
    #[must_use]
    pub fn counted_by(mut self, counts: Arc<Counts>) -> Net<N> {
        self.counts = counts;
        self
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
        {
            let throttle = self.throttles[0].as_deref();
            if let Err(why) =
                receiver.run(&mut self.network, pair, offloads, throttle, &self.counts)
            {
                self.lose(&why);
            }
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
        let network = is_used.then_some(&mut self.network as &mut dyn Frames);
        let throttle = self.throttles[1].as_deref();
        if let Err(why) = transmitter.run(network, pair, throttle, &self.counts) {
            self.lose(&why);
        }
    }

    /// Shows the driver that the link is down, as the network is gone; what it still sends is thrown
    /// away.
    fn lose(&mut self, why: &str) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        self.card.lose(why);
        for pair in 0..self.pairs.len() {
            self.woken(pair);
            self.send(pair);
        }
    }

    /// Which throttle's alarm a source is, if it is one's.
    fn alarm(&self, source: usize) -> Option<usize> {
        let alarm = source.checked_sub(self.of_network)?;
        let there = |direction: &usize| self.throttles[*direction].is_some();
        (0..self.throttles.len()).filter(there).nth(alarm)
    }

    /// What a throttle held back may go on.
    fn unthrottled(&mut self, direction: usize) {
        if let Some(throttle) = &self.throttles[direction] {
            throttle.heard();
        }
        for pair in 0..self.pairs.len() {
            match direction {
                0 => self.receive(pair),
                _ => self.send(pair),
            }
        }
    }

    /// Moves the frames of a pair, for which some may have come or can be sent again.
    fn woken(&mut self, pair: usize) {
        let Some(queues) = self.pairs.get_mut(pair) else {
            return;
        };
        if let Some(receiver) = &mut queues.receiver {
            receiver.woken();
        }
        let transmitter = queues.transmitter.as_mut();
        let is_awaited = transmitter.is_some_and(Transmitter::woken);
        self.receive(pair);
        // One that waits for nothing is kicked when there is something to send.
        if is_awaited {
            self.send(pair);
        }
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
        self.card.save(self.frames.clone())
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
        let mut sources = self.network.sources();
        let throttles = self.throttles.iter().flatten();
        sources.extend(throttles.map(|throttle| throttle.source()));
        sources
    }

    fn ready(&mut self, source: usize) {
        if let Some(direction) = self.alarm(source) {
            return self.unthrottled(direction);
        }
        match self.network.woken(source) {
            SourceEvent::Nothing => {}
            SourceEvent::Frames(pair) => self.woken(pair),
            SourceEvent::Link(up) => self.card.set_link(up && !self.gone),
            SourceEvent::Broken(what) => self.card.broken(&what),
            SourceEvent::Gone(why) => self.lose(&why),
        }
    }
}
