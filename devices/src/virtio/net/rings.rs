//! A network card on whose queues the host's end works by itself.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::card::Card;
use super::{ID, Network, SourceEvent};
use crate::virtio::{
    ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue,
};

/// A [`Network`] that works on queues in guest memory: vhost-net.
pub trait Rings: Network {
    /// Begins to work on queues, each from its [`Position`](crate::virtio::Position) on: kicks come by [`Virtqueue::kick`], the guest is interrupted by
    /// [`Link::call`]. A queue's index says what it is: even ones get frames, odd ones send them.
    ///
    /// # Errors
    /// What the host refuses; nothing works then.
    fn start(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
        link: &Link,
    ) -> Result<(), String>;

    /// Ends the work: from here on guest memory is not touched. Returns for each queue, by its
    /// index, which request it would have taken next ([`Virtqueue::next_available`]), as far as the
    /// host tells.
    fn stop(&mut self) -> Vec<(u16, u16)>;

    /// Begins to work on one queue more, as [`Self::start`] does.
    ///
    /// # Errors
    /// What the host refuses; it does not work on this queue then.
    fn start_queue(&mut self, queue: &Virtqueue) -> Result<(), String>;

    /// Ends the work on the queue of this index: from here on neither its rings nor its buffers are
    /// touched.
    fn stop_queue(&mut self, queue: u16);
}

/// A network card of which this process serves the control queue only.
pub struct RingNet<N: Rings> {
    card: Card,
    network: N,
    /// The queues of frames, for as long as the network works on them.
    queues: Vec<Virtqueue>,
    /// So many queues of frames the driver may have.
    most: usize,
    /// Kicks go to the network, but those of the control queue are for us: they come by this one
    /// source, which is there before the queue is.
    kicks: Epoll,
}

impl<N: Rings> RingNet<N> {
    /// A card with this MAC address at `network`.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new(network: N, mac: [u8; 6]) -> std::io::Result<RingNet<N>> {
        Ok(RingNet {
            card: Card::new(&network, mac),
            network,
            queues: Vec::new(),
            most: 0,
            kicks: Epoll::new()?,
        })
    }

    fn watch_control(&self, operation: ControlOperation) -> std::io::Result<()> {
        match self.card.control() {
            Some(control) => {
                let event = EpollEvent::new(EventSet::IN, 0);
                self.kicks.ctl(operation, control.kick().as_raw_fd(), event)
            }
            None => Ok(()),
        }
    }

    fn serve_control(&mut self) {
        if let Some(control) = self.card.control() {
            // A kick is taken before the queue is looked at: one that comes later rings again.
            let _ = control.kick().read();
        }
        self.card.serve(&mut self.network);
    }
}

impl<N: Rings> VirtioDevice for RingNet<N> {
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
        self.most = 2 * pairs;
        self.queues = (0..self.most)
            .filter_map(|index| driver.take(index))
            .collect();
        self.watch_control(ControlOperation::Add)
            .map_err(|error| StartError(format!("cannot wait for its control queue: {error}")))?;
        self.network
            .start(driver.features, &driver.memory, &self.queues, &driver.link)
            .map_err(StartError)?;
        self.serve_control();
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        if self.card.link().is_none() {
            return Positions::new();
        }
        let bases = self.network.stop();
        // It is there, unless the driver left it out.
        let _ = self.watch_control(ControlOperation::Delete);
        let mut positions = self.card.quiesce();
        positions.extend(self.queues.drain(..).map(|mut queue| {
            let base = bases.iter().find(|(index, _)| *index == queue.index());
            queue.adopt(base.map(|(_, base)| *base));
            (queue.index(), queue.quiesce())
        }));
        positions
    }

    fn reset(&mut self) {
        if self.card.link().is_some() {
            let _ = self.network.stop();
            // It is there, unless the device did not start.
            let _ = self.watch_control(ControlOperation::Delete);
        }
        self.queues.clear();
        self.card.reset(&mut self.network);
    }

    fn save(&self) -> DeviceState {
        self.card.save(Vec::new())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            // The host moves its frames by itself, and cannot be given any.
            DeviceState::Net(state) => self.card.restore(state.mac, state.session),
            other => Err(RestoreError::kind(other)),
        }
    }

    fn stop_queue(&mut self, queue: usize) {
        if self.card.is_control(queue) {
            // It is there, unless the driver left it out.
            let _ = self.watch_control(ControlOperation::Delete);
            self.card.set_control(None);
        } else if let Some(at) = self
            .queues
            .iter()
            .position(|ring| usize::from(ring.index()) == queue)
        {
            self.network.stop_queue(queue as u16);
            self.queues.remove(at);
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        if self.card.is_control(index) {
            self.card.set_control(Some(queue));
            self.watch_control(ControlOperation::Add).map_err(|error| {
                StartError(format!("cannot wait for its control queue: {error}"))
            })?;
        } else if index < self.most {
            self.network.start_queue(&queue).map_err(StartError)?;
            self.queues.push(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        if self.card.is_control(queue) {
            self.serve_control();
        }
    }

    fn takes_kicks(&self) -> bool {
        false
    }

    fn sources(&self) -> Vec<Source> {
        let mut sources = self.network.sources();
        sources.push(Source {
            fd: self.kicks.as_raw_fd(),
            output: false,
            edge: false,
        });
        sources
    }

    fn ready(&mut self, source: usize) {
        if source + 1 == self.sources().len() {
            self.serve_control();
            return;
        }
        match self.network.woken(source) {
            SourceEvent::Nothing | SourceEvent::Frames(_) => {}
            SourceEvent::Link(up) => self.card.set_link(up),
            SourceEvent::Broken(what) => self.card.broken(&what),
            SourceEvent::Gone(why) => self.card.lose(&why),
        }
    }
}
