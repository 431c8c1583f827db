//! A network card between a driver and a network that both behave, and that do not.

mod anything;
mod control;
mod headers;
mod held;
mod limits;
mod outside;
mod rings;

use std::collections::VecDeque;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::feature::*;
use super::network::{BATCH, LEAST_FRAME};
use super::*;
use crate::virtio::fake::Guest;
use crate::virtio::{FEATURE_EVENT_IDX, Link, Virtqueue, lock};

const MAC_ADDRESS: [u8; 6] = [2, 0, 0, 0, 0, 7];
const RX: usize = 0;
const TX: usize = 1;
/// The control queue of a card with one pair of queues in use.
const CONTROL: usize = 2;
/// Where the status of the link is, from the start of the window.
const LINK_STATUS: u64 = 0x106;

/// A network that a test plays.
struct Wire {
    bare: bool,
    pairs: u16,
    offloads: u64,
    mtu: Option<u16>,
    /// What each pair receives next.
    incoming: Vec<VecDeque<Result<Vec<u8>, FrameError>>>,
    /// What was sent, with the pair.
    sent: Vec<(usize, Vec<u8>)>,
    /// What happens to what is sent.
    refuse: Option<FrameError>,
    /// What the next source means; frames if nothing is said.
    woken: Option<SourceEvent>,
    /// What it was configured with last.
    configured: (u16, u64),
    refuses_configuration: bool,
}

impl Default for Wire {
    fn default() -> Wire {
        Wire {
            bare: false,
            pairs: 1,
            offloads: 0,
            mtu: None,
            incoming: vec![VecDeque::new(); 8],
            sent: Vec::new(),
            refuse: None,
            woken: None,
            configured: (0, 0),
            refuses_configuration: false,
        }
    }
}

#[derive(Clone, Default)]
struct FakeNetwork(Arc<Mutex<Wire>>);

impl FakeNetwork {
    fn new(wire: Wire) -> FakeNetwork {
        FakeNetwork(Arc::new(Mutex::new(wire)))
    }

    fn change(&self, change: impl FnOnce(&mut Wire)) {
        change(&mut lock(&self.0));
    }

    fn come(&self, pair: usize, frame: &[u8]) {
        self.change(|wire| wire.incoming[pair].push_back(Ok(frame.to_vec())));
    }

    fn sent(&self) -> Vec<(usize, Vec<u8>)> {
        std::mem::take(&mut lock(&self.0).sent)
    }
}

impl Network for FakeNetwork {
    fn offloads(&self) -> u64 {
        lock(&self.0).offloads
    }

    fn pairs(&self) -> u16 {
        lock(&self.0).pairs
    }

    fn mtu(&self) -> Option<u16> {
        lock(&self.0).mtu
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        let woken = lock(&self.0).woken.take();
        woken.unwrap_or(SourceEvent::Frames(source))
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String> {
        let mut wire = lock(&self.0);
        if wire.refuses_configuration {
            return Err("no".to_owned());
        }
        wire.configured = (pairs, offloads);
        Ok(())
    }
}

impl Frames for FakeNetwork {
    fn has_header(&self) -> bool {
        !lock(&self.0).bare
    }

    fn send(&mut self, pair: usize, mut frame: Frame<'_>) -> Result<(), FrameError> {
        let mut wire = lock(&self.0);
        if let Some(trouble) = &wire.refuse {
            return Err(trouble.clone());
        }
        let mut bytes = Vec::new();
        for slice in frame.slices() {
            let mut piece = vec![0; slice.len()];
            slice.copy_to(&mut piece[..]);
            bytes.extend(piece);
        }
        assert_eq!(bytes.len(), frame.size());
        let places: Vec<_> = frame.slices().map(place).collect();
        assert_eq!(frame.pieces().vector(), places);
        wire.sent.push((pair, bytes));
        Ok(())
    }

