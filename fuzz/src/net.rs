//! The network card, with a network that comes and goes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use armlet_devices::virtio::mmio::Mmio;
use armlet_devices::virtio::net::{
    Frame, FrameError, Frames, HEADER, MOST_BYTES, Net, Network, RingNet, Rings, Room, SourceEvent,
    feature,
};
use armlet_devices::virtio::{Link, Source, VirtioDevice, Virtqueue};
use vm_memory::GuestMemoryMmap;

use super::guest::{Guest, Subject, lock};
use super::input::Input;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// The network as it is now.
struct State {
    /// By pair: lengths of frames that wait for the guest.
    coming: Vec<VecDeque<usize>>,
    /// What happens to a frame that is sent.
    sending: Result<(), FrameError>,
    /// What happens instead of a frame, once.
    receiving: Option<FrameError>,
    woken: SourceEvent,
    configurable: bool,
    rings: bool,
    /// Pairs in use, as the card says.
    active: u16,
}

#[derive(Clone)]
struct Wire {
    state: Arc<Mutex<State>>,
    pairs: u16,
    has_header: bool,
    mtu: Option<u16>,
    offloads: u64,
}

impl Network for Wire {
    fn offloads(&self) -> u64 {
        self.offloads
    }

    fn pairs(&self) -> u16 {
        self.pairs
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn sources(&self) -> Vec<Source> {
        let source = Source {
            fd: -1,
            output: true,
            edge: true,
        };
        vec![source; usize::from(self.pairs)]
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        let woken = &mut lock(&self.state).woken;
        std::mem::replace(woken, SourceEvent::Frames(source))
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String> {
        let mut state = lock(&self.state);
        assert!((1..=self.pairs).contains(&pairs));
        let ours = offloads & (feature::GUEST_OFFLOADS | feature::HOST_OFFLOADS);
        assert_eq!(ours & !self.offloads, 0, "offloads that the network lacks");
        if !state.configurable {
            return Err("not now".to_owned());
        }
        state.active = pairs;
        Ok(())
    }
}

impl Frames for Wire {
    fn has_header(&self) -> bool {
        self.has_header
    }

    fn send(&mut self, pair: usize, frame: Frame<'_>) -> Result<(), FrameError> {
        let state = lock(&self.state);
        assert!(pair < usize::from(self.pairs));
        let header = if self.has_header { HEADER } else { 0 };
        assert!((header + 14..=MOST_BYTES).contains(&frame.size()));
        let bytes: usize = frame.slices().map(|slice| slice.len()).sum();
        assert_eq!(bytes, frame.size());
        // What one system call takes, with the length before it.
        assert!(frame.slices().count() < 1024);
        state.sending.clone()
    }

    fn receive(&mut self, pair: usize, room: Room<'_>) -> Result<usize, FrameError> {
        let mut state = lock(&self.state);
        if let Some(trouble) = state.receiving.take() {
            return Err(trouble);
        }
        let Some(size) = state.coming[pair].pop_front() else {
            return Err(FrameError::Wait);
        };
        let least = if self.has_header { HEADER } else { 1 };
        let most = MOST_BYTES - if self.has_header { 0 } else { HEADER };
        let mut frame = vec![0x77; size.clamp(least, most)];
        if self.has_header {
            // Nothing that a driver would have to agree to.
            frame[..HEADER].fill(0);
        }
        let placed = room.fill(&frame);
        assert_eq!(placed, frame.len(), "a frame has no room");
        Ok(placed)
    }
}

impl Rings for Wire {
    fn start(
        &mut self,
        _features: u64,
        _memory: &GuestMemoryMmap,
        _queues: &[Virtqueue],
        _link: &Link,
    ) -> Result<(), String> {
        let mut state = lock(&self.state);
        assert!(!state.rings, "started twice");
        match &state.sending {
            Ok(()) => {
                state.rings = true;
                Ok(())
            }
            Err(_) => Err("not now".to_owned()),
        }
    }

    fn stop(&mut self) -> Vec<(u16, u16)> {
        lock(&self.state).rings = false;
        Vec::new()
    }

    fn start_queue(&mut self, queue: &Virtqueue) -> Result<(), String> {
        assert!(
            lock(&self.state).rings,
            "a queue of a network that does not work"
        );
        assert!(queue.index() < 2 * self.pairs, "no queue of frames");
        lock(&self.state)
            .sending
            .clone()
            .map_err(|_| "not now".to_owned())
    }

    fn stop_queue(&mut self, queue: u16) {
        assert!(queue < 2 * self.pairs, "no queue of frames");
    }
}

struct World {
    state: Arc<Mutex<State>>,
    wire: Wire,
    pairs: usize,
}

impl World {
    fn happen(&mut self, input: &mut Input<'_>) -> Option<usize> {
        let mut state = lock(&self.state);
        let pair = input.below(self.pairs);
        match input.u8() {
            0..=127 => {
                for _ in 0..=input.below(4) {
                    let size = match input.u8() {
                        0..=127 => 60 + usize::from(input.u8()),
                        128..=191 => usize::from(input.u16() & 0x7ff),
                        192..=223 => MOST_BYTES,
                        _ => input.number() as usize,
                    };
                    if state.coming[pair].len() < 200 {
                        state.coming[pair].push_back(size);
                    }
                }
            }
            128..=159 => {
                let lost = FrameError::Lost("it is too long".to_owned());
                state.sending = match input.u8() & 3 {
                    0 => Err(FrameError::Wait),
                    1 => Err(lost),
                    _ => Ok(()),
                };
                return None;
            }
            160..=175 => {
                state.receiving = Some(FrameError::Lost("it was cut".to_owned()));
            }
            176..=191 => state.woken = SourceEvent::Link(input.flag()),
            192..=199 => state.woken = SourceEvent::Nothing,
            200..=207 => state.woken = SourceEvent::Broken("the host says so".to_owned()),
            208..=211 => {
                let gone = "the network went away".to_owned();
                match input.u8() & 3 {
                    0 => state.woken = SourceEvent::Gone(gone),
                    1 => state.receiving = Some(FrameError::Gone(gone)),
                    _ => state.sending = Err(FrameError::Gone(gone)),
                }
            }
            212..=223 => {
                state.configurable = input.flag();
                return None;
            }
            _ => {}
        }
        Some(pair)
    }

    fn frame_or_command(&self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        // Without MQ the control queue is the third, whatever there is.
        let is_control = queue == 2 * self.pairs || (queue == 2 && input.flag());
        if is_control {
            let kinds = [[1, 1], [4, 0], [5, 0], [0, 0]];
            let mut bytes = input.pick(&kinds).to_vec();
            let len = input.below(12);
            match input.flag() {
                true => bytes.extend([input.u8() & 7, 0].iter().chain(&[0; 8])),
                false => bytes.extend(input.bytes(len)),
            }
            return bytes;
        }
        let size = match input.u8() {
            0..=191 => 26 + usize::from(input.u8()),
            192..=223 => usize::from(input.u8()) & 31,
            _ => usize::from(input.u16()) % 0x3000,
        };
        vec![0x33; size]
    }

    fn heal(&mut self) {
        let mut state = lock(&self.state);
        state.sending = Ok(());
        state.configurable = true;
        state.woken = SourceEvent::Frames(0);
    }
}

impl Subject for World {
    type Device = Net<Wire>;

    fn payload(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        self.frame_or_command(queue, input)
    }

    fn event(&mut self, device: &Mutex<Net<Wire>>, input: &mut Input<'_>) {
        if let Some(source) = self.happen(input) {
            lock(device).ready(source);
        }
    }

    fn heal(&mut self, _device: &Mutex<Net<Wire>>) {
        World::heal(self);
    }

    fn fresh(&mut self) -> Option<Net<Wire>> {
        Some(Net::new(self.wire.clone(), MAC))
    }

    fn finish(&mut self, device: &Mutex<Net<Wire>>) {
        World::heal(self);
        lock(device).ready(0);
    }

    fn is_drained(&self, queue: usize) -> bool {
        queue == 1
    }
}

/// The same world, whose host works on the rings of frames.
struct RingWorld(World);

impl Subject for RingWorld {
    type Device = RingNet<Wire>;

    fn payload(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8> {
        self.0.frame_or_command(queue, input)
    }

    fn event(&mut self, device: &Mutex<RingNet<Wire>>, input: &mut Input<'_>) {
        if let Some(source) = self.0.happen(input) {
            lock(device).ready(source);
        }
    }

    fn kicks(&mut self, guest: &mut Mmio, device: &Mutex<RingNet<Wire>>) -> bool {
        // The one for the control queue is behind those of the network.
        lock(device).ready(self.0.pairs);
        for kick in guest.kicks() {
            let _ = kick.read();
        }
        false
    }

    fn heal(&mut self, _device: &Mutex<RingNet<Wire>>) {
        World::heal(&mut self.0);
    }

    fn fresh(&mut self) -> Option<RingNet<Wire>> {
        let card = RingNet::new(self.0.wire.clone(), MAC);
        Some(card.expect("descriptors"))
    }

    fn is_drained(&self, _queue: usize) -> bool {
        false
    }
}

/// The network card.
pub fn net(data: &[u8]) {
    let mut input = Input::new(data);
    let shape = input.u8();
    let pairs = 1 + usize::from(shape & 3).min(2);
    let state = Arc::new(Mutex::new(State {
        coming: vec![VecDeque::new(); pairs],
        sending: Ok(()),
        receiving: None,
        woken: SourceEvent::Frames(0),
        configurable: true,
        rings: false,
        active: 1,
    }));
    let wire = Wire {
        state: Arc::clone(&state),
        pairs: pairs as u16,
        has_header: shape & 8 != 0,
        mtu: (shape & 16 != 0).then_some(9000),
        offloads: match shape & 32 {
            0 => 0,
            _ => input.u64() & (feature::GUEST_OFFLOADS | feature::HOST_OFFLOADS),
        },
    };
    let world = World {
        state,
        wire: wire.clone(),
        pairs,
    };
    if shape & 0xc0 == 0xc0 {
        let device = RingNet::new(wire, MAC).expect("descriptors");
        Guest::new(RingWorld(world), Arc::new(Mutex::new(device))).run(&mut input);
    } else {
        let device = Net::new(wire, MAC);
        Guest::new(world, Arc::new(Mutex::new(device))).run(&mut input);
    }
}
