//! A machine that is held while frames are under way, and goes on with this card or another.

use super::rings::FakeRings;
use super::*;
use crate::virtio::MmioState;

/// What was saved of the card itself.
fn saved(state: &MmioState) -> NetState {
    match &state.transport.device {
        DeviceState::Net(state) => state.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_frame_that_waits_for_buffers_goes_on_with_them() {
    for bare in [false, true] {
        let network = FakeNetwork::new(Wire {
            bare,
            ..Wire::default()
        });
        let mut guest = started(&network, MRG_RXBUF);
        let long = payload(5000, 3);
        network.come(0, &frame(&long)[if bare { HEADER } else { 0 }..]);
        // A part of it lies in these two, the rest with us.
        for _ in 0..2 {
            guest.request(RX, &[], &[1000]);
        }
        guest.kick(RX);
        assert!(guest.used(RX).is_empty());
        let state = guest.move_to(card(&network));
        let [(0, waiting)] = &saved(&state).frames[..] else {
            panic!("one frame waits");
        };
        assert_eq!(*waiting, frame(&long));
        let at = state.transport.queues[RX].position;
        assert_eq!((at.next_available, at.next_used), (0, 0), "handed back");
        for _ in 0..4 {
            guest.request(RX, &[], &[1000]);
        }
        guest.kick(RX);
        let used = guest.used(RX);
        assert_eq!(used.len(), 6);
        let whole: Vec<u8> = used.into_iter().flat_map(|(_, data)| data).collect();
        assert_eq!(whole, seen(&long, 6));
    }
}

#[test]
fn what_the_driver_asked_for_holds_until_the_reset() {
    let network = FakeNetwork::new(Wire {
        pairs: 2,
        offloads: GUEST_CSUM | GUEST_TSO4,
        ..Wire::default()
    });
    let features = CTRL_VQ | MQ | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let mut guest = started(&network, features);
    let queue = 4;
    assert_eq!(control(&mut guest, queue, &[4, 0, 2, 0]), [0]);
    assert_eq!(control(&mut guest, queue, &[1, 1, 2, 2, 2, 2, 2, 2]), [0]);
    let only_csum = [&[5, 0][..], &GUEST_CSUM.to_le_bytes()].concat();
    assert_eq!(control(&mut guest, queue, &only_csum), [0]);
    for moves in [false, true] {
        network.change(|wire| wire.configured = (0, 0));
        match moves {
            false => guest.pause(),
            true => drop(guest.move_to(card(&network))),
        }
        let (pairs, offloads) = lock(&network.0).configured;
        assert_eq!((pairs, offloads & GUEST_OFFLOADS), (2, GUEST_CSUM));
        assert_eq!(guest.read(0x100), 0x0202_0202);
    }
    guest.start(features);
    let (pairs, offloads) = lock(&network.0).configured;
    assert_eq!(
        (pairs, offloads & GUEST_OFFLOADS),
        (1, GUEST_CSUM | GUEST_TSO4)
    );
    assert_eq!(guest.read(0x100), 2, "the card's own address");
}

#[test]
fn a_link_that_went_down_meanwhile_is_told() {
    let network = FakeNetwork::default();
    let mut guest = started(&network, STATUS);
    guest.mmio.quiesce();
    network.change(|wire| wire.woken = Some(SourceEvent::Link(false)));
    wake(&guest, 0);
    assert_eq!(guest.interrupts(), 0);
    guest.mmio.resume();
    assert_eq!(guest.read(LINK_STATUS) & 1, 0);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.read(0x60), 3);
}

#[test]
fn the_hosts_end_goes_on_where_it_stopped() {
    let rings = FakeRings::default();
    let new = || RingNet::new(rings.clone(), MAC_ADDRESS).expect("descriptors");
    let mut guest = Guest::started(new(), CTRL_VQ);
    assert_eq!(*lock(&rings.began), [0, 0]);
    for _ in 0..5 {
        guest.request(TX, &[&frame(b"a frame to send")], &[]);
    }
    // It took three of them, and completed as many.
    *lock(&rings.next) = 3;
    let [_, _, used] = guest.rings(TX);
    guest
        .memory
        .write_obj(3_u16, GuestAddress(used + 2))
        .expect("memory");
    for moves in [false, true] {
        match moves {
            false => guest.pause(),
            true => drop(guest.move_to(new())),
        }
        assert_eq!(*lock(&rings.began), [3, 3]);
        assert!(lock(&rings.works_on).is_some());
    }
    // A driver that comes anew begins at the start.
    guest.start(CTRL_VQ);
    assert_eq!(*lock(&rings.began), [0, 0]);
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let network = FakeNetwork::default();
    let good = NetState {
        mac: MAC_ADDRESS,
        session: None,
        frames: Vec::new(),
    };
    let session = |pairs, offloads| Some(NetSession { pairs, offloads });
    let bad = [
        NetState {
            mac: [1; 6],
            ..good.clone()
        },
        NetState {
            session: session(2, 0),
            ..good.clone()
        },
        NetState {
            session: session(0, 0),
            ..good.clone()
        },
        NetState {
            session: session(1, GUEST_CSUM),
            ..good.clone()
        },
        NetState {
            frames: vec![(0, vec![0; HEADER - 1])],
            ..good.clone()
        },
        NetState {
            frames: vec![(0, vec![0; MOST_BYTES + 1])],
            ..good.clone()
        },
    ];
    let mut device = card(&network);
    let before = device.save();
    for state in bad {
        let error = device
            .restore(&DeviceState::Net(state))
            .expect_err("refused");
        assert!(!error.0.contains('\n'));
        assert_eq!(device.save(), before);
    }
    let error = device.restore(&DeviceState::Plain).expect_err("refused");
    assert_eq!(error.0, "the state is that of a device without one");
    device.restore(&DeviceState::Net(good)).expect("it can be");
}

/// What a driver and a network do in a property test.
#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a receive buffer of these pieces.
    Buffer(Vec<usize>),
    /// A frame of so many bytes comes.
    Frame(usize),
    /// The source or the kick, which is all that the device hears.
    Wake,
    Kick,
    /// The machine is held and goes on, with another card in the stead of this one if it is true.
    Hold(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let pieces = prop::collection::vec(1..=1200_usize, 1..=3);
    let sizes = prop_oneof![3 => 14..=1514_usize, 1 => 1515..=65_550_usize];
    prop_oneof![
        4 => pieces.prop_map(|mut pieces| {
            pieces[0] += HEADER;
            Step::Buffer(pieces)
        }),
        1 => sizes.prop_map(Step::Frame),
        1 => Just(Step::Wake),
        1 => Just(Step::Kick),
        1 => any::<bool>().prop_map(Step::Hold),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_frame_arrives_whole_once_and_in_order_or_is_counted(
        steps in prop::collection::vec(step(), 1..300),
        bare: bool,
    ) {
        let network = FakeNetwork::new(Wire { bare, ..Wire::default() });
        let mut guest = started(&network, MRG_RXBUF | FEATURE_EVENT_IDX);
        let mut came = VecDeque::new();
        let mut buffers = 0;
        let mut parts: Vec<u8> = Vec::new();
        let mut missing = 0;
        let mut received = 0;
        let mut room = 6 << 20;
        for (index, step) in steps.into_iter().enumerate() {
            match step {
                Step::Buffer(pieces) => {
                    // The fake's descriptors are 64, and its memory is not endless.
                    let size: usize = pieces.iter().map(|piece| piece + 16).sum();
                    if buffers < 20 && size <= room {
                        room -= size;
                        guest.request(RX, &[], &pieces);
                        buffers += 1;
                    }
                }
                Step::Frame(size) => {
                    let payload = payload(size, index as u8);
                    let skip = if bare { HEADER } else { 0 };
                    network.come(0, &frame(&payload)[skip..]);
                    came.push_back(payload);
                }
                Step::Wake => wake(&guest, 0),
                Step::Kick => guest.kick(RX),
                Step::Hold(false) => guest.pause(),
                Step::Hold(true) => drop(guest.move_to(card(&network))),
            }
            for (_, data) in guest.used(RX) {
                buffers -= 1;
                if missing == 0 {
                    prop_assert!(parts.is_empty());
                    missing = usize::from(data[10]) + 256 * usize::from(data[11]);
                }
                parts.extend(data);
                missing -= 1;
                if missing == 0 {
                    received += 1;
                    let mut whole = std::mem::take(&mut parts);
                    whole[10..12].fill(0);
                    // Those before it were dropped, each counted.
                    loop {
                        let next = came.pop_front();
                        prop_assert!(next.is_some(), "a frame that nobody sent");
                        if frame(&next.expect("a frame")) == whole {
                            break;
                        }
                    }
                }
            }
            prop_assert_eq!(missing, 0, "the driver saw a part of a frame");
        }
        prop_assert!(!guest.is_broken());
        prop_assert!(received + guest.mmio.faults() <= 300);
    }
}