    fn receive(&mut self, pair: usize, mut room: Room<'_>) -> Result<usize, FrameError> {
        let pieces = room.pieces().vector().to_vec();
        let frame = lock(&self.0).incoming[pair].pop_front();
        let frame = frame.unwrap_or(Err(FrameError::Wait))?;
        // As readv does it.
        let slices: Vec<_> = room.slices().collect();
        assert!(slices.iter().copied().map(place).eq(pieces));
        assert!(slices.len() <= 1024, "{} pieces", slices.len());
        let mut left = &frame[..];
        for slice in slices {
            let (now, later) = left.split_at(slice.len().min(left.len()));
            slice.copy_from(now);
            left = later;
        }
        assert!(left.is_empty(), "no room for a frame");
        Ok(frame.len())
    }
}

/// Where this process has a piece of memory, and its bytes.
fn place(slice: VolatileSlice<'_>) -> [usize; 2] {
    [slice.ptr_guard_mut().as_ptr() as usize, slice.len()]
}

type TestGuest = Guest<Net<FakeNetwork>>;

fn card(network: &FakeNetwork) -> Net<FakeNetwork> {
    Net::new(network.clone(), MAC_ADDRESS)
}

fn started(network: &FakeNetwork, features: u64) -> TestGuest {
    Guest::started(card(network), features)
}

/// A frame with a header of zeros, as a network gives and takes it.
fn frame(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER], payload].concat()
}

/// The frame as the driver sees it when it lies in so many buffers.
fn seen(payload: &[u8], buffers: u8) -> Vec<u8> {
    let mut seen = frame(payload);
    seen[10] = buffers;
    seen
}

fn payload(size: usize, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|index| (index / 251) as u8 ^ (index as u8).wrapping_mul(7).wrapping_add(seed))
        .collect()
}

fn wake<D: VirtioDevice + 'static>(guest: &Guest<D>, source: usize) {
    lock(&guest.device).ready(source);
}

/// A control request; the answer.
fn control(guest: &mut TestGuest, queue: usize, request: &[u8]) -> Vec<u8> {
    guest.answer(queue, &[&request[..2], &request[2..]], &[1])
}

#[test]
fn the_configuration_space_says_what_the_card_is() {
    let network = FakeNetwork::new(Wire {
        pairs: 3,
        mtu: Some(9000),
        ..Wire::default()
    });
    let mut guest = Guest::new(card(&network));
    assert_eq!(guest.read(0x08), 1, "a network card");
    assert_eq!(guest.read(0x100), 0x0000_0002);
    // The end of the address; the link is up.
    assert_eq!(guest.read(0x104), 0x0001_0700);
    // Three pairs of queues; the MTU.
    assert_eq!(guest.read(0x108), 9000 << 16 | 3);
    let features = lock(&guest.device).features();
    assert_eq!(features & (MQ | MTU | STATUS), MQ | MTU | STATUS);
}

#[test]
fn only_what_the_network_can_do_is_offered() {
    let plain = card(&FakeNetwork::default()).features();
    let absent = GUEST_OFFLOADS | HOST_OFFLOADS | CTRL_GUEST_OFFLOADS | MQ | MTU;
    assert_eq!(plain & absent, 0);
    let network = FakeNetwork::new(Wire {
        offloads: CSUM | GUEST_CSUM | HOST_USO | 1 << 40,
        ..Wire::default()
    });
    let features = card(&network).features();
    let offered = CSUM | GUEST_CSUM | HOST_USO | CTRL_GUEST_OFFLOADS;
    assert_eq!(features & absent, offered);
    assert_eq!(features & 1 << 40, 0, "no offload of virtio");
}

