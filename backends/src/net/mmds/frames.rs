//! A network card's network with a metadata service on it.

use super::service::Service;
use super::stack::Stack;
use super::{MmdsOptions, file};
use crate::timer::Timer;
use anyhow::{Context, Result};
use armlet_devices::rate::{Alarm, Throttle};
use armlet_devices::virtio::net::{
    Frame, FrameError, Frames, HEADER, Net, Network, Room, SourceEvent,
};
use armlet_devices::virtio::{Source, VirtioDevice};
use armlet_system::eintr::uninterrupted;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes at the start of a frame that say where it goes: an Ethernet header, and ARP for IPv4.
const START: usize = 14 + 28;

/// A metadata service that is opened, for as many lives of the guest as there are.
pub(in crate::net) struct OpenMetadata {
    options: MmdsOptions,
    timer: Arc<Timer>,
}

impl OpenMetadata {
    /// Opens what the service needs.
    ///
    /// # Errors
    /// A file of data that cannot be read; a process without room for another descriptor.
    pub(in crate::net) fn open(options: &MmdsOptions) -> Result<OpenMetadata> {
        file::load(options)?;
        Ok(OpenMetadata {
            options: options.clone(),
            timer: Arc::new(Timer::new().context("cannot make a timer")?),
        })
    }

    /// The card with this MAC address at `network`, held to these limits, with the service on it and no
    /// connection yet.
    ///
    /// # Errors
    /// A host that gives no random numbers.
    pub(in crate::net) fn device(
        &self,
        network: Box<dyn Frames>,
        mac: [u8; 6],
        throttles: [Option<Arc<Throttle>>; 2],
    ) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let mut seed = [0; 8];
        uninterrupted(|| getrandom(&mut seed[..], GetRandomFlags::empty()))
            .context("cannot choose a random number")?;
        let network = WithMetadata::new(network, self, u64::from_ne_bytes(seed));
        let card = Net::new(network, mac).held_to(throttles);
        Ok(Arc::new(Mutex::new(card)))
    }
}

/// A network of which a metadata service takes the frames to one address.
pub(super) struct WithMetadata {
    network: Box<dyn Frames>,
    stack: Stack,
    /// The address of the service.
    address: [u8; 4],
    /// Zeros before each frame: [`HEADER`] bytes, or none.
    header: usize,
    timer: Arc<Timer>,
    /// The timer's place among the sources.
    source: usize,
    begun: Instant,
    /// When the timer will be ready, from `begun`.
    armed: Option<Duration>,
    /// Kept for its capacity.
    frame: Vec<u8>,
}

impl WithMetadata {
    pub(super) fn new(network: Box<dyn Frames>, opened: &OpenMetadata, seed: u64) -> WithMetadata {
        let options = &opened.options;
        let header = if network.has_header() { HEADER } else { 0 };
        let service = Service::new(options);
        WithMetadata {
            stack: Stack::new(service, options.address, network.mtu(), header, seed),
            address: options.address.octets(),
            header,
            timer: Arc::clone(&opened.timer),
            source: network.sources().len(),
            begun: Instant::now(),
            armed: None,
            frame: Vec::new(),
            network,
        }
    }

    /// Whether a frame goes to the service. What it carries does not matter: of all that is sent to
    /// this address nothing reaches the host's network, where another service may be at it.
    fn is_ours(&self, frame: &Frame<'_>) -> bool {
        let mut bytes = [0; HEADER + START];
        let bytes = &mut bytes[..self.header + START];
        if frame.size() < bytes.len() {
            return false;
        }
        let mut left = &mut *bytes;
        for slice in frame.slices() {
            let count = slice.len().min(left.len());
            let (now, later) = left.split_at_mut(count);
            slice.copy_to(now);
            left = later;
            if left.is_empty() {
                break;
            }
        }
        let start = &bytes[self.header..];
        match start[12..14] {
            // Its target (RFC 826), and an IPv4 packet's destination (RFC 791).
            [0x08, 0x06] => start[38..42] == self.address,
            [0x08, 0x00] => start[30..34] == self.address,
            _ => false,
        }
    }

    /// Hands a frame to the stack.
    fn detour(&mut self, frame: &Frame<'_>) {
        self.frame.clear();
        for slice in frame.slices() {
            let end = self.frame.len();
            self.frame.resize(end + slice.len(), 0);
            slice.copy_to(&mut self.frame[end..]);
        }
        let now = self.begun.elapsed();
        if let Some(frame) = self.frame.get(self.header..) {
            self.stack.receive(frame, now);
        }
        self.arm(now);
    }

    /// Sets the timer to when there is something to do: at once, where there are frames for the guest.
    fn arm(&mut self, now: Duration) {
        let due = match self.stack.has_frames() {
            true => Some(now),
            false => self.stack.due(now),
        };
        // One that is ready too early is set anew then.
        let Some(due) = due.filter(|due| self.armed.is_none_or(|armed| armed > *due)) else {
            return;
        };
        self.timer.set(due.saturating_sub(now));
        self.armed = Some(due);
    }
}

impl Network for WithMetadata {
    fn offloads(&self) -> u64 {
        self.network.offloads()
    }

    fn pairs(&self) -> u16 {
        self.network.pairs()
    }

    fn mtu(&self) -> Option<u16> {
        self.network.mtu()
    }

    fn is_up(&self) -> bool {
        self.network.is_up()
    }

    fn sources(&self) -> Vec<Source> {
        let mut sources = self.network.sources();
        sources.push(Source {
            fd: self.timer.fd(),
            output: false,
            // Each time that it is set is told of once, so that nobody has to read it.
            edge: true,
        });
        sources
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        if source != self.source {
            return self.network.woken(source);
        }
        self.armed = None;
        let now = self.begun.elapsed();
        self.stack.work(now);
        match self.stack.has_frames() {
            true => SourceEvent::Frames(0),
            false => {
                self.arm(now);
                SourceEvent::Nothing
            }
        }
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> std::result::Result<(), String> {
        self.network.configure(pairs, offloads)
    }
}

impl Frames for WithMetadata {
    fn has_header(&self) -> bool {
        self.network.has_header()
    }

    fn send(&mut self, pair: usize, frame: Frame<'_>) -> std::result::Result<(), FrameError> {
        if !self.is_ours(&frame) {
            return self.network.send(pair, frame);
        }
        self.detour(&frame);
        Ok(())
    }

    fn receive(&mut self, pair: usize, room: Room<'_>) -> std::result::Result<usize, FrameError> {
        // The first pair is in use whatever the driver does.
        if pair == 0
            && let Some(frame) = self.stack.take_frame()
        {
            if !self.stack.has_frames() {
                let now = self.begun.elapsed();
                if self.stack.is_starved() {
                    self.stack.work(now);
                }
                // If there are frames again, they are taken in this turn.
                if !self.stack.has_frames() {
                    self.arm(now);
                }
            }
            return Ok(room.fill(&frame));
        }
        self.network.receive(pair, room)
    }
}