#[test]
fn frames_are_sent_with_their_header_or_without() {
    for bare in [false, true] {
        let network = FakeNetwork::new(Wire {
            bare,
            ..Wire::default()
        });
        let mut guest = started(&network, 0);
        let header = [1, 0, 34, 0, 16, 0, 0, 0, 0, 0, 0, 0];
        let long = payload(4000, 1);
        guest.request(TX, &[&header, &long], &[]);
        // A header that shares its buffer with the frame, and one in two pieces.
        guest.request(TX, &[&frame(b"shared with a frame")], &[]);
        guest.request(TX, &[&header[..5], &header[5..], b"a header in two"], &[]);
        guest.kick(TX);
        assert_eq!(guest.used(TX).len(), 3);
        let sent: Vec<Vec<u8>> = network.sent().into_iter().map(|(_, sent)| sent).collect();
        let expected = [
            [&header[..], &long].concat(),
            frame(b"shared with a frame"),
            [&header[..], b"a header in two"].concat(),
        ];
        let skip = if bare { HEADER } else { 0 };
        for (sent, expected) in sent.iter().zip(&expected) {
            assert_eq!(sent, &expected[skip..]);
        }
        assert_eq!(sent.len(), expected.len());
    }
}

#[test]
fn frames_that_came_are_received() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    for _ in 0..3 {
        guest.request(RX, &[], &[12, 1514]);
    }
    guest.kick(RX);
    assert_eq!(guest.used(RX), []);
    network.come(0, &frame(b"the first frame"));
    network.come(0, &frame(b"the second frame"));
    wake(&guest, 0);
    let frames: Vec<Vec<u8>> = guest.used(RX).into_iter().map(|(_, data)| data).collect();
    let expected = [seen(b"the first frame", 1), seen(b"the second frame", 1)];
    assert_eq!(frames, expected);
    assert_eq!(guest.interrupts(), 1, "one for both");
}

#[test]
fn a_network_without_headers_gets_them() {
    let network = FakeNetwork::new(Wire {
        bare: true,
        ..Wire::default()
    });
    let mut guest = started(&network, MRG_RXBUF);
    // The header ends within a piece; what was in memory before is not left in it.
    let dirty = guest.buffer(&[0xff; 64]);
    guest.chain(RX, &[(dirty, 7, 2), (dirty + 7, 57, 2)]);
    network.come(0, b"a bare frame");
    guest.kick(RX);
    let mut received = [0; 24];
    guest
        .memory
        .read_slice(&mut received, GuestAddress(dirty))
        .expect("memory");
    assert_eq!(received[..], seen(b"a bare frame", 1));
}

#[test]
fn frames_wait_for_buffers() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    network.come(0, &frame(b"before any buffer"));
    network.come(0, &frame(b"and one more"));
    wake(&guest, 0);
    assert_eq!(guest.used(RX), []);
    guest.request(RX, &[], &[1526]);
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"before any buffer", 1));
    guest.request(RX, &[], &[1526]);
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"and one more", 1));
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn a_long_frame_lies_in_several_buffers_that_are_used_together() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    let long = payload(3000, 3);
    network.come(0, &frame(&long));
    // Not enough for it: the driver must not see a part of it.
    guest.request(RX, &[], &[1000]);
    guest.request(RX, &[], &[12, 988]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), []);
    guest.request(RX, &[], &[1000]);
    guest.request(RX, &[], &[1000]);
    guest.request(RX, &[], &[1000]);
    guest.kick(RX);
    let used = guest.used(RX);
    let sizes: Vec<usize> = used.iter().map(|(_, data)| data.len()).collect();
    assert_eq!(sizes, [1000, 1000, 1000, 12]);
    let whole: Vec<u8> = used.into_iter().flat_map(|(_, data)| data).collect();
    assert_eq!(whole, seen(&long, 4));
    // The buffer that is left over serves the next one.
    network.come(0, &frame(b"a short frame"));
    wake(&guest, 0);
    assert_eq!(guest.used(RX)[0].1, seen(b"a short frame", 1));
}

#[test]
fn a_frame_that_never_fits_is_dropped_and_counted() {
    // One buffer a frame: this driver does not merge them.
    let network = FakeNetwork::default();
    let mut guest = started(&network, 0);
    guest.request(RX, &[], &[1526]);
    guest.request(RX, &[], &[1526]);
    network.come(0, &frame(&payload(1515, 1)));
    network.come(0, &frame(b"a short frame"));
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"a short frame", 1));
    assert_eq!(guest.mmio.faults(), 1);
    // All buffers that a queue can have: still not enough for 64 KiB.
    let mut guest = started(&network, MRG_RXBUF);
    for _ in 0..64 {
        guest.request(RX, &[], &[1000]);
    }
    network.come(0, &frame(&payload(64 << 10, 1)));
    network.come(0, &frame(b"a short frame"));
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"a short frame", 1));
    assert_eq!(guest.mmio.faults(), 1);
    assert!(!guest.is_broken());
}

#[test]
fn more_frames_than_one_go_takes_all_move() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    for index in 0..200_u8 {
        network.come(0, &frame(&payload(20, index)));
    }
    for _ in 0..BATCH {
        guest.request(RX, &[], &[80]);
    }
    let mut received = 0;
    wake(&guest, 0);
    while received < 200 {
        // A driver that is busy with what it got has been asked not to kick.
        for (_, data) in guest.used(RX) {
            assert_eq!(data, seen(&payload(20, received), 1));
            received += 1;
            guest.request(RX, &[], &[80]);
        }
        if received < 192 {
            assert!(guest.mmio.kicks()[RX].read().is_ok(), "it kicks itself");
            lock(&guest.device).kicked(RX);
        } else {
            guest.kick(RX);
        }
    }
    for index in 0..BATCH {
        guest.request(TX, &[&frame(&payload(20, index as u8))], &[]);
    }
    lock(&guest.device).kicked(TX);
    assert_eq!(guest.used(TX).len(), BATCH);
    guest.request(TX, &[&frame(b"one frame too many")], &[]);
    assert!(guest.mmio.kicks()[TX].read().is_ok(), "it kicks itself");
    lock(&guest.device).kicked(TX);
    assert_eq!(network.sent().len(), BATCH + 1);
}

#[test]
fn a_frame_that_cannot_be_sent_yet_is_sent_later() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, 0);
    network.change(|wire| wire.refuse = Some(FrameError::Wait));
    guest.request(TX, &[&frame(b"the first frame")], &[]);
    guest.request(TX, &[&frame(b"the second frame")], &[]);
    guest.kick(TX);
    assert_eq!(guest.used(TX), []);
    network.change(|wire| wire.refuse = None);
    wake(&guest, 0);
    assert_eq!(guest.used(TX).len(), 2);
    let sent = network.sent();
    assert_eq!(sent[0], (0, frame(b"the first frame")));
    assert_eq!(sent[1], (0, frame(b"the second frame")));
}

#[test]
fn a_frame_that_is_lost_is_counted_and_the_next_is_sent() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    let lost = || Some(FrameError::Lost("the link is down".to_owned()));
    network.change(|wire| wire.refuse = lost());
    guest.answer(TX, &[&frame(b"this one is lost")], &[]);
    network.change(|wire| wire.refuse = None);
    guest.answer(TX, &[&frame(b"this one is not")], &[]);
    assert_eq!(network.sent(), [(0, frame(b"this one is not"))]);
    assert_eq!(guest.mmio.faults(), 1);
    network.change(|wire| wire.incoming[0].push_back(Err(lost().expect("trouble"))));
    network.come(0, &frame(b"after a lost one"));
    guest.request(RX, &[], &[1526]);
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"after a lost one", 1));
    assert_eq!(guest.mmio.faults(), 2);
}

#[test]
fn when_the_network_is_gone_the_link_goes_down_and_sending_goes_on() {
    let gone = || FrameError::Gone("the cable is cut".to_owned());
    for by_receiving in [false, true] {
        let network = FakeNetwork::default();
        let mut guest = started(&network, MRG_RXBUF | STATUS);
        if by_receiving {
            network.change(|wire| wire.incoming[0].push_back(Err(gone())));
            guest.request(RX, &[], &[1526]);
            wake(&guest, 0);
        } else {
            network.change(|wire| wire.refuse = Some(gone()));
            guest.answer(TX, &[&frame(b"this one is lost")], &[]);
        }
        assert_eq!(guest.read(LINK_STATUS) & 0xffff, 0);
        assert_eq!(guest.read(0x60), 3, "the driver hears of it");
        // A driver whose frames are never used would wait for ever.
        for _ in 0..3 {
            guest.answer(TX, &[&frame(b"this one too is lost")], &[]);
        }
        assert_eq!(network.sent(), []);
        assert!(!guest.is_broken());
    }
}

#[test]
fn the_driver_hears_of_the_link_if_it_wants_to() {
    for features in [0, STATUS] {
        let network = FakeNetwork::default();
        let mut guest = started(&network, features);
        network.change(|wire| wire.woken = Some(SourceEvent::Link(false)));
        wake(&guest, 0);
        assert_eq!(guest.read(LINK_STATUS) & 0xffff, 0);
        let heard = usize::from(features != 0);
        assert_eq!(guest.interrupts(), heard);
        network.change(|wire| wire.woken = Some(SourceEvent::Link(true)));
        wake(&guest, 0);
        network.change(|wire| wire.woken = Some(SourceEvent::Link(true)));
        wake(&guest, 0);
        assert_eq!(guest.read(LINK_STATUS) & 0xffff, 1);
        assert_eq!(guest.interrupts(), 2 * heard);
    }
}

#[test]
fn each_driver_begins_anew() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    // Buffers that were taken and not used are the old driver's, and no longer written to.
    network.come(0, &frame(&payload(3000, 3)));
    guest.request(RX, &[], &[1526]);
    guest.kick(RX);
    guest.start(MRG_RXBUF);
    guest.request(RX, &[], &[1526]);
    network.come(0, &frame(b"for the new driver"));
    wake(&guest, 0);
    assert_eq!(guest.used(RX)[0].1, seen(b"for the new driver", 1));
}

#[test]
fn a_card_that_cannot_start_asks_for_a_reset() {
    let network = FakeNetwork::default();
    network.change(|wire| wire.refuses_configuration = true);
    let mut guest = Guest::new(card(&network));
    guest.negotiate(0);
    guest.write(0x70, 15);
    assert!(guest.is_broken());
}

#[test]
fn receive_buffers_that_cannot_be_break_the_card() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, MRG_RXBUF);
    network.come(0, &frame(b"a frame that came"));
    guest.request(RX, &[], &[11]);
    guest.kick(RX);
    assert!(guest.is_broken());
    // And all goes on after a reset.
    guest.start(MRG_RXBUF);
    guest.request(RX, &[], &[100]);
    guest.kick(RX);
    assert_eq!(guest.used(RX)[0].1, seen(b"a frame that came", 1));
}

#[test]
fn frames_that_cannot_be_are_not_sent() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, 0);
    let part = payload(60_000, 0);
    let wrong: [&[&[u8]]; 4] = [&[], &[&[0; 11]], &[&[0; 25]], &[&part, &part]];
    for readable in wrong {
        guest.answer(TX, readable, if readable.is_empty() { &[1] } else { &[] });
    }
    guest.answer(TX, &[&[0; 26]], &[]);
    assert_eq!(network.sent(), [(0, vec![0; 26])]);
    assert_eq!(guest.mmio.faults(), 4);
}

#[test]
fn a_driver_that_waits_for_any_buffer_of_a_frame_is_interrupted_once() {
    for (event, interrupts) in [(0_u16, 1), (2, 1), (3, 1), (4, 0)] {
        let network = FakeNetwork::default();
        let mut guest = started(&network, MRG_RXBUF | FEATURE_EVENT_IDX);
        let [_, available, _] = guest.rings(RX);
        // used_event, behind 64 entries.
        let at = GuestAddress(available + 4 + 2 * 64);
        guest.memory.write_obj(event, at).expect("memory");
        for _ in 0..4 {
            guest.request(RX, &[], &[1000]);
        }
        network.come(0, &frame(&payload(3500, 0)));
        guest.kick(RX);
        assert_eq!(guest.used(RX).len(), 4);
        assert_eq!(guest.interrupts(), interrupts, "event {event}");
    }
}
